"""The 8-bit matmul, and the form for few rows of all packed ones, against a float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.quant import qtensor
from pallas_kernels.w4a16_gemm import cases as packed_cases
from pallas_kernels.w4a16_gemm import ref, xla, xla_rows
from pallas_kernels.w8a16_gemm import api, cases
from tests.pallas_kernels import packed_suite as suite

Case = packed_cases.Case


@pytest.mark.parametrize("name", cases.TINY)
@pytest.mark.parametrize("backend", [ref.matmul_ref, xla.matmul_xla], ids=["ref", "xla"])
def test_matmul_is_the_equation(backend, name):
  suite.check(backend, cases.TINY[name], 8)


ROWS = {
  "channel": Case(rows=1, num_in=200, num_out=33, group_size=-1),
  "channel_zero": Case(rows=2, num_in=96, num_out=40, group_size=-1, has_zero=True),
  "groups_of_48": Case(rows=1, num_in=192, num_out=40, group_size=48, has_zero=True),
  "groups_of_128": Case(rows=4, num_in=256, num_out=24, group_size=128),
  "shared_loop": Case(rows=7, num_in=192, num_out=24, group_size=48, has_zero=True),
  "shared_loop_channel": Case(rows=12, num_in=100, num_out=24, group_size=-1),
}


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ROWS)
def test_few_rows_are_the_equation(name, bits):
  case = ROWS[name]
  groups = 1 if case.group_size == -1 else case.num_in // case.group_size
  assert xla_rows.block_size(case.num_in, groups, bits) in (20, 24, 25, 32)
  suite.check(xla_rows.matmul_rows, case, bits)


def test_few_rows_in_bf16_err_no_more_than_a_bf16_product():
  suite.check(xla_rows.matmul_rows, ROWS["groups_of_128"], 4, dtype=jnp.bfloat16)


def test_which_calls_are_served():
  x, scale = jnp.zeros((1, 64)), jnp.zeros((1, 8))
  assert xla_rows.serves(x, scale, 4) == (jax.default_backend() == "cpu")
  for bits, most in xla_rows.MAX_ROWS.items():
    assert xla_rows.serves(jnp.zeros((most, 64)), scale, bits) == xla_rows.serves(x, scale, bits)
    assert not xla_rows.serves(jnp.zeros((most + 1, 64)), scale, bits)
  assert not xla_rows.serves(jnp.zeros((1, 67)), scale, 4)  # a prime number of inputs
  assert not xla_rows.serves(x, jnp.zeros((16, 8)), 4)  # groups of 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for CPUs")
def test_a_loop_over_rows_holds_no_unpacked_codes():
  arrays = jnp.ones((8, 256)), jnp.ones((128, 512), jnp.uint8), jnp.ones((4, 512))

  def loop(x_MK, codes_RN, scale_QN):
    one = lambda x: xla_rows.matmul_rows(x[None], codes_RN, scale_QN, bits=4, low=-8)  # noqa: E731
    return jax.lax.map(one, x_MK)

  compiled = jax.jit(loop).lower(*arrays).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * arrays[1].size


def test_gradients_of_few_rows_are_those_of_the_reference():
  (x, codes, scale, _), _ = suite.inputs(ROWS["groups_of_128"], 4)
  loss = lambda f: lambda x, s: jnp.sum(jnp.sin(f(x, codes, s, bits=4, low=-8)))  # noqa: E731
  found = jax.grad(loss(xla_rows.matmul_rows), (0, 1))(x, scale)
  expected = jax.grad(loss(ref.matmul_ref), (0, 1))(x, scale)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_layout_is_that_of_qtensor(group_size):
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(96, 24)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(3, 96)), jnp.float32)
  qt = qtensor.pack(qtensor.quantize(kernel, "int8", group_size))
  assert qt.codes.dtype == jnp.uint8 and qtensor.has_packed_matmul(qt)
  expected = np.asarray(x, np.float64) @ np.asarray(qtensor.dequantize(qt), np.float64)
  for found in (api.matmul(x, qt.codes, qt.scale, group_size=group_size), qtensor.matmul(x, qt)):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "change, error, reason",
  [
    (dict(codes=jnp.zeros((16, 8), jnp.int8)), ValueError, r"w8a16_gemm: codes: found int8\[16, 8"),
    (dict(group_size=48), ValueError, "w8a16_gemm: group_size: found 48"),
    (dict(implementation="triton"), NotImplementedError, "w8a16_gemm: no 'triton'"),
  ],
)
def test_bad_calls_name_what_was_found(change, error, reason):
  codes = change.pop("codes", jnp.zeros((64, 8), jnp.uint8))
  with pytest.raises(error, match=reason):
    api.matmul(jnp.zeros((2, 64)), codes, jnp.ones((1, 8)), **change)
