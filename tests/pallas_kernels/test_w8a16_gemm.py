"""The 8-bit matmul, and the form for few rows of all packed ones, against a float64 product."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.quant import qtensor
from pallas_kernels.w4a16_gemm import cases as packed_cases
from pallas_kernels.w4a16_gemm import ref, xla, xla_rows
from pallas_kernels.w8a16_gemm import api, cases
from pallas_kernels.w8a16_gemm import xla as by_output
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


def kernel_by_output(num_in=200, num_out=33, seed=0):
  """(codes [N, K], scale [1, N], the float64 kernel [K, N])."""
  rng = np.random.default_rng(seed)
  codes = rng.integers(-127, 128, (num_out, num_in)).astype(np.int8)
  scale = rng.uniform(0.5, 2.0, (1, num_out)).astype(np.float32) / 64 / np.sqrt(num_in)
  return jnp.asarray(codes), jnp.asarray(scale), codes.T.astype(np.float64) * scale


@pytest.mark.parametrize("implementation", ["ref", "xla"])
@pytest.mark.parametrize("rows", [1, 5, by_output.MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_by_output_is_the_equation(implementation, rows, dtype):
  codes, scale, w = kernel_by_output()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 200)), dtype)
  call = jax.jit(lambda *a: api.matmul_by_output(*a, implementation=implementation))
  found, exact = call(x, codes, scale), np.asarray(x.astype(jnp.float32), np.float64) @ w
  assert found.dtype == dtype and found.shape == (rows, 33)
  if dtype == jnp.float32:
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
  else:
    plain = (x @ jnp.asarray(w, dtype)).astype(jnp.float32)
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - exact).max() + 1e-3


def test_integer_products_err_as_little_as_float32():
  """Against float64: outliers, tiny rows and rows of zeros, beside what float32 itself loses."""
  codes, _, _ = kernel_by_output(num_in=576)
  w = np.asarray(codes, np.float64).T
  x = np.random.default_rng(2).normal(size=(6, 576)).astype(np.float32)
  x[1, 7], x[2], x[3], x[4] = 1000.0, x[2] * 1e-30, 0.0, x[4] * 1e20
  found = np.asarray(by_output.integer_products(jnp.asarray(x), codes), np.float64)
  exact = x.astype(np.float64) @ w
  # Half of the last digit's place a number, numbers at random; a sum rounded once to float32.
  place = np.abs(x).max(axis=1, keepdims=True) / 127 / 254**2 / np.sqrt(12)
  bar = 6 * place * np.sqrt((w**2).sum(axis=0)) + 1e-6 * np.abs(exact)
  assert np.all(np.abs(found - exact) <= bar)
  assert np.all(found[3] == 0)


def test_a_row_of_integer_products_does_not_see_the_others():
  codes, _, _ = kernel_by_output()
  x = np.random.default_rng(3).normal(size=(7, 200)).astype(np.float32)
  x[2, 5], x[4, 6] = np.nan, np.inf
  together = np.asarray(by_output.integer_products(jnp.asarray(x), codes))
  for m in (0, 1, 3, 5, 6):
    alone = by_output.integer_products(jnp.asarray(x[m : m + 1]), codes)
    np.testing.assert_array_equal(together[m], alone[0])
  assert not np.isfinite(together[[2, 4]]).any() and np.isfinite(together[[0, 1, 3, 5, 6]]).all()


def test_gradients_by_output_are_those_of_the_reference():
  codes, scale, _ = kernel_by_output()
  x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 200)), jnp.float32)
  loss = lambda f: lambda x, s: jnp.sum(jnp.sin(f(x, codes, s)))  # noqa: E731
  found, expected = (
    jax.grad(loss(functools.partial(api.matmul_by_output, implementation=name)), (0, 1))(x, scale)
    for name in ("xla", "ref")
  )
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(other).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for CPUs")
def test_which_rows_are_multiplied_as_integers():
  assert by_output.has_integer_library()  # of the jax versions that are tested
  assert by_output.serves(jnp.zeros((1, 64))) and by_output.serves(jnp.zeros((32, 64)))
  assert not by_output.serves(jnp.zeros((33, 64))) and not by_output.serves(jnp.zeros((0, 64)))
  wide = jax.ShapeDtypeStruct((1, 2**31 // 127**2 + 1), jnp.float32)
  assert not by_output.serves(wide)
  # The library has the product of one row too: three digits are three rows.
  shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((1, 64), "f4"), ((32, 64), "i1"))]
  text = jax.jit(by_output.integer_products).lower(*shapes).compile().as_text()
  assert text.count("kind=kCustom") == 1 and "ynn_fusion" in text


@pytest.mark.parametrize("num_in, is_table", [(1, False), (2, False), (1, True)])
def test_a_qtensor_by_output_is_the_same_tensor(num_in, is_table):
  rng = np.random.default_rng(5)
  w = jnp.asarray(rng.normal(size=(40, 24) if num_in == 1 else (4, 6, 10)), jnp.float32)
  qt = qtensor.quantize(w, "int8", num_in=num_in, is_table=is_table)
  other = qtensor.store_by_output(qtensor.pack(qt))
  assert other.is_by_output and not other.is_packed and other.codes.dtype == jnp.int8
  assert other.codes.shape == (math.prod(qt.out_shape), qt.in_size) and other.nbytes == qt.nbytes
  assert other.full_shape == qt.full_shape
  for back in (qtensor.unpack(other), qtensor.unpack(qtensor.pack(other))):
    np.testing.assert_array_equal(back.codes, qt.codes)
  np.testing.assert_array_equal(qtensor.dequantize(other), qtensor.dequantize(qt))
  x = jnp.asarray(rng.normal(size=(3, *qt.shape[:num_in])), jnp.float32)
  np.testing.assert_allclose(qtensor.matmul(x, other), qtensor.matmul(x, qt), rtol=1e-5, atol=1e-5)
  if num_in == 1:
    ids = jnp.asarray([3, 0, 7])
    chosen = qtensor.outputs(other, ids)
    np.testing.assert_array_equal(
      qtensor.dequantize(chosen.replace(is_table=False)),
      qtensor.dequantize(qtensor.outputs(qt, ids).replace(is_table=False)),
    )
  if is_table:
    np.testing.assert_array_equal(
      qtensor.rows(other, ids, jnp.float32), qtensor.rows(qt, ids, jnp.float32)
    )


@pytest.mark.parametrize(
  "change",
  [dict(group_size=20), dict(scheme="int4"), dict(num_lead=1)],
  ids=["groups", "int4", "lead"],
)
def test_what_has_no_form_by_output(change):
  w = jnp.ones((2, 40, 24) if change.get("num_lead") else (40, 24))
  assert not qtensor.can_store_by_output(qtensor.quantize(w, **({"scheme": "int8"} | change)))


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(codes=jnp.zeros((8, 63), jnp.int8)), r"codes: found int8\[8, 63\], expected int8\[N, 64"),
    (dict(codes=jnp.zeros((8, 64), jnp.uint8)), r"codes: found uint8\[8, 64\], expected int8"),
    (dict(scale=jnp.ones((2, 8))), r"scale: found float32\[2, 8\], expected floats \[1, 8\]"),
    (dict(x=jnp.ones((2, 64), jnp.int8)), r"x: found int8\[2, 64\], expected floats"),
  ],
)
def test_bad_calls_by_output_name_what_was_found(change, reason):
  args = dict(x=jnp.ones((2, 64)), codes=jnp.zeros((8, 64), jnp.int8), scale=jnp.ones((1, 8)))
  with pytest.raises(ValueError, match="w8a16_gemm: " + reason):
    api.matmul_by_output(*(args | change).values())


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
