"""The packed ternary matmul against a float64 product of codes that numpy packed one by one."""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.quant import qtensor
from pallas_kernels.ternary_gemm import api, bench, cases
from pallas_kernels.w4a16_gemm import bench as packed_bench
from pallas_kernels.w4a16_gemm import ref, triton, xla


def load(name):
  if name not in sys.modules:
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
  return sys.modules[name]


host, cubin, suite = load("triton_host"), load("triton_cubin"), load("packed_suite")
NAMES = pytest.mark.parametrize("name", cases.TINY)


@NAMES
@pytest.mark.parametrize("backend", [ref.matmul_ref, xla.matmul_xla], ids=["ref", "xla"])
def test_matmul_is_the_equation(backend, name):
  suite.check(backend, cases.TINY[name], 2)


def test_a_product_of_integers_is_exact_and_the_scale_comes_after_it():
  """0.1 and 0.3 are no floats: s * (x @ T) rounds once, (s T) summed would round at every term."""
  rng = np.random.default_rng(0)
  codes = rng.integers(-1, 2, (300, 16))
  x = rng.integers(-9, 10, (4, 300)).astype(np.float32)
  scale = np.where(np.arange(16) % 2, 0.1, 0.3).astype(np.float32)
  found = api.matmul(
    jnp.asarray(x), jnp.asarray(suite.pack(codes, 2)), jnp.asarray(scale)[None], group_size=-1
  )
  assert np.array_equal(found, (x.astype(np.int64) @ codes).astype(np.float32) * scale)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_layout_is_that_of_qtensor(group_size):
  rng = np.random.default_rng(1)
  kernel = jnp.asarray(rng.normal(size=(96, 24)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(3, 96)), jnp.float32)
  qt = qtensor.pack(qtensor.quantize(kernel, "ternary", group_size))
  found = api.matmul(x, qt.codes, qt.scale, group_size=group_size)
  expected = np.asarray(x, np.float64) @ np.asarray(qtensor.dequantize(qt), np.float64)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "change, error, reason",
  [
    (
      dict(codes=jnp.zeros((32, 8), jnp.uint8)),
      ValueError,
      r"found uint8\[32, 8\], .*uint8\[16, N",
    ),
    (dict(group_size=48), ValueError, "ternary_gemm: group_size: found 48"),
    (dict(group_size=32), ValueError, r"scale: found float32\[1, 8\], expected floats \[2, 8\]"),
    (dict(implementation="mosaic_tpu"), NotImplementedError, "no 'mosaic_tpu'"),
  ],
)
def test_bad_calls_name_what_was_found(change, error, reason):
  codes = change.pop("codes", jnp.zeros((16, 8), jnp.uint8))
  with pytest.raises(error, match=reason):
    api.matmul(jnp.zeros((2, 64)), codes, jnp.ones((1, 8)), **change)


# --- Triton without a GPU ------------------------------------------------------------------------


@pytest.fixture
def triton_installed():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  pytest.importorskip("jax_triton", reason="jax-triton needs jax's CUDA plugin (make test)")


def test_values_in_the_interpreter():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  host.run_in_process("tests/pallas_kernels/interpreted_packed.py", "ternary")


def test_groups_that_triton_does_not_serve(triton_installed):
  (x, codes, scale, _), _ = suite.inputs(
    cases.Case(rows=2, num_in=96, num_out=16, group_size=32), 2
  )
  config = triton.TritonConfig(compute_capability=90)
  with pytest.raises(NotImplementedError, match="group_size = 32, expected -1 or a multiple of 64"):
    api.matmul(x, codes, scale, group_size=32, implementation="triton", config=config)


COMPILED = {
  "m1": cases.REAL["minicpm4_8b_down_m1"],
  "prefill": cases.REAL["minicpm4_8b_up_m4096"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_lowers_and_compiles_to_cubins_without_spills(name, triton_installed):
  """8B shapes on sm_80 and sm_90; prints registers, spills and shared memory."""
  case = COMPILED[name]
  M, K, N = case.rows, case.num_in, case.num_out
  config = triton.default_config(M, N, K, -1)
  config = dataclasses.replace(config, compute_capability=90)

  def fresh():  # a trace is cached by its function, and cubin.table must see the launches
    return lambda *arrays: api.matmul(*arrays, implementation="triton", config=config)

  avals = (
    jax.ShapeDtypeStruct((M, K), jnp.bfloat16),
    jax.ShapeDtypeStruct((K // 4, N), jnp.uint8),
    jax.ShapeDtypeStruct((1, N), jnp.float32),
  )
  text = jax.jit(fresh()).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  assert "triton_kernel_call" in text
  rows = cubin.table(fresh(), *avals)
  assert {row.arch for row in rows} == {80, 90}
  for row in rows:
    assert row.spills == 0, row
    assert row.shared <= (163 if row.arch == 80 else 227) * 1024, row


# --- Bench and device ----------------------------------------------------------------------------


def test_bench_counts_two_bits_a_weight_and_agrees_with_the_reference():
  case = cases.Case(rows=2, num_in=256, num_out=32, group_size=-1)
  _, size = packed_bench.work(bench.TERNARY, case, itemsize=2)
  assert size == 256 * 32 / 4 + 2 * 32 + 2 * 2 * (256 + 32)
  x, codes, scale = packed_bench.inputs(bench.TERNARY, case, jnp.float32, layers=2)
  found = packed_bench.program(bench.TERNARY, -1, "xla")(x, codes, scale)
  expected = sum(ref.matmul_ref(x, codes[i], scale[i], bits=2, low=-1) for i in range(2))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@NAMES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_matmul_on_the_device(name, dtype):
  suite.check(triton.matmul_triton, cases.TINY[name], 2, dtype=dtype)
