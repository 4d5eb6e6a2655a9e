"""w4a16_gemm and ternary_gemm against float64 products of codes that numpy packed one by one."""

import dataclasses
import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.quant import qtensor
from pallas_kernels.ternary_gemm import api as ternary_api
from pallas_kernels.ternary_gemm import bench as ternary_bench
from pallas_kernels.ternary_gemm import cases as ternary_cases
from pallas_kernels.w4a16_gemm import api, bench, cases, matvec, mosaic_gpu, ref, triton, vjp, xla
from tests.pallas_kernels import packed_suite as suite
from tests.pallas_kernels import triton_cubin as cubin
from tests.pallas_kernels import triton_host as host


@dataclasses.dataclass(frozen=True)
class Op:
  matmul: Callable
  bits: int
  scheme: str  # of QTensor
  tiny: dict
  bench: bench.Op


OPS = {
  "w4a16_gemm": Op(api.matmul, 4, "int4", cases.TINY, bench.W4A16),
  "ternary_gemm": Op(ternary_api.matmul, 2, "ternary", ternary_cases.TINY, ternary_bench.TERNARY),
}
EACH = pytest.mark.parametrize("name", OPS)
TINY = pytest.mark.parametrize("name, case", [(op, case) for op in OPS for case in OPS[op].tiny])


@TINY
@pytest.mark.parametrize("backend", [ref.matmul_ref, xla.matmul_xla], ids=["ref", "xla"])
def test_matmul_is_the_equation(backend, name, case):
  suite.check(backend, OPS[name].tiny[case], OPS[name].bits)


@pytest.mark.parametrize("case", cases.TINY)
def test_bf16_errs_no_more_than_a_bf16_product(case):
  suite.check(xla.matmul_xla, cases.TINY[case], 4, dtype=jnp.bfloat16)


@pytest.mark.parametrize("case", ["tiny_groups", "tiny_channel_zero"])
def test_the_form_for_gpus_has_the_same_values_and_gradients(case, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  suite.check(xla.matmul_xla, cases.TINY[case], 4)
  (x, *rest), w = suite.inputs(cases.TINY[case], 4)
  dy = jnp.ones((x.shape[0], w.shape[1]))
  dx = jax.vjp(lambda x: xla.matmul_xla(x, *rest), x)[1](dy)[0]
  np.testing.assert_allclose(dx, np.asarray(dy, np.float64) @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [ref.matmul_ref, xla.matmul_xla], ids=["ref", "xla"])
def test_results_may_be_wider_than_the_inputs(backend):
  found = suite.check_wide(backend, cases.TINY["tiny_channel"], 4)
  assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))
  (x, codes, scale, _), w = suite.inputs(cases.TINY["tiny_channel"], 4, jnp.bfloat16)
  options = dict(group_size=-1, implementation="xla", out_dtype=jnp.float32)
  y, pull = jax.vjp(lambda x: api.matmul(x, codes, scale, **options), x)
  assert y.dtype == jnp.float32 and pull(y)[0].dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="out_dtype: found int32, expected floats"):
    api.matmul(x, codes, scale, group_size=-1, out_dtype=jnp.int32)


def test_groups_that_share_bytes():
  case = cases.Case(rows=2, num_in=21, num_out=6, group_size=7, has_zero=True)
  suite.check(xla.matmul_xla, case, 4)


@pytest.mark.parametrize("rows, dtype", [(1, "bfloat16"), (2, "bfloat16"), (1, "float32")])
def test_auto_gives_one_row_in_16_bits_to_triton(rows, dtype, monkeypatch):
  called = []

  def record(name):
    def run(*_, **__):
      called.append(name)
      raise NotImplementedError(name)

    return run

  arrays, _ = suite.inputs(cases.Case(rows=rows, num_in=512, num_out=64), 4, jnp.dtype(dtype))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(triton, "matmul_triton", record("triton"))
  monkeypatch.setattr(mosaic_gpu, "matmul_mosaic_gpu", record("mosaic_gpu"))
  api.matmul(*arrays, group_size=128)
  order = ["triton", "mosaic_gpu"]
  assert called == (order if (rows, dtype) == (1, "bfloat16") else order[::-1])


