"""Packed matmuls of MiniCPM4's feed-forward shapes: `python -m pallas_kernels.w4a16_gemm.bench`.

A decode step's matmul takes microseconds, less than starting a program, and its weights would stay
in the cache if run again: one timed call is the products of many layers, each with arrays of its
own as a model has them, and a row is the time of one. `x dense` is against the product in the
activations' type, timed in the same way; the bar of quantization.md section 10 is 2.2 at one row of
4096 x 16384 on an H200.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.w4a16_gemm import api, cases, matvec, mosaic_gpu, triton

LEAST_BYTES = 2**28  # of the codes of all layers: several times a cache
MAX_LAYERS = 64


def num_layers(op, case: cases.Case) -> int:
  """Of a timed call; two where the rows make a product long."""
  if case.rows > 64:
    return 2
  size = case.num_in * case.num_out * op.bits // 8
  return min(MAX_LAYERS, max(4, -(-LEAST_BYTES // size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
  """A packed matmul: its function, and how a group of a kernel becomes codes of `bits` bits."""

  name: str
  matmul: Callable
  bits: int
  low: int
  high: int
  scale_of: Callable  # of |W|, over axis 1


W4A16 = Op(
  name="w4a16_gemm",
  matmul=api.matmul,
  bits=4,
  low=-8,
  high=7,
  scale_of=lambda size: jnp.max(size, axis=1, keepdims=True) / 7.5,
)


def inputs(op: Op, case: cases.Case, dtype, layers: int):
  """Of every layer (x [M, K], codes [K / f, N], scale [K / g, N]): normal, kernels rounded."""
  keys = jax.random.split(jax.random.key(0), (layers, 2))
  K, N, per_byte = case.num_in, case.num_out, 8 // op.bits
  g = K if case.group_size == -1 else case.group_size

  @jax.jit
  def quantize(key):
    w_QgN = jax.random.normal(key, (K // g, g, N)) * K**-0.5
    scale_Q1N = op.scale_of(jnp.abs(w_QgN)).astype(dtype)
    ratio_QgN = jnp.round(w_QgN / scale_Q1N.astype(jnp.float32))
    codes_QgN = (jnp.clip(ratio_QgN, op.low, op.high) - op.low).astype(jnp.uint8)
    codes_KN = codes_QgN.reshape(K, N)
    packed = [codes_KN[j::per_byte] << (op.bits * j) for j in range(per_byte)]
    return functools.reduce(jnp.bitwise_or, packed), scale_Q1N[:, 0]

  return [(jax.random.normal(k[0], (case.rows, K), dtype), *quantize(k[1])) for k in keys]


def work(op: Op, case: cases.Case, itemsize: int) -> tuple[float, float]:
  """(FLOPs, bytes) of one product: codes, scales of `itemsize` bytes, x in and y out."""
  M, K, N = case.rows, case.num_in, case.num_out
  num_groups = 1 if case.group_size == -1 else K // case.group_size
  size = K * N * op.bits / 8 + itemsize * (num_groups * N + M * (K + N))
  return 2.0 * M * K * N, size


def program(op: Op, group_size: int, implementation: str, config=None):
  """Function of the layers' arrays: every layer's product [M, N]."""
  options = dict(group_size=group_size, implementation=implementation, config=config)
  one = jax.jit(functools.partial(op.matmul, **options))
  return lambda layers: [one(*layer) for layer in layers]


def dense_program(layers):
  return [x_MK @ w_KN for x_MK, w_KN in layers]


def candidates(implementation: str, case: cases.Case, bits: int):
  """Of the tuner: the heuristic's choice, then Triton's tiles, or those of mosaic_gpu where it is
  asked for by name."""
  rows, K, N = case.rows, case.num_in, case.num_out
  if implementation == "mosaic_gpu":
    base = mosaic_gpu.default_config(rows, N, K, 128 if bits == 4 else 256)
    yield base
    if rows > mosaic_gpu.FEW:
      tiles = [dict(block_n=n, num_stages=stages) for n in (64, 128) for stages in (2, 3)]
    else:
      shares = ((4, 3, 1), (4, 2, 1), (4, 4, 1), (2, 4, 2), (2, 6, 1), (1, 4, 4))
      if rows > 16:
        shares = ((2, 3, 1), (2, 2, 1), (2, 2, 2), (1, 3, 2), (1, 3, 4))
      names = ("num_warpgroups", "num_stages", "num_splits")
      tiles = [dict(zip(names, share, strict=True)) for share in shares]
    for tile in tiles:
      if (config := mosaic_gpu.MosaicGpuConfig(**tile)) != base:
        yield config
  elif rows == 1 and (base := matvec.default_config(K, N, case.group_size, bits)):
    yield base
    for num_warps, more, unroll in (
      (16, 1, 2),
      (16, 1, 8),
      (8, 1, 4),
      (8, 1, 8),
      (8, 2, 8),
      (4, 2, 8),
    ):
      config = matvec.MatvecConfig(
        num_warps=num_warps, num_splits=more * base.num_splits, unroll=unroll
      )
      if config != base and config.part(K, N, case.group_size, bits) is not None:
        yield config
  elif rows <= 64:
    block_m = max(16, rows)
    for block_n, num_splits, warps, stages in (
      (64, 1, 4, 4),
      (64, 2, 4, 4),
      (128, 2, 4, 4),
      (128, 4, 4, 3),
      (32, 1, 4, 4),
      (128, 2, 8, 4),
    ):
      sizes = dict(block_m=block_m, block_n=block_n, num_splits=num_splits)
      yield triton.TritonConfig(**sizes, num_warps=warps, num_stages=stages)
  else:
    for block_m, block_n, warps, stages in ((64, 128, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3)):
      sizes = dict(block_m=block_m, block_n=block_n)
      yield triton.TritonConfig(**sizes, num_warps=warps, num_stages=stages)


def main(
  argv: Sequence[str] | None = None,
  op: Op = W4A16,
  shapes: dict[str, cases.Case] = cases.REAL,
) -> list[bench.Row]:
  args = bench.arguments(op.name, shapes, argv)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = shapes[name]
    M, K, N, g = case.rows, case.num_in, case.num_out, case.group_size
    L = num_layers(op, case)
    layers = inputs(op, case, dtype, L)
    if args.tune:
      tuned, key = "triton", triton.key(M, N, K, g, jnp.dtype(dtype))
      if args.implementation == "mosaic_gpu":
        tuned, key = "mosaic_gpu", mosaic_gpu.key(M, N, K, g, jnp.dtype(dtype))
      elif M == 1:
        key = matvec.key(K, N, g, jnp.dtype(dtype))
      best = tune.search(
        candidates(tuned, case, op.bits),
        lambda c, g=g, layers=layers, tuned=tuned, L=L: (
          bench.seconds(program(op, g, tuned, c), layers, repeats=3) / L
        ),
      )
      print(tune.save(op.name, key, best))
    run = program(op, g, args.implementation)
    found = jax.jit(run)(layers[:1])[0]
    expected = jax.jit(program(op, g, "ref"))(layers[:1])[0]
    error = float(jnp.max(jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))))
    draw = jax.jit(lambda key, K=K, N=N: jax.random.normal(key, (K, N), dtype) * K**-0.5)
    keys = jax.random.split(jax.random.key(1), L)
    dense = [(x, draw(k).astype(dtype)) for k, (x, *_) in zip(keys, layers, strict=True)]
    dense_time = bench.seconds(dense_program, dense, repeats=args.repeats) / L
    del dense
    flops, size = work(op, case, jnp.dtype(dtype).itemsize)
    rows.append(
      bench.Row(
        op=op.name,
        case=name,
        implementation=args.implementation,
        seconds=bench.seconds(run, layers, repeats=args.repeats) / L,
        flops=flops,
        bytes=size,
        dense_seconds=dense_time,
      )
    )
    print(f"{rows[-1].printed()}  max error {error:.1e}", flush=True)
  bench.report(rows, args.json)
  return rows


if __name__ == "__main__":
  main()
