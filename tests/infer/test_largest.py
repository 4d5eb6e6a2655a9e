"""The k largest by chunks: numpy's stable order, ties and forbidden logits included."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.infer import largest


@pytest.mark.parametrize(("V", "chunk", "k"), [(1000, 64, 10), (1024, 64, 10), (130, 16, 8)])
@pytest.mark.parametrize("values", ["normal", "few", "forbidden", "one", "bf16"])
def test_chunks_give_the_order_of_a_stable_sort(V, chunk, k, values):
  rng = np.random.default_rng(V + k)
  x = rng.standard_normal((3, V)).astype(np.float32)
  if values == "few":
    x = rng.integers(0, 3, (3, V)).astype(np.float32)
  elif values == "forbidden":
    x[:, rng.permutation(V)[: V - 4]] = -np.inf
  elif values == "one":
    x[:] = 2.5
  elif values == "bf16":
    x = x.astype(jnp.bfloat16)
  best, at = jax.jit(largest.by_chunks, static_argnums=(1, 2))(x, k, chunk)
  order = np.argsort(-x.astype(np.float32), axis=1, kind="stable")[:, :k]
  np.testing.assert_array_equal(at, order)
  np.testing.assert_array_equal(best, np.take_along_axis(x, order, axis=1))


def test_a_gpu_sorts_chunks_and_other_devices_search_whole_rows():
  x = jax.ShapeDtypeStruct((10, 73448), jnp.float32)
  run = jax.jit(largest.top_k, static_argnums=1).trace(x, 10)
  text = {p: run.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
  assert text["cpu"].count("chlo.top_k") == 1 and "stablehlo.sort" not in text["cpu"]
  assert "chlo.top_k" not in text["cuda"]
  sorts = re.findall(r"stablehlo.sort.*?-> \(tensor<10x(\d+)xi32>", text["cuda"], re.DOTALL)
  assert [int(n) for n in sorts] == [766, 960]


def test_too_few_chunks_are_an_error():
  with pytest.raises(ValueError, match="found 4 chunks of 16, expected at least k = 5"):
    largest.by_chunks(jnp.zeros((1, 64)), 5, 16)
