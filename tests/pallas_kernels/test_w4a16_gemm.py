"""The packed 4-bit matmul against a float64 product of codes that numpy packed one by one."""

import dataclasses
import functools
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.quant import qtensor
from pallas_kernels.w4a16_gemm import api, bench, cases, ref, triton, vjp, xla


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
  suite.check(backend, cases.TINY[name], 4)


@NAMES
def test_bf16_errs_no_more_than_a_bf16_product(name):
  suite.check(xla.matmul_xla, cases.TINY[name], 4, dtype=jnp.bfloat16)


def test_groups_that_share_bytes():
  case = cases.Case(rows=2, num_in=21, num_out=6, group_size=7, has_zero=True)
  suite.check(xla.matmul_xla, case, 4)


@pytest.mark.parametrize("name", ["tiny_zero", "tiny_channel_zero"])
def test_gradients_of_a_backend_without_its_own(name):
  """y = x W: dx = dy W^T, dscale of a group = sum of x_k dy (code - zero); in float64."""
  (x, codes, scale, zero), w = suite.inputs(cases.TINY[name], 4)
  dy = np.random.default_rng(1).normal(size=(x.shape[0], w.shape[1]))

  def opaque(x, *_):  # has no gradient, as a Triton call
    shape = jax.ShapeDtypeStruct(dy.shape, x.dtype)
    return jax.pure_callback(lambda x: (x @ w).astype(np.float32), shape, x)

  def run(x, scale):
    return vjp.matmul(opaque, 4, -8, x, codes, scale, zero)

  y, pull = jax.vjp(run, x, scale)
  np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w, rtol=1e-5, atol=1e-5)
  dx, dscale = pull(jnp.asarray(dy, jnp.float32))
  np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-4, atol=1e-4)
  per_k = np.asarray(x, np.float64).T @ dy * w  # x_k dy_n scale (code - zero)
  groups = per_k.reshape(scale.shape[0], -1, w.shape[1]).sum(1)
  np.testing.assert_allclose(dscale, groups / np.asarray(scale), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_layout_is_that_of_qtensor(group_size):
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(96, 24)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(3, 96)), jnp.float32)
  qt = qtensor.pack(qtensor.quantize(kernel, "int4", group_size))
  found = api.matmul(x, qt.codes, qt.scale, group_size=group_size)
  expected = np.asarray(x, np.float64) @ np.asarray(qtensor.dequantize(qt), np.float64)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "change, error, reason",
  [
    (dict(x=jnp.zeros((2, 3, 64))), ValueError, r"x: found float32\[2, 3, 64\], expected floats"),
    (dict(x=jnp.zeros((2, 66))), ValueError, r"codes: found uint8\[32, 8\], expected uint8\[33, N"),
    (dict(codes=jnp.zeros((32, 8), jnp.int8)), ValueError, "codes: found int8"),
    (dict(group_size=48), ValueError, "group_size: found 48, expected -1 or a divisor of 64"),
    (dict(scale=jnp.zeros((1, 8))), ValueError, r"scale: found .*expected floats \[2, 8\]"),
    (dict(zero=jnp.zeros((2, 8))), ValueError, r"zero: found float32.*expected int8\[2, 8\]"),
    (dict(implementation="metal"), NotImplementedError, "no 'metal', expected auto or"),
    (dict(implementation="mosaic_tpu"), NotImplementedError, "no 'mosaic_tpu'"),
  ],
)
def test_bad_calls_name_what_was_found(change, error, reason):
  x, codes = change.pop("x", jnp.zeros((2, 64))), jnp.zeros((32, 8), jnp.uint8)
  codes, scale = change.pop("codes", codes), change.pop("scale", jnp.ones((2, 8)))
  zero = change.pop("zero", None)
  with pytest.raises(error, match=reason):
    api.matmul(x, codes, scale, zero, **{"group_size": 32, **change})


def test_triton_on_a_cpu_is_refused_with_the_reason():
  if jax.default_backend() == "gpu":
    pytest.skip("this machine has a GPU")
  arrays, _ = suite.inputs(cases.TINY["tiny_groups"], 4)
  with pytest.raises(NotImplementedError, match="needs a CUDA device"):
    api.matmul(*arrays, group_size=64, implementation="triton")


@pytest.mark.parametrize(
  "field, value",
  [("block_n", 48), ("block_m", 8), ("block_k", 16), ("num_splits", 3), ("num_stages", 0)],
)
def test_bad_tiles_are_refused(field, value):
  with pytest.raises(ValueError, match=f"TritonConfig.{field}: found {value}"):
    triton.TritonConfig(**{field: value})


