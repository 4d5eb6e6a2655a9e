"""The Mosaic GPU backends of the low-bit products without a GPU: values, lowering, refusals.

`make mosaic-compile` goes on to machine code; with a Hopper GPU: `-m gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.common import gpu
from pallas_kernels.fp8_gemm import api as fp8_api
from pallas_kernels.fp8_gemm import cases as fp8_cases
from pallas_kernels.fp8_gemm import mgpu_kernels as fp8_kernels
from pallas_kernels.fp8_gemm import mosaic_gpu as fp8
from pallas_kernels.ternary_gemm import api as ternary_api
from pallas_kernels.w4a16_gemm import api as w4a16_api
from pallas_kernels.w4a16_gemm import cases, mosaic_gpu
from pallas_kernels.w4a16_gemm import mgpu_few_kernels as few_kernels
from tests.pallas_kernels import fp8_suite, packed_suite

# --- Values --------------------------------------------------------------------------------------

PACKED = {  # (bits, case, config): two groups and edges; every step another group; splits; stages
  "int4_groups": (4, cases.Case(rows=5, num_in=512, num_out=48, group_size=256), dict()),
  "int4_zero": (
    4,
    cases.Case(rows=3, num_in=384, num_out=40, has_zero=True),
    dict(num_splits=2, num_stages=2, num_warpgroups=1),
  ),
  "int4_channel_zero": (
    4,
    cases.Case(rows=66, num_in=201, num_out=33, group_size=-1, has_zero=True),
    dict(block_n=128),
  ),
  "ternary_channel": (
    2,
    cases.Case(rows=17, num_in=601, num_out=33, group_size=-1),
    dict(num_splits=4, num_stages=2),
  ),
  "ternary_groups": (
    2,
    cases.Case(rows=3, num_in=1536, num_out=40, group_size=256),
    dict(num_warpgroups=4, num_stages=2),
  ),
  "int4_tree": (4, cases.Case(rows=50, num_in=384, num_out=200), dict(num_splits=2, num_stages=2)),
  "int4_blocks": (4, cases.Case(rows=130, num_in=256, num_out=40), dict(num_stages=2)),
}


def packed_backend(config):
  config = mosaic_gpu.MosaicGpuConfig(**config) if config else None
  return functools.partial(mosaic_gpu.matmul_mosaic_gpu, config=config)


@pytest.mark.parametrize("name", PACKED)
def test_packed_matmul_is_the_equation(name):
  bits, case, config = PACKED[name]
  packed_suite.check(packed_backend(config), case, bits)


def test_results_may_be_wider_than_the_inputs(monkeypatch):
  bits, case, _ = PACKED["int4_zero"]
  packed_suite.check_wide(packed_backend({}), case, bits)
  monkeypatch.setattr(mosaic_gpu, "FEW", 0)
  packed_suite.check_wide(packed_backend({}), case, bits)


@pytest.mark.parametrize("name", ["int4_zero", "int4_channel_zero", "ternary_groups"])
def test_packed_matmul_of_many_rows(name, monkeypatch):
  """The kernel of more than FEW rows, at sizes that interpret quickly."""
  monkeypatch.setattr(mosaic_gpu, "FEW", 0)
  monkeypatch.setattr(few_kernels, "matmul", lambda *_, **__: 1 / 0)
  bits, case, config = PACKED[name]
  packed_suite.check(packed_backend(config), case, bits)


def test_four_warpgroups_have_registers_for_16_rows():
  (x, codes, scale, _), _ = packed_suite.inputs(cases.Case(rows=17, num_in=256, num_out=16), 4)
  with pytest.raises(NotImplementedError, match="num_warpgroups = 4, at most 2.*of 24 rows"):
    packed_backend(dict(num_warpgroups=4))(x, codes, scale)


def test_packed_matmul_in_bf16():
  packed_suite.check(
    packed_backend({}), cases.Case(rows=2, num_in=256, num_out=64), 4, jnp.bfloat16
  )


# Several tiles a program, each with several steps; the last group of rows of tiles is lower.
FP8 = {**fp8_cases.TINY, "tall": fp8_cases.Case(rows=300, num_in=256, num_out=130)}


def fp8_backend(config):
  config = fp8.MosaicGpuConfig(**config) if config else None
  return functools.partial(fp8.matmul_mosaic_gpu, config=config)


@pytest.mark.parametrize(
  "name, dtype, config",
  [
    ("tiny_whole", jnp.float8_e4m3fn, None),
    ("tiny_short", jnp.float8_e5m2, None),
    ("tiny_edges", jnp.float8_e4m3fn, dict(block_m=64, block_n=64, consumers=1, num_stages=2)),
    ("tall", jnp.float8_e4m3fn, dict(block_m=128, num_stages=3, group_m=2)),
    ("tall", jnp.float8_e4m3fn, dict(block_m=256, block_n=64, num_stages=2)),
  ],
)
def test_fp8_matmul_is_the_equation(name, dtype, config):
  fp8_suite.check(fp8_backend(config), FP8[name], dtype)


@pytest.mark.parametrize("rows, columns, group", [(5, 3, 2), (4, 7, 4), (3, 2, 8), (1, 5, 1)])
def test_every_tile_has_one_place(rows, columns, group):
  places = [fp8_kernels.place(i, rows, columns, group) for i in range(rows * columns)]
  places = [(int(m), int(n)) for m, n in places]
  assert sorted(places) == [(m, n) for m in range(rows) for n in range(columns)]
  first = min(group, rows)
  assert places[: first + 1] == [(m, 0) for m in range(first)] + [(0, 1)]


def test_named_on_a_cpu_they_are_interpreted_and_have_gradients():
  (x, codes, scale, _), w = packed_suite.inputs(
    cases.Case(rows=2, num_in=256, num_out=16, group_size=-1), 2
  )
  run = functools.partial(ternary_api.matmul, implementation="mosaic_gpu")
  y, pull = jax.vjp(lambda x: run(x, codes, scale), x)
  np.testing.assert_allclose(y, np.asarray(x, np.float64) @ w, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(pull(y)[0], np.asarray(y, np.float64) @ w.T, rtol=1e-4, atol=1e-4)


# --- Programs of real shapes ---------------------------------------------------------------------


def like(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def packed_program(op, rows, num_in, num_out, group_size, *, has_zero=False, dtype=jnp.bfloat16):
  matmul, bits = {"int4": (w4a16_api.matmul, 4), "ternary": (ternary_api.matmul, 2)}[op]
  num_groups = 1 if group_size == -1 else num_in // group_size
  avals = [
    like(rows, num_in, dtype=dtype),
    like(num_in * bits // 8, num_out, dtype=jnp.uint8),
    like(num_groups, num_out, dtype=jnp.float32),
  ]
  if has_zero:
    avals.append(like(num_groups, num_out, dtype=jnp.int8))
  options = dict(group_size=group_size, implementation="mosaic_gpu", interpret=False)
  return functools.partial(matmul, **options), avals


def fp8_program(rows, num_in, num_out, dtype=jnp.float8_e4m3fn):
  avals = [
    like(rows, num_in, dtype=dtype),
    like(rows, num_in // 128, dtype=jnp.float32),
    like(num_in, num_out, dtype=dtype),
    like(num_in // 128, -(-num_out // 128), dtype=jnp.float32),
  ]
  options = dict(out_dtype=jnp.bfloat16, implementation="mosaic_gpu", interpret=False)
  return functools.partial(fp8_api.matmul, **options), avals


PROGRAMS = {
  "int4_decode": lambda: packed_program("int4", 1, 16384, 4096, 128),
  "int4_tree": lambda: packed_program("int4", 64, 4096, 16384, 128),
  "int4_prefill": lambda: packed_program("int4", 4096, 4096, 16384, 128),
  "int4_zero_f16": lambda: packed_program(
    "int4", 16, 4096, 4096, 128, has_zero=True, dtype=jnp.float16
  ),
  "ternary_decode": lambda: packed_program("ternary", 1, 4096, 16384, -1),
  "ternary_few": lambda: packed_program("ternary", 16, 4096, 16384, -1),
  "ternary_prefill": lambda: packed_program("ternary", 512, 4096, 4096, -1),
  "fp8_up": lambda: fp8_program(4096, 4096, 16384),
  "fp8_narrow": lambda: fp8_program(256, 1024, 320, jnp.float8_e5m2),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_lowers_for_cuda(program):
  run, avals = PROGRAMS[program]()
  device = AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
  with use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
    text = jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu_v2") == 1, text[:2000]


# --- Refusals and order --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "program, reason",
  [
    (lambda: packed_program("int4", 2, 256, 64, 64), "w4a16_gemm: .* = 64, .* multiples of 128"),
    (lambda: packed_program("ternary", 2, 512, 64, 128), "ternary_gemm: .* multiples of 256"),
    (
      lambda: packed_program("int4", 2, 256, 64, 128, dtype=jnp.float32),
      "multiplies bfloat16 or float16, found float32",
    ),
  ],
)
def test_calls_that_are_not_served_name_the_reason(program, reason):
  run, avals = program()
  with pytest.raises(NotImplementedError, match=reason):
    jax.eval_shape(run, *avals)


def test_tiles_beyond_shared_memory_are_refused():
  for rows, stages in ((64, 3), (65, 5)):
    run, avals = packed_program("ternary", rows, 512, 64, -1)
    config = mosaic_gpu.MosaicGpuConfig(block_n=128, num_stages=stages)
    reason = f"{stages} stages of 256 x 128 take .* shared memory"
    with pytest.raises(NotImplementedError, match=reason):
      jax.eval_shape(functools.partial(run, config=config), *avals)
  run, avals = fp8_program(64, 256, 128)
  with pytest.raises(NotImplementedError, match="5 stages of 256 x 128 take .* shared memory"):
    config = fp8.MosaicGpuConfig(num_stages=5)
    jax.eval_shape(functools.partial(run, config=config, out_dtype=jnp.float32), *avals)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: mosaic_gpu.MosaicGpuConfig(block_n=96), r"block_n: found 96, expected one of \(64"),
    (lambda: mosaic_gpu.MosaicGpuConfig(num_splits=3), "num_splits: found 3, expected one of"),
    (lambda: mosaic_gpu.MosaicGpuConfig(num_stages=1), "num_stages: found 1, expected one of"),
    (lambda: fp8.MosaicGpuConfig(block_n=256), r"block_n: found 256, expected one of \(64, 128"),
    (lambda: fp8.MosaicGpuConfig(num_stages=1), r"num_stages: found 1, expected one of \(2, 3"),
    (lambda: fp8.MosaicGpuConfig(consumers=3), r"consumers: found 3, expected one of \(1, 2"),
    (lambda: fp8.MosaicGpuConfig(block_m=64), "block_m: found 64 for 2 consumers, expected 64 or"),
    (lambda: fp8.MosaicGpuConfig(group_m=0), "group_m: found 0, expected at least 1"),
  ],
)
def test_bad_configs_name_the_field(make, message):
  with pytest.raises(ValueError, match=f"MosaicGpuConfig.{message}"):
    make()


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0"])
def test_auto_takes_mosaic_on_hopper_alone_and_triton_where_it_serves(capability, monkeypatch):
  """Of two rows (one: `matvec`). FP8 on an A100: neither."""
  pytest.importorskip("jax_triton", reason="jax-triton needs jax's CUDA plugin (make test)")
  called = []

  def record(name, shape):
    called.append(name)
    return jnp.zeros(shape, jnp.bfloat16)

  device = type("Device", (), dict(compute_capability=capability, device_kind="GPU"))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  monkeypatch.setattr(gpu, "launch", lambda *_, out_shape, **__: record("triton", out_shape.shape))
  monkeypatch.setattr(few_kernels, "matmul", lambda *_, **__: record("mosaic_gpu", (1, 8, 128)))
  monkeypatch.setattr(fp8_kernels, "matmul", lambda *_, **__: record("mosaic_gpu", (64, 64)))
  for op, program in (
    (w4a16_api, packed_program("int4", 2, 256, 64, 128)),
    (fp8_api, fp8_program(64, 128, 64)),
  ):
    options = {k: v for k, v in program[0].keywords.items() if k in ("group_size", "out_dtype")}
    jax.eval_shape(functools.partial(op.matmul, **options), *program[1])
  first = "mosaic_gpu" if capability == "9.0" else "triton"
  assert called == ([first] if capability == "8.0" else [first, first])


# --- On a Hopper GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_packed_matmul_on_the_device(name, dtype):
  bits, case, config = PACKED[name]
  packed_suite.check(packed_backend(config), case, bits, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 40, 64])
@pytest.mark.parametrize(
  "bits, group_size, has_zero", [(4, 128, False), (4, 128, True), (2, -1, 0)]
)
def test_few_rows_on_the_device(rows, bits, group_size, has_zero):
  """The heuristic's warpgroups and splits."""
  sizes = dict(num_in=4096, num_out=1024, group_size=group_size, has_zero=bool(has_zero))
  case = cases.Case(rows=rows, **sizes)
  packed_suite.check(packed_backend({}), case, bits, jnp.bfloat16)


DEVICE_TILES = {
  "default": None,
  "256": dict(num_stages=3),
  "128": dict(block_m=128, num_stages=5, group_m=2),
  "128x64": dict(block_m=128, block_n=64, num_stages=3),
  "one_consumer": dict(block_m=128, consumers=1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", DEVICE_TILES)
def test_fp8_tiles_on_the_device(tiles):
  """More tiles than multiprocessors, an edge in every dimension."""
  case = fp8_cases.Case(rows=2100, num_in=1000, num_out=2200)
  config = DEVICE_TILES[tiles]
  config = None if config is None else fp8.MosaicGpuConfig(**config)
  backend = functools.partial(fp8.matmul_mosaic_gpu, config=config)
  fp8_suite.check(backend, case, tolerance=1e-3)
  if config is None:
    fp8_suite.check(backend, case, out_dtype=jnp.bfloat16, tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", fp8_cases.TINY)
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3", "e5m2"])
def test_fp8_matmul_on_the_device(name, dtype):
  """Hopper's tensor cores keep about 14 bits of the sum of a block's products."""
  fp8_suite.check(fp8.matmul_mosaic_gpu, fp8_cases.TINY[name], dtype, tolerance=1e-3)
