"""The k largest by chunks: numpy's stable order, ties and forbidden logits included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.infer import largest


@pytest.mark.parametrize(("V", "chunk", "k"), [(1000, 64, 10), (1024, 64, 10), (130, 16, 8)])
@pytest.mark.parametrize("values", ["normal", "few", "forbidden", "one"])
def test_chunks_give_the_order_of_a_stable_sort(V, chunk, k, values):
  rng = np.random.default_rng(V + k)
  x = rng.standard_normal((3, V)).astype(np.float32)
  if values == "few":
    x = rng.integers(0, 3, (3, V)).astype(np.float32)
  elif values == "forbidden":
    x[:, rng.permutation(V)[: V - 4]] = -np.inf
  elif values == "one":
    x[:] = 2.5
  best, at = jax.jit(largest.by_chunks, static_argnums=(1, 2))(x, k, chunk)
  order = np.argsort(-x, axis=1, kind="stable")[:, :k]
  np.testing.assert_array_equal(at, order)
  np.testing.assert_array_equal(best, np.take_along_axis(x, order, axis=1))


def test_a_gpu_searches_chunks_and_other_devices_whole_rows():
  x = jax.ShapeDtypeStruct((10, 73448), jnp.float32)
  run = jax.jit(largest.top_k, static_argnums=1).trace(x, 10)
  widths = {}
  for platform in ("cpu", "cuda"):
    text = run.lower(lowering_platforms=(platform,)).as_text()
    widths[platform] = [line for line in text.splitlines() if "chlo.top_k" in line]
  assert len(widths["cpu"]) == 1 and "73448" in widths["cpu"][0]
  assert len(widths["cuda"]) == 2 and not any("73448" in line for line in widths["cuda"])


def test_too_few_chunks_are_an_error():
  with pytest.raises(ValueError, match="found 4 chunks of 16, expected at least k = 5"):
    largest.by_chunks(jnp.zeros((1, 64)), 5, 16)
