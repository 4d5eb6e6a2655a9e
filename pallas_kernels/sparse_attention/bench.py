"""Stage 2, forward and backward, 4k to 128k: `python -m pallas_kernels.sparse_attention.bench`.

How much the lists of neighbouring queries share decides how fast tiles of queries go. The cases
keep a block's score for KEPT queries: the lists of two, four and eight queries then hold 1.18, 1.54
and 2.23 times the free blocks of one at 128k (1.16, 1.46, 2.01 at 32k). Lists of real text (the
135M model on WikiText-2, mean of its layers) hold 1.22, 1.45, 1.70 times with 10 of 64 blocks free
and 1.24, 1.51, 1.82 with 10 of 128: `python -m experiments.block_overlap` counts both,
`benchmarks/results/block_overlap.json`. KEPT was chosen after a first look at such text.
`*_random` draws every list anew.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.sparse_attention import api, cases, mosaic_gpu, triton
from pallas_kernels.sparse_topk import rule as rules

KEPT = 6
_CASES = {
  **{
    f"{n}_8k": dataclasses.replace(cases.REAL[f"{n}_4k"], num_queries=8192, num_slots=8192)
    for n in ("minicpm4_0p5b", "minicpm4_8b")
  },
  **cases.REAL,
}
CASES = {**_CASES, **{f"{name}_random": case for name, case in _CASES.items()}}


def lists(case: cases.Case, kept: int = 1):
  """[1, K, T, W]: initial, local, and other blocks of the past by scores that a block keeps for
  `kept` queries, ascending."""
  rule, T = case.rule, case.num_queries
  M, W = rule.num_blocks(case.num_slots), rule.num_selected

  def of_rows(head, t_R):
    block_1M = jnp.arange(M, dtype=jnp.uint32)[None, :]
    # Blocks change their score at different queries; a score is a hash of block, turn and head.
    turn_RM = (t_R.astype(jnp.uint32)[:, None] + (block_1M * jnp.uint32(0x9E3779B1) >> 7)) // kept
    score_RM = turn_RM * jnp.uint32(0x9E3779B1) ^ (block_1M * jnp.uint32(0x85EBCA6B) + head * 77777)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
      score_RM = (score_RM ^ score_RM >> shift) * jnp.uint32(factor)
    score_RM = (score_RM >> 8).astype(jnp.float32) / 2**24
    cur_R1, block_1M = (t_R // rule.block_size)[:, None], jnp.arange(M)[None, :]
    forced_RM = (block_1M < rule.init_blocks) | (block_1M > cur_R1 - rule.num_local)
    score_RM = jnp.where(block_1M <= cur_R1, jnp.where(forced_RM, 2.0, score_RM), -1.0)
    top, ids = jax.lax.top_k(score_RM, min(W, M))
    ids = jnp.sort(jnp.where(top >= 0, ids, M), axis=1)
    ids = jnp.pad(ids, ((0, 0), (0, W - ids.shape[1])), constant_values=M)
    return jnp.where(ids < M, ids, -1).astype(jnp.int32)

  t_rR = jnp.reshape(jnp.arange(T, dtype=jnp.int32), (-1, min(T, 1024)))
  each = jax.jit(lambda head: jax.lax.map(lambda t_R: of_rows(head, t_R), t_rR))
  return jnp.stack([jnp.reshape(each(jnp.uint32(h)), (T, W)) for h in range(case.num_kv_heads)])[
    None
  ]


def inputs(case: cases.Case, dtype, kept: int = KEPT):
  keys = jax.random.split(jax.random.key(0), 3)
  T, N, K, H = case.num_queries, case.num_heads, case.num_kv_heads, case.head_dim
  shapes = ((1, T, N, H), (1, T, K, H), (1, T, K, H))
  q, k, v = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=False))
  return q, k, v, lists(case, kept)


def work(case: cases.Case, itemsize: int, has_grad: bool) -> tuple[float, float]:
  """(FLOPs, bytes): matmuls over visible selected tokens (backward 2.5 times more), and each
  array once."""
  T, N, K, H = case.num_queries, case.num_heads, case.num_kv_heads, case.head_dim
  visible = min(T, case.rule.num_selected * case.rule.block_size)
  tokens = visible * (visible + 1) / 2 + (T - visible) * visible
  flops, rows = 4.0 * H * N * tokens, T * H * (2 * N + 2 * K) * itemsize
  lists = 4 * T * K * case.rule.num_selected
  return flops * (3.5 if has_grad else 1), rows * (3 if has_grad else 1) + lists


def program(implementation: str, rule: rules.Rule, has_grad: bool, config=None):
  def forward(q, k, v, ids):
    return api.attend_blocks(
      q,
      k,
      v,
      ids,
      block_size=rule.block_size,
      num_local=rule.num_local,
      implementation=implementation,
      config=config,
    )[0]

  if not has_grad:
    return forward

  def step(q, k, v, ids):
    out, vjp = jax.vjp(lambda *x: forward(*x, ids), q, k, v)
    return vjp(out)

  return step


def dense_step(q, k, v):
  out, vjp = jax.vjp(bench.dense_attention, q, k, v)
  return vjp(out)


def candidates(implementation: str):
  """Tiles worth trying on a GPU."""
  if implementation == "mosaic_gpu":
    for warpgroups, stages, q_stages in ((1, 4, 3), (2, 3, 3), (2, 5, 3), (3, 3, 2), (3, 5, 3)):
      yield mosaic_gpu.MosaicGpuConfig(warpgroups=warpgroups, num_stages=stages, q_stages=q_stages)
    return
  for warps, stages, kv_rows in itertools.product((2, 4), (2, 3), (32, 64, 128)):
    yield triton.TritonConfig(list_warps=warps, list_stages=stages, kv_rows=kv_rows)


def main(argv: Sequence[str] | None = None) -> list[bench.Row]:
  args = bench.arguments("sparse_attention", CASES, argv)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = CASES[name]
    arrays = inputs(case, dtype, 1 if name.endswith("_random") else KEPT)
    if args.tune:
      tuned = "mosaic_gpu" if args.implementation == "mosaic_gpu" else "triton"
      best = tune.search(
        candidates(tuned),
        lambda c, case=case, arrays=arrays, tuned=tuned: bench.seconds(
          program(tuned, case.rule, True, c), *arrays, repeats=3
        ),
      )
      key = tune.key(case.num_heads // case.num_kv_heads, case.head_dim, "bfloat16", tuned)
      print(tune.save("sparse_attention", key, best))
    for has_grad in (False, True):
      flops, size = work(case, jnp.dtype(dtype).itemsize, has_grad)
      run = program(args.implementation, case.rule, has_grad)
      dense = dense_step if has_grad else bench.dense_attention
      rows.append(
        bench.Row(
          op="sparse_attention",
          case=f"{name} {'fwd+bwd' if has_grad else 'fwd'}",
          implementation=args.implementation,
          seconds=bench.seconds(run, *arrays, repeats=args.repeats),
          flops=flops,
          bytes=size,
          dense_seconds=bench.dense_seconds(dense, *arrays[:3], repeats=args.repeats),
        )
      )
      print(rows[-1].printed(), flush=True)
  bench.report(rows, args.json)
  return rows


if __name__ == "__main__":
  main()
