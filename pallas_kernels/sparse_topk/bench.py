"""Stage 1 with the choice, prefill at 4k to 128k: `python -m pallas_kernels.sparse_topk.bench`.

The dense yardstick is the whole attention that the selection saves. A kernel asked for by name
gets a second row of its block scores alone; what is left of the first is the choice. With --tune
the tiles are searched by the first case of each shape.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import bench, gpu, tune
from pallas_kernels.sparse_topk import api, cases, mosaic_gpu, triton
from pallas_kernels.sparse_topk import rule as rules

LENGTHS = {"8k": 8192, "32k": 32768, "64k": 65536, "128k": 131072}
CASES = {
  f"{model}_{length}_{lse}": dataclasses.replace(
    cases.REAL[f"{model}_32k"], num_queries=n, num_slots=n, rule=rules.Rule(lse=lse)
  )
  for model in ("minicpm4_0p5b", "minicpm4_8b")
  for length, n in LENGTHS.items()
  for lse in ("coarse", "exact")
}


def inputs(case: cases.Case, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  K, H, slots = case.num_kv_heads, case.head_dim, case.num_slots
  counts = (case.rule.num_windows(slots), case.rule.num_windows(slots, rules.COARSE))
  shapes = [(1, case.num_queries, case.num_heads, H), *((1, n, K, H) for n in counts)]
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def work(case: cases.Case, itemsize: int) -> tuple[float, float]:
  """(FLOPs, bytes): 1.25 passes over the visible fine keys, 2 in exact mode; each array once."""
  T, N, K, H = case.num_queries, case.num_heads, case.num_kv_heads, case.head_dim
  passes = 1.25 if case.rule.lse == "coarse" else 2.0
  flops = passes * H * N * T * T / case.rule.kernel_stride
  keys = 1.25 * case.num_slots / case.rule.kernel_stride * K * H * itemsize
  return flops, T * N * H * itemsize + keys + 4 * T * K * (case.rule.num_selected + 1)


def program(case: cases.Case, implementation: str, config=None):
  def run(q, fine, coarse):
    return api.select_blocks(
      q,
      fine,
      coarse,
      rule=case.rule,
      num_slots=case.num_slots,
      implementation=implementation,
      config=config,
    )

  return run


def scores_program(case: cases.Case, implementation: str):
  """Block scores of every query by one of the two kernels; a column of them is kept."""

  def run(q, fine, coarse):
    start = jnp.zeros(q.shape[:2], jnp.int32)
    args = (q, fine, coarse, 0, start, case.rule, case.num_slots)
    if implementation == "triton":
      rows, scores, _ = triton.runs(*args)
      firsts = np.arange(0, case.num_queries, rows, dtype=np.int32)
    else:
      rows, padded, scores, _ = mosaic_gpu.runs(*args)
      firsts = np.arange(0, padded, rows, dtype=np.int32) // mosaic_gpu.mgpu.ROWS
    return jax.lax.map(lambda first: jax.tree.leaves(scores(first))[0][..., 0], firsts)

  return run


def candidates(implementation: str, group: int):
  """For Triton (columns of a step, keys, warps) that fit a Hopper's registers and shared memory;
  for both how many bytes of scores a run holds."""
  sizes = (2**28, 2**30)
  if implementation == "mosaic_gpu":
    for warpgroups in (1, 2):
      for size in sizes:
        yield mosaic_gpu.MosaicGpuConfig(warpgroups=warpgroups, max_score_bytes=size)
    return
  group = gpu.next_power_of_two(group)
  for columns, keys, warps in ((128, 64, 4), (256, 64, 4), (256, 128, 8)):
    for size in sizes if columns >= group else ():
      yield triton.TritonConfig(
        block_q=columns // group, block_c=keys, num_warps=warps, max_score_bytes=size
      )


def main(argv: Sequence[str] | None = None) -> list[bench.Row]:
  args = bench.arguments("sparse_topk", CASES, argv)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows, tuned = [], set()
  for name in args.cases:
    case = CASES[name]
    arrays = inputs(case, dtype)
    group = case.num_heads // case.num_kv_heads
    if args.tune and (group, case.head_dim) not in tuned:
      tuned.add((group, case.head_dim))
      kernel = "mosaic_gpu" if args.implementation == "mosaic_gpu" else "triton"
      best = tune.search(
        candidates(kernel, group),
        lambda c, case=case, arrays=arrays, kernel=kernel: bench.seconds(
          program(case, kernel, c), *arrays, repeats=3
        ),
      )
      key = tune.key(group, case.head_dim, "bfloat16", kernel)
      print(tune.save("sparse_topk", key, best))
    flops, size = work(case, jnp.dtype(dtype).itemsize)
    k = jnp.zeros((1, case.num_slots, case.num_kv_heads, case.head_dim), dtype)
    dense = bench.dense_seconds(bench.dense_attention, arrays[0], k, k, repeats=args.repeats)
    parts = {args.implementation: program(case, args.implementation)}
    if args.implementation in ("triton", "mosaic_gpu"):
      parts[f"{args.implementation} scores"] = scores_program(case, args.implementation)
    for part, function in parts.items():
      rows.append(
        bench.Row(
          op="sparse_topk",
          case=name,
          implementation=part,
          seconds=bench.seconds(function, *arrays, repeats=args.repeats),
          flops=flops,
          bytes=size,
          dense_seconds=dense,
        )
      )
      print(rows[-1].printed(), flush=True)
  bench.report(rows, args.json)
  return rows


if __name__ == "__main__":
  main()
