"""Stage 2, forward and backward, 4k to 128k: `python -m pallas_kernels.sparse_attention.bench`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.sparse_attention import api, cases, mosaic_gpu, triton
from pallas_kernels.sparse_topk import rule as rules

CASES = {
  **{
    f"{n}_8k": dataclasses.replace(cases.REAL[f"{n}_4k"], num_queries=8192, num_slots=8192)
    for n in ("minicpm4_0p5b", "minicpm4_8b")
  },
  **cases.REAL,
}


def random_lists(key, case: cases.Case):
  """[1, K, T, W]: initial, local, and uniformly drawn other blocks of the past, ascending."""
  rule, T = case.rule, case.num_queries
  M, W = rule.num_blocks(case.num_slots), rule.num_selected

  def of_rows(key, cur_R):
    block_1M = jnp.arange(M)[None, :]
    score = jax.random.uniform(key, (cur_R.size, M))
    forced = (block_1M < rule.init_blocks) | (block_1M > cur_R[:, None] - rule.num_local)
    score = jnp.where(block_1M <= cur_R[:, None], jnp.where(forced, 2.0, score), -1.0)
    top, ids = jax.lax.top_k(score, min(W, M))
    ids = jnp.sort(jnp.where(top >= 0, ids, M), axis=1)
    ids = jnp.pad(ids, ((0, 0), (0, W - ids.shape[1])), constant_values=M)
    return jnp.where(ids < M, ids, -1).astype(jnp.int32)

  rows = min(T, 1024)
  cur = jnp.reshape(jnp.arange(T) // rule.block_size, (-1, rows))
  keys = jax.random.split(key, (case.num_kv_heads, T // rows))
  each = jax.jit(lambda k: jax.lax.map(lambda x: of_rows(*x), (k, cur)))
  return jnp.stack([jnp.reshape(each(k), (T, W)) for k in keys])[None]


def inputs(case: cases.Case, dtype):
  keys = jax.random.split(jax.random.key(0), 4)
  T, N, K, H = case.num_queries, case.num_heads, case.num_kv_heads, case.head_dim
  shapes = ((1, T, N, H), (1, T, K, H), (1, T, K, H))
  q, k, v = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=False))
  return q, k, v, random_lists(keys[3], case)


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
    for stages, q_stages, kv_stages, rows in itertools.product((2, 3), (2, 3), (2, 3), (32, 64)):
      yield mosaic_gpu.MosaicGpuConfig(
        num_stages=stages, q_stages=q_stages, kv_stages=kv_stages, unit_rows=rows
      )
    return
  for warps, stages, kv_rows, kv_warps in itertools.product((2, 4), (2, 3), (32, 64, 128), (4, 8)):
    yield triton.TritonConfig(
      list_warps=warps, list_stages=stages, kv_rows=kv_rows, kv_warps=kv_warps
    )
  for rows, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
    yield triton.TritonConfig(band_rows=rows, band_keys=keys, band_warps=warps, band_stages=stages)


def main():
  args = bench.arguments("sparse_attention", CASES)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = CASES[name]
    arrays = inputs(case, dtype)
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


if __name__ == "__main__":
  main()
