"""The k largest by chunks: numpy's stable order, ties and forbidden logits included."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.vocab_topk import api, cases, triton, xla
from tests.pallas_kernels import triton_cubin as cubin
from tests.pallas_kernels import triton_host as host

VALUES = ("normal", "few", "forbidden", "one", "zeros", "bf16")


def check(top_k, values: str, V: int, k: int):
  rng = np.random.default_rng(V + k)
  x = rng.standard_normal((3, V)).astype(np.float32)
  if values == "few":
    x = rng.integers(0, 3, (3, V)).astype(np.float32)
  elif values == "forbidden":
    x[:, rng.permutation(V)[: V - 4]] = -np.inf
  elif values == "one":
    x[:] = 2.5
  elif values == "zeros":  # jax.lax.top_k takes 0 before -0
    x = np.where(rng.random((3, V)) < 0.5, np.float32(0), np.float32(-0.0))
  elif values == "bf16":
    x = x.astype(jnp.bfloat16)
  best, at = jax.jit(lambda x: top_k(x, k))(x)
  numbers = x.astype(np.float32)
  numbers = np.where(np.signbit(numbers) & (numbers == 0), np.float32(-1e-30), numbers)
  order = np.argsort(-numbers, axis=1, kind="stable")[:, :k]
  np.testing.assert_array_equal(at, order)
  np.testing.assert_array_equal(
    np.asarray(best, np.float32), np.take_along_axis(x, order, axis=1).astype(np.float32)
  )


@pytest.mark.parametrize(("V", "chunk", "k"), [(1000, 64, 10), (1024, 64, 10), (130, 16, 8)])
@pytest.mark.parametrize("values", VALUES)
def test_chunks_give_the_order_of_a_stable_sort(V, chunk, k, values):
  check(functools.partial(xla.by_chunks, chunk=chunk), values, V, k)


@pytest.mark.parametrize("values", VALUES)
def test_ranks_give_the_order_of_a_stable_sort(values):
  case = cases.TINY["tiny_short"]
  check(xla.by_rank, values, case.vocab_size, case.k)


def test_values_in_the_interpreter(triton_installed):
  host.run_in_process("tests/pallas_kernels/interpreted_vocab_topk.py", "vocab_topk")


def test_compiles_to_cubins_without_spills(triton_installed):
  x = jax.ShapeDtypeStruct((10, 73448), jnp.float32)
  config = triton.TritonConfig(compute_capability=90)
  for row in cubin.table(lambda x: api.top_k(x, 10, implementation="triton", config=config), x):
    assert row.spills == 0, row


@pytest.mark.parametrize("V, k", [(73448, 65), (1000, 10)])
def test_rows_that_triton_does_not_serve(V, k):
  with pytest.raises(NotImplementedError, match=f"the {k} largest of {V}, triton serves up to 64"):
    api.top_k(jnp.zeros((1, V)), k, implementation="triton")


def test_no_rows_have_no_program():
  with pytest.raises(NotImplementedError, match="no rows, triton serves 1 and more"):
    api.top_k(jnp.zeros((0, 73448)), 10, implementation="triton")
  assert [x.shape for x in api.top_k(jnp.zeros((0, 73448)), 10)] == [(0, 10)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("values", VALUES)
def test_largest_on_the_device(values):
  shapes = {(case.vocab_size, case.k) for case in cases.REAL.values()}
  for V, k in sorted(shapes | {(73448, 1)}):
    check(triton.top_k_triton, values, V, k)


def test_a_gpu_sorts_chunks_and_other_devices_search_whole_rows():
  x = jax.ShapeDtypeStruct((10, 73448), jnp.float32)
  run = jax.jit(api.top_k, static_argnums=1).trace(x, 10)
  text = {p: run.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
  assert text["cpu"].count("chlo.top_k") == 1 and "stablehlo.sort" not in text["cpu"]
  assert "chlo.top_k" not in text["cuda"]
  sorts = re.findall(r"stablehlo.sort.*?-> \(tensor<10x(\d+)xi32>", text["cuda"], re.DOTALL)
  assert [int(n) for n in sorts] == [766, 960]
  short = jax.jit(api.top_k, static_argnums=1).trace(
    jax.ShapeDtypeStruct((1, 100), jnp.float32), 10
  )
  text = short.lower(lowering_platforms=("cuda",)).as_text()
  assert "chlo.top_k" not in text and "stablehlo.sort" not in text


@pytest.mark.parametrize("dtype, k", [(jnp.int32, 10), (jnp.float32, 0)])
def test_what_32_bit_floats_do_not_hold_is_searched_whole(dtype, k):
  x = jax.ShapeDtypeStruct((10, 73448), dtype)
  run = jax.jit(api.top_k, static_argnums=1).trace(x, k)
  assert run.lower(lowering_platforms=("cuda",)).as_text().count("chlo.top_k") == 1
  with pytest.raises(NotImplementedError, match=f"the {k} largest|found types"):
    triton.top_k_triton(x, k, triton.TritonConfig(compute_capability=90))


@pytest.mark.parametrize("implementation", ["auto", "ref"])
def test_no_implementation_has_a_gradient(implementation):
  """Those of a GPU pass through integers: the others agree with them."""
  x = jnp.arange(300, dtype=jnp.float32)[None]
  grad = jax.grad(lambda x: jnp.sum(api.top_k(x, 3, implementation=implementation)[0]))(x)
  np.testing.assert_array_equal(grad, jnp.zeros_like(x))


def test_too_few_chunks_are_an_error():
  with pytest.raises(ValueError, match="found 4 chunks of 16, expected at least k = 5"):
    xla.by_chunks(jnp.zeros((1, 64)), 5, 16)
