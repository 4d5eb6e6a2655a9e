"""Packed matmuls of MiniCPM4's feed-forward shapes: `python -m pallas_kernels.w4a16_gemm.bench`.

A decode step's matmul takes microseconds, less than starting a program, and its weights would stay
in the cache if run again: one timed call is a scan over LAYERS different kernels, and a row is the
time of one. `x dense` is against the product in the activations' type, timed in the same way; the
bar of quantization.md section 10 is 2.2 at one row of 4096 x 16384 on an H200.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.w4a16_gemm import api, cases, ref, triton

LAYERS = 8


def inputs(case: cases.Case, dtype, layers: int = LAYERS):
  """(x [M, K], codes [L, K / 2, N], scale [L, K / g, N]): normal x and kernels, rounded."""
  keys = jax.random.split(jax.random.key(0), layers + 1)
  K, N, g = case.num_in, case.num_out, case.group_size

  @jax.jit
  def quantize(key):
    w_QgN = jax.random.normal(key, (K // g, g, N)) * K**-0.5
    scale_Q1N = (jnp.max(jnp.abs(w_QgN), axis=1, keepdims=True) / 7.5).astype(dtype)
    ratio_QgN = w_QgN / scale_Q1N.astype(jnp.float32)
    codes_KN = (jnp.clip(jnp.round(ratio_QgN), -8, 7) + 8).astype(jnp.uint8).reshape(K, N)
    return codes_KN[0::2] | (codes_KN[1::2] << 4), scale_Q1N[:, 0]

  codes, scale = (jnp.stack(x) for x in zip(*[quantize(k) for k in keys[1:]], strict=True))
  return jax.random.normal(keys[0], (case.rows, K), dtype), codes, scale


def work(case: cases.Case, itemsize: int) -> tuple[float, float]:
  """(FLOPs, bytes) of one product: codes, scales of `itemsize` bytes, x in and y out."""
  M, K, N = case.rows, case.num_in, case.num_out
  size = K * N / 2 + itemsize * (K // case.group_size * N + M * (K + N))
  return 2.0 * M * K * N, size


def program(implementation: str, config=None, group_size: int = 128):
  """Sum of the products with every layer [M, N]."""

  def run(x_MK, codes_LRN, scale_LQN):
    def step(acc_MN, layer):
      y_MN = api.matmul(
        x_MK, *layer, group_size=group_size, implementation=implementation, config=config
      )
      return acc_MN + y_MN, None

    zero_MN = jnp.zeros((x_MK.shape[0], codes_LRN.shape[2]), x_MK.dtype)
    return jax.lax.scan(step, zero_MN, (codes_LRN, scale_LQN))[0]

  return run


def dense_program(x_MK, w_LKN):
  zero_MN = jnp.zeros((x_MK.shape[0], w_LKN.shape[2]), x_MK.dtype)
  return jax.lax.scan(lambda acc, w_KN: (acc + x_MK @ w_KN, None), zero_MN, w_LKN)[0]


def candidates(rows: int):
  tall = (16, 32, 64) if rows <= 64 else (64, 128)
  splits = (1, 2, 4, 8) if rows <= 64 else (1,)
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


def main():
  args = bench.arguments("w4a16_gemm", cases.REAL)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = cases.REAL[name]
    M, K, N, g = case.rows, case.num_in, case.num_out, case.group_size
    arrays = inputs(case, dtype)
    if args.tune:
      best = tune.search(
        candidates(M),
        lambda c, arrays=arrays: bench.seconds(program("triton", c), *arrays, repeats=20),
      )
      print(tune.save("w4a16_gemm", triton.key(M, N, K, g, jnp.dtype(dtype)), best))
    x, codes, scale = arrays
    one = jax.jit(functools.partial(api.matmul, implementation=args.implementation))
    expected = ref.matmul_ref(x, codes[0], scale[0]).astype(jnp.float32)
    error = jnp.max(jnp.abs(one(x, codes[0], scale[0]).astype(jnp.float32) - expected))
    dense = jax.random.normal(jax.random.key(1), (LAYERS, K, N), dtype) * K**-0.5
    dense_time = bench.seconds(dense_program, x, dense.astype(dtype), repeats=args.repeats)
    run = program(args.implementation)
    flops, size = work(case, jnp.dtype(dtype).itemsize)
    rows.append(
      bench.Row(
        op="w4a16_gemm",
        case=name,
        implementation=args.implementation,
        seconds=bench.seconds(run, *arrays, repeats=args.repeats) / LAYERS,
        flops=flops,
        bytes=size,
        dense_seconds=dense_time / LAYERS,
      )
    )
    print(f"{rows[-1].printed()}  max error {float(error):.1e}", flush=True)
  bench.report(rows, args.json)


if __name__ == "__main__":
  main()
