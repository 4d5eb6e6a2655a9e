"""Block selection of a few queries on NVIDIA GPUs: decoding, draft trees.

The kernels of `triton.py` share queries out to programs and go over all keys; one query would keep
one multiprocessor a key head busy. Here programs share the keys: the normaliser's parts, then the
scores of windows, which XLA pools to blocks; the choice is the same kernel. Each score is computed
once, so that blocks which share their best window tie exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import gpu
from pallas_kernels.sparse_topk import launches, xla
from pallas_kernels.sparse_topk import rule as rules

MOST = 16  # queries of a row
MOST_NUMBERS = 256 * 128  # of the queries of a program: 64 KiB, beside keys at most 99 (sm_86, 89)
BLOCKS_PER_WARP = 128  # of a choice: with few rows, many warps to each


def is_served(q_BTNH, num_kv_heads: int) -> bool:
  """Whether a program holds the queries of a key head: few, and 16-bit (float32 would spill)."""
  _, T, N, H = q_BTNH.shape
  rows = heads_of(N // num_kv_heads, T) * gpu.next_power_of_two(T)
  fits = rows * gpu.next_power_of_two(H, least=16) <= MOST_NUMBERS
  return T <= MOST and q_BTNH.dtype.itemsize == 2 and fits


def heads_of(group: int, num_queries: int) -> int:
  """Of a program's rows: a product has 16 rows at least."""
  queries = gpu.next_power_of_two(num_queries)
  return gpu.next_power_of_two(group, least=max(1, 16 // queries))


def select(
  q_BTNH,
  fine_BFKH,
  coarse_BFKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  compute_capability: int | None = None,
):
  """As `triton.select_triton` of queries that `is_served`, whose checks have passed."""
  from pallas_kernels.sparse_topk import triton_kernels

  B, T, N, H = q_BTNH.shape
  F, K = fine_BFKH.shape[1:3]
  G, queries = N // K, gpu.next_power_of_two(T)
  heads = heads_of(G, T)
  keys = 128 if heads * queries <= 64 else 64
  norm_BCKH, C, level, fine_BFKH, offset_B = launches.operands(
    fine_BFKH, coarse_BFKH, q_offset, rule
  )
  tiles = max(1, -(-C // keys))
  launch = functools.partial(
    gpu.launch,
    num_warps=4 if heads * queries <= 64 else 8,
    num_stages=1,
    compute_capability=compute_capability,
    scale=H**-0.5,
    T=T,
    C=C,
    K=K,
    G=G,
    H=H,
    HP=gpu.next_power_of_two(H, least=16),
    QUERIES=queries,
    HEADS=heads,
    KEYS=keys,
    PRECISION=gpu.precision(q_BTNH.dtype),
  )
  part = jax.ShapeDtypeStruct((B, K, tiles, heads * queries), jnp.float32)
  norms = launch(
    triton_kernels.few_norms,
    *(q_BTNH, norm_BCKH, offset_B, start_BT),
    out_shape=(part, part),
    grid=(tiles, K, B),
    SIZE=level * rule.kernel_size,
    STRIDE=level * rule.kernel_stride,
  )
  scores_BKTF = launch(
    triton_kernels.few_scores,
    *(q_BTNH, fine_BFKH, *norms, offset_B, start_BT),
    out_shape=jax.ShapeDtypeStruct((B, K, T, max(F, 1)), jnp.float32),
    grid=(max(1, -(-F // keys)), K, B),
    F=F,
    SIZE=rule.kernel_size,
    STRIDE=rule.kernel_stride,
    NORM_SIZE=level * rule.kernel_size,
    NORM_STRIDE=level * rule.kernel_stride,
    TILES=tiles,
    TOGETHER=16,
  )
  M = -(-rule.num_blocks(num_slots) // 16) * 16
  scores_RM = xla.pool(jnp.reshape(scores_BKTF, (B * K * T, -1)), rule, M)
  return launches.choose(
    *(jnp.reshape(scores_RM, (B, K, T, M)), offset_B, start_BT, np.int32(0), rule),
    blocks_per_warp=BLOCKS_PER_WARP,
    compute_capability=compute_capability,
  )
