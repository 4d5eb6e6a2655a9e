"""FP8 products of MiniCPM4's feed-forward shapes: `python -m pallas_kernels.fp8_gemm.bench`.

Three rows a case: the product alone, from codes; `linear`, which quantises its 16-bit activations
first, as a training step does (weights are quantised once a step, outside); and `input_gradient`,
which quantises dy and multiplies by the transpose of the same codes. Forward products are given
the codes as the kernels read them, [N, K]: made once a step like the codes themselves. `x dense` is
against the product of the same values in bf16 (float32 on a CPU); the bar of quantization.md
section 9 is 1.3 for `linear` with at least 4096 rows of 4096 x 16384 on an H200.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.fp8_gemm import api, cases, mosaic_gpu, ref, triton


def quantize(x_MK, rows: int):
  """(codes, scales) of normal values in blocks of `rows` x 128 (whole blocks only)."""
  M, K = x_MK.shape
  blocks = x_MK.astype(jnp.float32).reshape(M // rows, rows, K // ref.BLOCK, ref.BLOCK)
  scale = jnp.max(jnp.abs(blocks), axis=(1, 3), keepdims=True) / 448
  return (blocks / scale).astype(jnp.float8_e4m3fn).reshape(M, K), scale[:, 0, :, 0]


def inputs(case: cases.Case, dtype):
  """(xq, xs, wq, ws) and the values they were taken of, (x [M, K], w [K, N]) in `dtype`."""
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (case.rows, case.num_in), dtype)
  w = jax.random.normal(keys[1], (case.num_in, case.num_out), dtype) * case.num_in**-0.5
  return (*quantize(x, 1), *quantize(w, ref.BLOCK)), (x, w.astype(dtype))


def work(case: cases.Case, itemsize: int) -> tuple[float, float]:
  """(FLOPs, bytes) of one product: codes of a byte, float32 scales, y of `itemsize` bytes."""
  M, K, N = case.rows, case.num_in, case.num_out
  scales = 4 * (M + N / ref.BLOCK) * K / ref.BLOCK
  return 2.0 * M * K * N, K * (M + N) + scales + itemsize * M * N


def programs(arrays, plain, dtype):
  """Suffix of the case -> (function of the product and its arrays, the arrays, the bf16 product).

  The function takes the product first: the one that is timed, or the reference for the same codes.
  """
  (xq, xs, wq, ws), (x, w) = arrays, plain
  wq_NK = wq.T
  dy = jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[1]), dtype)

  def alone(product, xq, xs, wq_NK, ws):
    return product(xq, xs, wq_NK.T, ws)

  def linear(product, x, wq_NK, ws):
    return product(*quantize(x, 1), wq_NK.T, ws)

  def input_gradient(product, dy, wq, ws):
    return product(*quantize(dy, 1), wq.T, ws.T)

  return {
    "": (alone, (xq, xs, wq_NK, ws), (jnp.matmul, plain)),
    "_linear": (linear, (x, wq_NK, ws), (jnp.matmul, plain)),
    "_input_gradient": (input_gradient, (dy, wq, ws), (lambda dy, w: dy @ w.T, (dy, w))),
  }


def candidates(implementation: str):
  """Of the tuner: Triton's tiles, or those of mosaic_gpu where it is asked for by name."""
  if implementation == "mosaic_gpu":
    for block_m, num_stages, group_m in (
      (256, 4, 16),
      (256, 4, 8),
      (256, 4, 32),
      (256, 3, 16),
      (128, 6, 16),
      (128, 6, 32),
    ):
      yield mosaic_gpu.MosaicGpuConfig(block_m=block_m, num_stages=num_stages, group_m=group_m)
    return
  for block_m, warps, stages in ((128, 8, 3), (128, 8, 4), (128, 4, 3), (256, 8, 3), (64, 4, 4)):
    yield triton.TritonConfig(block_m=block_m, block_n=128, num_warps=warps, num_stages=stages)


def main(
  argv: Sequence[str] | None = None,
  shapes: dict[str, cases.Case] = cases.REAL,
) -> list[bench.Row]:
  args = bench.arguments(api.OP, shapes, argv)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = shapes[name]
    arrays, plain = inputs(case, dtype)
    run = functools.partial(api.matmul, out_dtype=dtype)
    if args.tune:
      tuned, key = "triton", triton.key
      if args.implementation == "mosaic_gpu":
        tuned, key = "mosaic_gpu", mosaic_gpu.key
      alone, given, _ = programs(arrays, plain, dtype)[""]
      best = tune.search(
        candidates(tuned),
        lambda c, alone=alone, given=given, run=run, tuned=tuned: bench.seconds(
          functools.partial(alone, functools.partial(run, implementation=tuned, config=c)),
          *given,
          repeats=3,
        ),
      )
      entry = key(case.rows, case.num_out, case.num_in, arrays[0].dtype)
      print(tune.save(api.OP, entry, best))
    run = functools.partial(run, implementation=args.implementation)
    flops, size = work(case, jnp.dtype(dtype).itemsize)
    for suffix, (function, given, (dense, floats)) in programs(arrays, plain, dtype).items():
      exact = jax.jit(functools.partial(function, ref.matmul_ref))(*given)
      function = functools.partial(function, run)
      found = jax.jit(function)(*given).astype(jnp.float32)
      row = bench.Row(
        op=api.OP,
        case=name + suffix,
        implementation=args.implementation,
        seconds=bench.seconds(function, *given, repeats=args.repeats),
        flops=flops,
        bytes=size,
        dense_seconds=bench.seconds(dense, *floats, repeats=args.repeats),
        peak_factor=2.0,
      )
      rows.append(row)
      error = float(jnp.max(jnp.abs(found - exact)))
      print(f"{row.printed()}  max error {error:.1e}", flush=True)
  bench.report(rows, args.json)
  return rows


if __name__ == "__main__":
  main()
