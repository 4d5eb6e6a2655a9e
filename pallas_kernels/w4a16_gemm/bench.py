"""Packed matmuls of MiniCPM4's feed-forward shapes: `python -m pallas_kernels.w4a16_gemm.bench`.

A decode step's matmul takes microseconds, less than starting a program, and its weights would stay
in the cache if run again: one timed call is a scan over LAYERS different kernels, and a row is the
time of one. `x dense` is against the product in the activations' type, timed in the same way; the
bar of quantization.md section 10 is 2.2 at one row of 4096 x 16384 on an H200.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.w4a16_gemm import api, cases, mosaic_gpu, triton

LAYERS = 8


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


def inputs(op: Op, case: cases.Case, dtype, layers: int = LAYERS):
  """(x [M, K], codes [L, K / f, N], scale [L, K / g, N]): normal x and kernels, rounded."""
  keys = jax.random.split(jax.random.key(0), layers + 1)
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

  codes, scale = (jnp.stack(x) for x in zip(*[quantize(k) for k in keys[1:]], strict=True))
  return jax.random.normal(keys[0], (case.rows, K), dtype), codes, scale


def work(op: Op, case: cases.Case, itemsize: int) -> tuple[float, float]:
  """(FLOPs, bytes) of one product: codes, scales of `itemsize` bytes, x in and y out."""
  M, K, N = case.rows, case.num_in, case.num_out
  num_groups = 1 if case.group_size == -1 else K // case.group_size
  size = K * N * op.bits / 8 + itemsize * (num_groups * N + M * (K + N))
  return 2.0 * M * K * N, size


def program(op: Op, group_size: int, implementation: str, config=None):
  """Sum of the products with every layer [M, N]."""

  def run(x_MK, codes_LRN, scale_LQN):
    def step(acc_MN, layer):
      y_MN = op.matmul(
        x_MK, *layer, group_size=group_size, implementation=implementation, config=config
      )
      return acc_MN + y_MN, None

    zero_MN = jnp.zeros((x_MK.shape[0], codes_LRN.shape[2]), x_MK.dtype)
    return jax.lax.scan(step, zero_MN, (codes_LRN, scale_LQN))[0]

  return run


def dense_program(x_MK, w_LKN):
  zero_MN = jnp.zeros((x_MK.shape[0], w_LKN.shape[2]), x_MK.dtype)
  return jax.lax.scan(lambda acc, w_KN: (acc + x_MK @ w_KN, None), zero_MN, w_LKN)[0]


def candidates(implementation: str, rows: int):
  """Of the tuner: Triton's tiles, or those of mosaic_gpu where it is asked for by name."""
  splits = (1, 2, 4, 8) if rows <= 64 else (1,)
  if implementation == "mosaic_gpu":
    for block_n, num_splits, stages in itertools.product((64, 128), splits, (2, 3, 4)):
      yield mosaic_gpu.MosaicGpuConfig(block_n=block_n, num_splits=num_splits, num_stages=stages)
    return
  tall = (16, 32, 64) if rows <= 64 else (64, 128)
  sizes = itertools.product(tall, (32, 64, 128), splits, (4, 8), (2, 3, 4))
  for block_m, block_n, num_splits, warps, stages in sizes:
    if block_m < 2 * rows or block_m == 16 or rows > 64:
      yield triton.TritonConfig(
        block_m=block_m,
        block_n=block_n,
        num_splits=num_splits,
        num_warps=warps,
        num_stages=stages,
      )


def main(op: Op = W4A16, shapes: dict[str, cases.Case] = cases.REAL):
  args = bench.arguments(op.name, shapes)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = shapes[name]
    M, K, N, g = case.rows, case.num_in, case.num_out, case.group_size
    arrays = inputs(op, case, dtype)
    if args.tune:
      tuned, key = "triton", triton.key
      if args.implementation == "mosaic_gpu":
        tuned, key = "mosaic_gpu", mosaic_gpu.key
      best = tune.search(
        candidates(tuned, M),
        lambda c, g=g, arrays=arrays, tuned=tuned: bench.seconds(
          program(op, g, tuned, c), *arrays, repeats=20
        ),
      )
      print(tune.save(op.name, key(M, N, K, g, jnp.dtype(dtype)), best))
    x, codes, scale = arrays
    one = functools.partial(op.matmul, group_size=g)
    found = jax.jit(functools.partial(one, implementation=args.implementation))(
      x, codes[0], scale[0]
    )
    expected = one(x, codes[0], scale[0], implementation="ref")
    error = float(jnp.max(jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))))
    dense = (jax.random.normal(jax.random.key(1), (LAYERS, K, N), dtype) * K**-0.5).astype(dtype)
    dense_time = bench.seconds(dense_program, x, dense, repeats=args.repeats) / LAYERS
    run = program(op, g, args.implementation)
    flops, size = work(op, case, jnp.dtype(dtype).itemsize)
    rows.append(
      bench.Row(
        op=op.name,
        case=name,
        implementation=args.implementation,
        seconds=bench.seconds(run, *arrays, repeats=args.repeats) / LAYERS,
        flops=flops,
        bytes=size,
        dense_seconds=dense_time,
      )
    )
    print(f"{rows[-1].printed()}  max error {error:.1e}", flush=True)
  bench.report(rows, args.json)


if __name__ == "__main__":
  main()
