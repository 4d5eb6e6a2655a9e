"""Stage 1 with the choice, prefill at 4k to 128k: `python -m pallas_kernels.sparse_topk.bench`.

The dense yardstick is the whole attention that the selection saves.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.sparse_topk import api, cases, triton
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


def candidates(group: int):
  for rows, keys, warps, stages in itertools.product(
    (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
  ):
    if rows >= group:
      yield triton.TritonConfig(
        block_q=rows // group, block_c=keys, num_warps=warps, num_stages=stages
      )


def main():
  args = bench.arguments("sparse_topk", CASES)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = CASES[name]
    arrays = inputs(case, dtype)
    if args.tune:
      group = case.num_heads // case.num_kv_heads
      best = tune.search(
        candidates(group),
        lambda c, case=case, arrays=arrays: bench.seconds(
          program(case, "triton", c), *arrays, repeats=3
        ),
      )
      print(tune.save("sparse_topk", tune.key(group, case.head_dim, "bfloat16"), best))
    flops, size = work(case, jnp.dtype(dtype).itemsize)
    k = jnp.zeros((1, case.num_slots, case.num_kv_heads, case.head_dim), dtype)
    rows.append(
      bench.Row(
        op="sparse_topk",
        case=name,
        implementation=args.implementation,
        seconds=bench.seconds(program(case, args.implementation), *arrays, repeats=args.repeats),
        flops=flops,
        bytes=size,
        dense_seconds=bench.dense_seconds(
          bench.dense_attention, arrays[0], k, k, repeats=args.repeats
        ),
      )
    )
    print(rows[-1].printed(), flush=True)
  bench.report(rows, args.json)


if __name__ == "__main__":
  main()