def test_auto_multiplies_many_rows_by_a_float_copy(monkeypatch):
  """As the dense product does it: the kernels would unpack every code again for each 64 rows."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(mosaic_gpu, "matmul_mosaic_gpu", lambda *_, **__: 1 / 0)
  case = cases.Case(rows=mosaic_gpu.FEW + 1, num_in=128, num_out=8)
  (x, *rest), w = suite.inputs(case, 4)
  found = api.matmul(x, *rest, group_size=128)
  np.testing.assert_allclose(found, np.asarray(x, np.float64) @ w, rtol=1e-5, atol=1e-5)
  with pytest.raises(ZeroDivisionError):
    api.matmul(x[:-1], *rest, group_size=128)


def test_no_rows():
  codes, scale = jnp.zeros((16, 8), jnp.uint8), jnp.ones((1, 8))
  assert api.matmul(jnp.zeros((0, 32)), codes, scale, group_size=-1).shape == (0, 8)


def test_a_product_of_integers_is_exact_and_the_scale_comes_after_it():
  """0.1 and 0.3 are no floats: s * (x @ T) rounds once, (s T) summed would round at every term."""
  rng = np.random.default_rng(0)
  codes = rng.integers(-1, 2, (300, 16))
  x = rng.integers(-9, 10, (4, 300)).astype(np.float32)
  scale = np.where(np.arange(16) % 2, 0.1, 0.3).astype(np.float32)
  found = ternary_api.matmul(
    jnp.asarray(x), jnp.asarray(suite.pack(codes, 2)), jnp.asarray(scale)[None], group_size=-1
  )
  assert np.array_equal(found, (x.astype(np.int64) @ codes).astype(np.float32) * scale)


@EACH
@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_layout_is_that_of_qtensor(group_size, name):
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(96, 24)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(3, 96)), jnp.float32)
  qt = qtensor.pack(qtensor.quantize(kernel, OPS[name].scheme, group_size))
  found = OPS[name].matmul(x, qt.codes, qt.scale, group_size=group_size)
  expected = np.asarray(x, np.float64) @ np.asarray(qtensor.dequantize(qt), np.float64)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["tiny_zero", "tiny_channel_zero"])
def test_gradients_of_a_backend_without_its_own(case):
  """y = x W: dx = dy W^T, dscale of a group = sum of x_k dy (code - zero); in float64."""
  (x, codes, scale, zero), w = suite.inputs(cases.TINY[case], 4)
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


# --- Refusals ------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(
  "change, error, reason",
  [
    (dict(x=jnp.zeros((2, 3, 64))), ValueError, r"x: found float32\[2, 3, 64\], expected floats"),
    (dict(x=jnp.zeros((2, 68))), ValueError, r"codes: found uint8\[(\d+), 8\], expected uint8\["),
    (dict(codes=jnp.zeros((32, 8), jnp.int8)), ValueError, "codes: found int8"),
    (dict(group_size=48), ValueError, "group_size: found 48, expected -1 or a divisor of 64"),
    (dict(scale=jnp.zeros((1, 8))), ValueError, r"scale: found .*expected floats \[2, 8\]"),
    (dict(implementation="mosaic_tpu"), NotImplementedError, "no 'mosaic_tpu', expected auto or"),
  ],
)
def test_bad_calls_name_what_was_found(change, error, reason, name):
  x, codes = jnp.zeros((2, 64)), jnp.zeros((64 * OPS[name].bits // 8, 8), jnp.uint8)
  arrays = dict(x=x, codes=codes, scale=jnp.ones((2, 8)))
  arrays |= {key: change[key] for key in arrays if key in change}
  options = {key: change[key] for key in change if key not in arrays}
  with pytest.raises(error, match=f"{name}: {reason}"):
    OPS[name].matmul(*arrays.values(), **{"group_size": 32, **options})


def test_zero_points_of_another_type_are_refused():
  with pytest.raises(ValueError, match=r"zero: found float32.*expected int8\[2, 8\]"):
    api.matmul(
      *(jnp.zeros((2, 64)), jnp.zeros((32, 8), jnp.uint8), jnp.ones((2, 8)), jnp.zeros((2, 8))),
      group_size=32,
    )


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


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(num_warps=12), "MatvecConfig.num_warps: found 12, expected a power of two, at least 1"),
    (dict(num_warps=64), "MatvecConfig.num_warps: found 64, expected at most 32"),
    (dict(num_splits=0), "MatvecConfig.num_splits: found 0, expected at least 1"),
    (dict(unroll=3), "MatvecConfig.unroll: found 3, expected a power of two, at least 1"),
  ],
)
def test_bad_shares_of_a_row_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    matvec.MatvecConfig(**change)


@pytest.mark.parametrize("bits, group_size", [(4, 128), (2, -1)])
@pytest.mark.parametrize("case", [case for case in cases.REAL if case.endswith("_m1")])
def test_rows_of_real_shapes_are_served_by_whole_warps(case, bits, group_size):
  K, N = cases.REAL[case].num_in, cases.REAL[case].num_out
  config = matvec.default_config(K, N, group_size, bits)
  part, rows = config.part(K, N, group_size, bits), K * bits // 8
  assert rows % (config.num_splits * config.num_warps * part) == 0 and part % 8 == 0
  assert group_size == -1 or group_size * bits // 8 % part == 0
  assert matvec.default_config(K + 8, N, -1, bits) is None
  assert matvec.default_config(K, N + 8, -1, bits) is None


def test_tiles_beyond_shared_memory_are_refused():
  with pytest.raises(ValueError, match="expected at most 232448"):
    triton.TritonConfig(block_m=128, block_n=256, block_k=256)


# --- Triton without a GPU ------------------------------------------------------------------------


def test_values_in_the_interpreter():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  host.run_in_process("tests/pallas_kernels/interpreted_packed.py", "packed")


@pytest.mark.parametrize(
  "name, change, reason",
  [
    ("w4a16_gemm", dict(rows=0), "no rows, triton serves 1 and more"),
    ("w4a16_gemm", dict(group_size=48), "group_size = 48, expected -1 or a multiple of 32"),
    ("w4a16_gemm", dict(block_k=128), "group_size = 64, expected a multiple of block_k = 128"),
    ("w4a16_gemm", dict(dtype=jnp.float8_e4m3fn), "expected one of"),
    ("ternary_gemm", dict(group_size=32), "group_size = 32, expected -1 or a multiple of 64"),
  ],
)
def test_calls_that_triton_does_not_serve(name, change, reason, triton_installed):
  group_size = change.get("group_size", 64)
  case = cases.Case(rows=change.get("rows", 2), num_in=192, num_out=16, group_size=group_size)
  arrays, _ = suite.inputs(case, OPS[name].bits, dtype=change.get("dtype", jnp.float32))
  config = triton.TritonConfig(block_k=change.get("block_k", 32), compute_capability=90)
  options = dict(group_size=group_size, implementation="triton", config=config)
  with pytest.raises(NotImplementedError, match=f"{name}: .*{reason}"):
    OPS[name].matmul(*arrays[:3], **options)


COMPILED = {
  "int4_m1": ("w4a16_gemm", cases.REAL["minicpm4_8b_down_m1"]),
  "int4_m64": ("w4a16_gemm", cases.REAL["minicpm4_8b_up_m64"]),
  "int4_prefill": ("w4a16_gemm", cases.REAL["minicpm4_8b_up_m4096"]),
  "int4_channel_zero": (
    "w4a16_gemm",
    cases.Case(rows=16, num_in=4096, num_out=4096, group_size=-1, has_zero=True),
  ),
  "ternary_m1": ("ternary_gemm", ternary_cases.REAL["minicpm4_8b_down_m1"]),
  "ternary_prefill": ("ternary_gemm", ternary_cases.REAL["minicpm4_8b_up_m4096"]),
}


def program(name, arch):
  """The call with the tiles of the heuristic: fresh, as traces are cached by function and
  `cubin.table` must see the launches; and its abstract arrays."""
  op, case = OPS[COMPILED[name][0]], COMPILED[name][1]
  M, K, N, g = case.rows, case.num_in, case.num_out, case.group_size
  config = matvec.default_config(K, N, g, op.bits) if M == 1 else triton.default_config(M, N, K, g)
  config = dataclasses.replace(config, compute_capability=arch)
  num_groups = 1 if g == -1 else K // g
  avals = [
    jax.ShapeDtypeStruct((M, K), jnp.bfloat16),
    jax.ShapeDtypeStruct((K * op.bits // 8, N), jnp.uint8),
    jax.ShapeDtypeStruct((num_groups, N), jnp.bfloat16 if op.bits == 4 else jnp.float32),
  ]
  if case.has_zero:
    avals.append(jax.ShapeDtypeStruct((num_groups, N), jnp.int8))
  options = dict(group_size=g, implementation="triton", config=config)
  return functools.partial(op.matmul, **options), avals


@pytest.mark.parametrize("name, arch", [("int4_m1", 80), ("int4_m1", 90), ("ternary_m1", 90)])
def test_lowers_for_cuda(name, arch, triton_installed):
  run, avals = program(name, arch)
  text = jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  (call,) = [line for line in text.splitlines() if "@triton_kernel_call" in line]
  # XLA records typed FFI calls into CUDA graphs, and no others.
  assert "@triton_kernel_call_ffi" in call and "opaque = " in call
  assert "api_version = 4" in call or "mhlo.backend_config = {" in call  # the latter: 0.12


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_cubins_without_spills(name, triton_installed):
  """8B shapes on sm_80 and sm_90; prints registers, spills and shared memory."""
  run, avals = program(name, 90)
  rows = cubin.table(run, *avals)
  assert {row.arch for row in rows} == {80, 90}
  for row in rows:
    assert row.spills == 0 and row.products, row
    assert row.shared <= (163 if row.arch == 80 else 227) * 1024, row


# --- Bench and device ----------------------------------------------------------------------------


def test_bench_refuses_a_cpu(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["bench"])
  with pytest.raises(SystemExit):
    bench.main()
  assert "no accelerator" in capsys.readouterr().err


def test_bench_counts_bytes():
  case = cases.Case(rows=1, num_in=4096, num_out=16384)
  flops, size = bench.work(bench.W4A16, case, itemsize=2)
  assert flops == 2 * 4096 * 16384
  # 4.125 bits a weight with bf16 scales (quantization.md section 10), x in, y out.
  assert size == 4096 * 16384 * 4.125 / 8 + 2 * (4096 + 16384)
  case = cases.Case(rows=2, num_in=256, num_out=32, group_size=-1)
  _, size = bench.work(ternary_bench.TERNARY, case, itemsize=2)
  assert size == 256 * 32 / 4 + 2 * 32 + 2 * 2 * (256 + 32)


@EACH
def test_bench_inputs_and_program_agree_with_the_reference(name):
  op, case = OPS[name].bench, cases.Case(rows=2, num_in=256, num_out=32)
  layers = bench.inputs(op, case, jnp.float32, layers=3)
  found = bench.program(op, 128, "xla")(layers)
  assert len(found) == 3 and not np.array_equal(found[0], found[1])
  for y, layer in zip(found, layers, strict=True):
    expected = ref.matmul_ref(*layer, bits=op.bits, low=op.low)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(
  "name, group_size, has_zero",
  [(n, g, False) for n in OPS for g in (128, -1)] + [("w4a16_gemm", 128, True)],
)
def test_one_row_on_the_device(group_size, has_zero, name, dtype):
  size = dict(group_size=group_size, has_zero=has_zero)
  case = cases.Case(rows=1, num_in=4096, num_out=1024, **size)
  suite.check(triton.matmul_triton, case, OPS[name].bits, dtype=dtype)


@pytest.mark.gpu
@TINY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_matmul_on_the_device(name, case, dtype):
  suite.check(triton.matmul_triton, OPS[name].tiny[case], OPS[name].bits, dtype=dtype)