def test_tiles_beyond_shared_memory_are_refused():
  with pytest.raises(ValueError, match="expected at most 232448"):
    triton.TritonConfig(block_m=128, block_n=256, block_k=256)


# --- Triton without a GPU ------------------------------------------------------------------------


@pytest.fixture
def triton_installed():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  pytest.importorskip("jax_triton", reason="jax-triton needs jax's CUDA plugin (make test)")


def test_values_in_the_interpreter():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  host.run_in_process("tests/pallas_kernels/interpreted_packed.py", "w4a16")


def program(case, arch, scale_dtype=jnp.bfloat16):
  """The call of a case with the tiles of the heuristic, as a function of abstract arrays."""
  M, K, N, g = case.rows, case.num_in, case.num_out, case.group_size
  config = dataclasses.replace(triton.default_config(M, N, K, g), compute_capability=arch)
  num_groups = 1 if g == -1 else K // g
  avals = [
    jax.ShapeDtypeStruct((M, K), jnp.bfloat16),
    jax.ShapeDtypeStruct((-(-K // 2), N), jnp.uint8),
    jax.ShapeDtypeStruct((num_groups, N), scale_dtype),
  ]
  if case.has_zero:
    avals.append(jax.ShapeDtypeStruct((num_groups, N), jnp.int8))
  return functools.partial(triton.matmul_triton, config=config), avals


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(group_size=48), "group_size = 48, expected -1 or a multiple of 32"),
    (dict(block_k=128), "group_size = 64, expected a multiple of block_k = 128"),
    (dict(dtype=jnp.float8_e4m3fn), "expected one of"),
  ],
)
def test_calls_that_triton_does_not_serve(change, reason, triton_installed):
  case = cases.Case(rows=2, num_in=192, num_out=16, group_size=change.get("group_size", 64))
  arrays, _ = suite.inputs(case, 4, dtype=change.get("dtype", jnp.float32))
  config = triton.TritonConfig(block_k=change.get("block_k", 32), compute_capability=90)
  with pytest.raises(NotImplementedError, match=reason):
    triton.matmul_triton(*arrays, config=config)


@pytest.mark.parametrize("arch", [80, 90])
def test_lowers_for_cuda(arch, triton_installed):
  run, avals = program(cases.REAL["minicpm4_8b_down_m1"], arch)
  text = jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  assert "triton_kernel_call" in text


COMPILED = {
  "m1": cases.REAL["minicpm4_8b_down_m1"],
  "m64": cases.REAL["minicpm4_8b_up_m64"],
  "prefill": cases.REAL["minicpm4_8b_up_m4096"],
  "channel_zero": cases.Case(rows=16, num_in=4096, num_out=4096, group_size=-1, has_zero=True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_cubins_without_spills(name, triton_installed):
  """8B shapes on sm_80 and sm_90; prints registers, spills and shared memory."""
  run, avals = program(COMPILED[name], 90)
  rows = cubin.table(run, *avals)
  assert {row.arch for row in rows} == {80, 90}
  for row in rows:
    assert row.spills == 0, row
    assert row.shared <= (163 if row.arch == 80 else 227) * 1024, row


# --- Bench and device ----------------------------------------------------------------------------


def test_bench_refuses_a_cpu_and_counts_bytes(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["bench"])
  with pytest.raises(SystemExit):
    bench.main()
  assert "no accelerator" in capsys.readouterr().err
  case = cases.Case(rows=1, num_in=4096, num_out=16384)
  flops, size = bench.work(bench.W4A16, case, itemsize=2)
  assert flops == 2 * 4096 * 16384
  # 4.125 bits a weight with bf16 scales (quantization.md section 10), x in, y out.
  assert size == 4096 * 16384 * 4.125 / 8 + 2 * (4096 + 16384)


def test_bench_inputs_and_program_agree_with_the_reference():
  case = cases.Case(rows=2, num_in=256, num_out=32)
  arrays = bench.inputs(bench.W4A16, case, jnp.float32, layers=3)
  found = bench.program(bench.W4A16, 128, "xla")(*arrays)
  x, codes, scale = arrays
  expected = sum(ref.matmul_ref(x, codes[i], scale[i]) for i in range(3))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@NAMES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_matmul_on_the_device(name, dtype):
  suite.check(triton.matmul_triton, cases.TINY[name], 4, dtype=dtype)
