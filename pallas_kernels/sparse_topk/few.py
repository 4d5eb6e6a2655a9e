"""Block selection of a few queries on NVIDIA GPUs: decoding, draft trees.

The kernels of `triton.py` share queries out to programs and go over all keys; one query would keep
one multiprocessor a key head busy. Here programs share the keys: the normaliser's parts, then the
scores of windows, which XLA pools to blocks; the choice is the same kernel. Each score is computed
once, so that blocks which share their best window tie exactly.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.sparse_topk import xla

MOST = 16  # queries of a row
MOST_NUMBERS = 256 * 128  # of the queries of a program: 64 KiB, beside keys at most 99 (sm_86, 89)
CHOICE_WARPS = 16  # of one row of scores


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
  is_exact = rule.lse == "exact"
  norm_BCKH, level = (fine_BFKH, 1) if is_exact else (coarse_BFKH, rules.COARSE)
  C = norm_BCKH.shape[1]
  # A pointer is never read where there is no key; a zero-sized array has none to give.
  norm_BCKH, fine_BFKH = (
    x if x.shape[1] else jnp.zeros((B, 1, K, H), x.dtype) for x in (norm_BCKH, fine_BFKH)
  )
  offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
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
  W, MP = rule.num_selected, gpu.next_power_of_two(M, least=16)
  return gpu.launch(
    triton_kernels.choose,
    *(jnp.reshape(scores_RM, (B, K, T, M)), offset_B, start_BT, jnp.zeros((1,), jnp.int32)),
    out_shape=(
      jax.ShapeDtypeStruct((B, K, T, W), jnp.int32),
      jax.ShapeDtypeStruct((B, K, T), jnp.int32),
    ),
    grid=(T, K, B),
    num_warps=min(CHOICE_WARPS, max(1, MP // 128)),
    num_stages=1,
    compute_capability=compute_capability,
    T=T,
    K=K,
    M=M,
    MP=MP,
    ROWS=T,
    W=W,
    WP=gpu.next_power_of_two(W),
    BLOCK=rule.block_size,
    INIT=rule.init_blocks,
    LOCAL=rule.num_local,
    TOPK=rule.topk,
    JOINT=rule.selection == "joint",
  )
