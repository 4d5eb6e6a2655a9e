"""One decoded token at 8k to 128k: `python -m pallas_kernels.sparse_decode.bench`.

A layer's token takes microseconds, less than starting a program, and its blocks would stay in the
cache if read again: one timed call goes over different caches, and a row is the time of one.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench, tune
from pallas_kernels.sparse_decode import api, cases, mosaic_gpu, triton

LAYERS = 8  # of one row; 2 of a batch


def inputs(case: cases.Case, dtype, layer: int = 0):
  """(q, k, v, ids, page table or None): random distinct blocks, the current one included."""
  keys = jax.random.split(jax.random.key(layer), 5)
  B, N, K, H = case.batch, case.num_heads, case.num_kv_heads, case.head_dim
  M = case.num_slots // case.block_size
  shape = (B, case.num_slots, K, H)
  table = None
  if case.is_paged:
    shape = (B * M, case.block_size, K, H)
    table = jnp.reshape(jax.random.permutation(keys[4], B * M), (B, M)).astype(jnp.int32)
  q = jax.random.normal(keys[0], (B, case.num_queries, N, H), dtype)
  k, v = (jax.random.normal(key, shape, dtype) for key in keys[1:3])
  order = jax.random.uniform(keys[3], (B, K, case.num_queries, M)).at[..., -1].set(2.0)
  ids = jnp.sort(jax.lax.top_k(order, min(case.num_listed, M))[1], axis=-1).astype(jnp.int32)
  return q, k, v, ids, table


def work(case: cases.Case, itemsize: int) -> tuple[float, float]:
  """(FLOPs, bytes): the listed keys and values once a key head (infllm_v2.md section 15)."""
  rows = case.batch * case.num_queries * min(case.num_listed * case.block_size, case.num_slots)
  flops = 4.0 * rows * case.num_heads * case.head_dim
  return flops, 2.0 * rows * case.num_kv_heads * case.head_dim * itemsize


def program(case: cases.Case, implementation: str, config=None):
  """Of a list of layers' arrays: a list of outputs."""

  def one(q, k, v, ids, table):
    return api.decode_blocks(
      q,
      k,
      v,
      ids,
      block_size=case.block_size,
      q_offset=case.num_slots - case.num_queries,
      page_table_BM=table,
      implementation=implementation,
      config=config,
    )[0]

  return lambda layers: [one(*arrays) for arrays in layers]


def dense_program(layers):
  return [bench.dense_attention(q, k, v, is_causal=False) for q, k, v, *_ in layers]


def candidates(implementation: str):
  if implementation == "mosaic_gpu":
    for splits, stages in itertools.product((16, 32, 64), (2, 4)):
      yield mosaic_gpu.MosaicGpuConfig(num_splits=splits, num_stages=stages)
    return
  yield triton.TritonConfig()
  for splits, warps, stages in itertools.product((8, 16, 32), (2, 4), (3, 4)):
    yield triton.TritonConfig(num_splits=splits, num_warps=warps, num_stages=stages)


def main(argv: Sequence[str] | None = None) -> list[bench.Row]:
  args = bench.arguments("sparse_decode", cases.REAL, argv)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rows = []
  for name in args.cases:
    case = cases.REAL[name]
    num_layers = LAYERS if case.batch == 1 else 2
    layers = [inputs(case, dtype, layer) for layer in range(num_layers)]
    if args.tune:
      tuned = "mosaic_gpu" if args.implementation == "mosaic_gpu" else "triton"
      best = tune.search(
        candidates(tuned),
        lambda c, case=case, layers=layers, tuned=tuned: bench.seconds(
          program(case, tuned, c), layers, repeats=20
        ),
      )
      key = tune.key(case.num_heads // case.num_kv_heads, case.head_dim, "bfloat16", tuned)
      label = f"{key}_rows{case.batch * case.num_kv_heads}"
      print(tune.save("sparse_decode", label, best))
    flops, size = work(case, jnp.dtype(dtype).itemsize)
    dense = None
    if not case.is_paged:
      dense = bench.dense_seconds(dense_program, layers, repeats=args.repeats)
    run = program(case, args.implementation)
    rows.append(
      bench.Row(
        op="sparse_decode",
        case=name,
        implementation=args.implementation,
        seconds=bench.seconds(run, layers, repeats=args.repeats) / num_layers,
        flops=flops,
        bytes=size,
        dense_seconds=None if dense is None else dense / num_layers,
      )
    )
    print(rows[-1].printed(), flush=True)
  bench.report(rows, args.json)
  return rows


if __name__ == "__main__":
  main()
