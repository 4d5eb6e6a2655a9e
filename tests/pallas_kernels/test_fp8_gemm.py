"""The block-scaled FP8 product against a float64 sum over blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import gpu
from pallas_kernels.fp8_gemm import api, bench, cases, ref, triton, xla
from tests.pallas_kernels import fp8_suite as suite
from tests.pallas_kernels import triton_cubin as cubin
from tests.pallas_kernels import triton_host as host

NAMES = pytest.mark.parametrize("name", cases.TINY)
TYPES = pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3", "e5m2"])


@NAMES
@TYPES
@pytest.mark.parametrize("backend", [ref.matmul_ref, xla.matmul_xla], ids=["ref", "xla"])
def test_matmul_is_the_equation(backend, name, dtype):
  suite.check(backend, cases.TINY[name], dtype)


def test_output_in_bf16_is_rounded_once():
  case = cases.TINY["tiny_edges"]
  arrays = [jnp.asarray(a) for a in suite.inputs(case)]
  found = api.matmul(*arrays, out_dtype=jnp.bfloat16)
  np.testing.assert_array_equal(found, api.matmul(*arrays).astype(jnp.bfloat16))


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "change, error, reason",
  [
    (dict(x=jnp.zeros((2, 200))), ValueError, r"x: found float32\[2, 200\], expected float8"),
    (dict(w=jnp.zeros((199, 130), jnp.float8_e4m3fn)), ValueError, r"w: .*float8_e4m3fn\[200, N\]"),
    (dict(w=jnp.zeros((200, 130), jnp.float8_e5m2)), ValueError, "w: found float8_e5m2"),
    (dict(xs=jnp.ones((2, 1))), ValueError, r"x scale: found .*expected float32\[2, 2\]"),
    (dict(ws=jnp.ones((2, 2), jnp.bfloat16)), ValueError, r"w scale: .*expected float32\[2, 2\]"),
    (dict(implementation="mosaic_tpu"), NotImplementedError, "no 'mosaic_tpu'"),
    (
      dict(x=jnp.zeros((0, 200), jnp.float8_e4m3fn), xs=jnp.ones((0, 2)), implementation="triton"),
      NotImplementedError,
      "no rows, triton serves 1 and more",
    ),
  ],
)
def test_bad_calls_name_what_was_found(change, error, reason):
  arrays = dict(
    x=jnp.zeros((2, 200), jnp.float8_e4m3fn),
    xs=jnp.ones((2, 2)),
    w=jnp.zeros((200, 130), jnp.float8_e4m3fn),
    ws=jnp.ones((2, 2)),
  )
  arrays |= {name: change.pop(name) for name in arrays if name in change}
  with pytest.raises(error, match=reason):
    api.matmul(*arrays.values(), **change)


def test_a_device_without_fp8_tensor_cores_is_refused_and_auto_takes_xla(monkeypatch):
  """An A100: named, the reason; auto, what ref and xla compute."""
  device = type("A100", (), dict(compute_capability="8.0", device_kind="NVIDIA A100"))()
  arrays = [jnp.asarray(a) for a in suite.inputs(cases.TINY["tiny_edges"])]
  expected = api.matmul(*arrays, implementation="xla")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(gpu.jax, "devices", lambda: [device])
  reason = r"capability 8\.9, found 8\.0 \(no FP8 tensor cores before it\)"
  with pytest.raises(NotImplementedError, match=reason):
    api.matmul(*arrays, implementation="triton")
  np.testing.assert_array_equal(api.matmul(*arrays), expected)
  with pytest.raises(NotImplementedError, match=reason):
    config = triton.TritonConfig(compute_capability=80)
    api.matmul(*arrays, implementation="triton", config=config)


def test_triton_on_a_cpu_is_refused_with_the_reason():
  if jax.default_backend() == "gpu":
    pytest.skip("this machine has a GPU")
  arrays = [jnp.asarray(a) for a in suite.inputs(cases.TINY["tiny_edges"])]
  with pytest.raises(NotImplementedError, match="needs a CUDA device"):
    api.matmul(*arrays, implementation="triton")


@pytest.mark.parametrize(
  "field, value", [("block_n", 48), ("block_n", 256), ("block_m", 8), ("num_stages", 0)]
)
def test_bad_tiles_are_refused(field, value):
  with pytest.raises(ValueError, match=f"TritonConfig.{field}: found {value}"):
    triton.TritonConfig(**{field: value})


def test_tiles_beyond_shared_memory_are_refused():
  with pytest.raises(ValueError, match="expected at most 232448"):
    triton.TritonConfig(block_m=256, block_n=128, num_stages=5)


# --- Triton without a GPU ------------------------------------------------------------------------


def test_values_in_the_interpreter():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  host.run_in_process("tests/pallas_kernels/interpreted_fp8.py", "fp8")


def program(case, arch):
  """The call of a case with the tiles of the heuristic, as a function of abstract arrays."""
  M, K, N = case.rows, case.num_in, case.num_out
  Q, P = -(-K // 128), -(-N // 128)
  config = dataclasses.replace(triton.default_config(M, N), compute_capability=arch)
  avals = [
    jax.ShapeDtypeStruct((M, K), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((M, Q), jnp.float32),
    jax.ShapeDtypeStruct((K, N), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((Q, P), jnp.float32),
  ]
  call = functools.partial(triton.matmul_triton, out_dtype=jnp.bfloat16, config=config)
  return call, avals


@pytest.mark.parametrize("arch", [89, 90])
def test_lowers_for_cuda(arch, triton_installed):
  run, avals = program(cases.REAL["minicpm4_8b_up_m4096"], arch)
  text = jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  assert "triton_kernel_call" in text


COMPILED = {
  "prefill": cases.REAL["minicpm4_8b_up_m4096"],
  "edges": cases.Case(rows=40, num_in=1000, num_out=1000),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_cubins_without_spills(name, triton_installed):
  """sm_89 and sm_90; prints registers, spills and shared memory."""
  run, avals = program(COMPILED[name], 90)
  rows = cubin.table(run, *avals, archs=(89, 90))
  assert {row.arch for row in rows} == {89, 90}
  for row in rows:
    assert row.spills == 0, row
    assert row.shared <= (99 if row.arch == 89 else 227) * 1024, row
    assert len(row.products) == 1 and row.products[0].endswith(("e4m3.e4m3", "e4m3.e4m3.f32")), row


# --- Bench and device ----------------------------------------------------------------------------


def test_bench_inputs_are_codes_of_its_plain_values():
  case = cases.Case(rows=6, num_in=256, num_out=384)
  (xq, xs, wq, ws), (x, w) = bench.inputs(case, jnp.float32)
  y = suite.product(*map(np.asarray, (xq, xs, wq, ws)))
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  assert np.linalg.norm(y - exact) < 0.045 * np.linalg.norm(exact)  # 3.7% (quantization.md 9)
  flops, size = bench.work(case, itemsize=2)
  assert flops == 2 * 6 * 256 * 384
  assert size == 6 * 256 + 256 * 384 + 4 * (6 * 2 + 2 * 3) + 2 * 6 * 384


@pytest.mark.gpu
@NAMES
@TYPES
def test_matmul_on_the_device(name, dtype):
  """Hopper's tensor cores keep about 14 bits of the sum of a block's products."""
  suite.check(triton.matmul_triton, cases.TINY[name], dtype, tolerance=1e-3)
