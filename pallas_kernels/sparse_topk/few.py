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
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import rule as rules

MOST = 16  # queries of a row
MOST_NUMBERS = 256 * 128  # of the queries of a program: 64 KiB, beside keys at most 99 (sm_86, 89)
FLOOR, CLAMP, LOG2E = -1e30, 80.0, 1.4426950408889634  # as in triton_kernels (CLAMP to base e)
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


def select_nodes(q_BTNH, fine_BFKH, coarse_BFKH, length, start_BT, rule, num_slots, nodes):
  """`select` of a tree's nodes in runs that are served, or NotImplementedError with the reason.

  length: int or int32 [] or [B], committed tokens of a row.
  """
  T, K = q_BTNH.shape[1], fine_BFKH.shape[2]
  sizes = [n for n in (16, 8, 4, 2, 1) if is_served(q_BTNH[:, : min(n, T)], K)]
  if not sizes:
    raise NotImplementedError(
      f"sparse_topk: nodes of {q_BTNH.shape[2] // K} heads a group of {q_BTNH.shape[3]} in "
      f"{q_BTNH.dtype}, triton serves 16 bits and {MOST_NUMBERS} numbers a node and key head"
    )
  runs = [
    select(
      q_BTNH[:, own],
      fine_BFKH,
      coarse_BFKH,
      length,
      start_BT[:, own],
      rule,
      num_slots,
      nodes=nodes.of(own),
    )
    for own in (slice(first, first + sizes[0]) for first in range(0, T, sizes[0]))
  ]
  return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*runs, strict=True))


def select(
  q_BTNH,
  fine_BFKH,
  coarse_BFKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  compute_capability: int | None = None,
  nodes: nodes_lib.Nodes | None = None,
):
  """As `triton.select_triton` of queries that `is_served`, whose checks have passed.

  With nodes, q_offset is the number of the row's committed tokens.
  """
  from pallas_kernels.sparse_topk import triton_kernels

  B, T, N, H = q_BTNH.shape
  F, K = fine_BFKH.shape[1:3]
  G, queries = N // K, gpu.next_power_of_two(T)
  heads = heads_of(G, T)
  keys = 128 if heads * queries <= 64 else 64
  norm_BCKH, C, level, fine_BFKH, offset_B = launches.operands(
    fine_BFKH, coarse_BFKH, q_offset, rule
  )
  if nodes is not None:
    offset_B = offset_B - 1  # every node sees the windows of the committed tokens
  tiles = max(1, -(-C // keys))
  launch = functools.partial(
    gpu.launch,
    num_warps=4 if heads * queries <= 64 else 8,
    num_stages=1,
    compute_capability=compute_capability,
    scale=H**-0.5,
    T=T,
    K=K,
    G=G,
    H=H,
    HP=gpu.next_power_of_two(H, least=16),
    QUERIES=queries,
    HEADS=heads,
    STEP=int(nodes is None),
    KEYS=keys,
    PRECISION=gpu.precision(q_BTNH.dtype),
  )
  part = jax.ShapeDtypeStruct((B, K, tiles, heads * queries), jnp.float32)
  norms = launch(
    triton_kernels.few_norms,
    *(q_BTNH, norm_BCKH, offset_B, start_BT),
    out_shape=(part, part),
    grid=(tiles, K, B),
    C=C,
    SIZE=level * rule.kernel_size,
    STRIDE=level * rule.kernel_stride,
  )
  if nodes is not None:
    own = nodes.fine if level == 1 else nodes.coarse
    part = _own_part(q_BTNH, own, nodes.pos_BT, start_BT, rule, level, heads, queries)
    norms = [jnp.concatenate(pair, axis=2) for pair in zip(norms, part, strict=True)]
  scores_BKTF = launch(
    triton_kernels.few_scores,
    *(q_BTNH, fine_BFKH, *norms, offset_B, start_BT),
    out_shape=jax.ShapeDtypeStruct((B, K, T, max(F, 1)), jnp.float32),
    grid=(max(1, -(-F // keys)), K, B),
    F=F,
    SIZE=rule.kernel_size,
    STRIDE=rule.kernel_stride,
    TILES=norms[0].shape[2],
    TOGETHER=16,
  )
  if nodes is None:
    return _choose(scores_BKTF, offset_B, start_BT, rule, num_slots, compute_capability)
  at = nodes.pos_BT, start_BT
  scores_BKTF = _with_own(scores_BKTF, q_BTNH, nodes.fine, norms, *at, rule)
  scores_XK1F = jnp.reshape(jnp.swapaxes(scores_BKTF, 1, 2), (B * T, K, 1, -1))
  rows = jnp.reshape(nodes.pos_BT, (-1,)), jnp.reshape(start_BT, (-1, 1))
  ids, counts = _choose(scores_XK1F, *rows, rule, num_slots, compute_capability)
  ids_BTKW, counts_BTK = jnp.reshape(ids, (B, T, K, -1)), jnp.reshape(counts, (B, T, K))
  return jnp.swapaxes(ids_BTKW, 1, 2), jnp.swapaxes(counts_BTK, 1, 2)


def _own_logits(q_BTNH, own: nodes_lib.Own, pos_BT, start_BT, rule: rules.Rule, level: int):
  """(logits [B, K, G, T, R] of each node's own windows, which of them it sees [B, 1, 1, T, R])."""
  (B, T, N, H), K = q_BTNH.shape, own.keys_BTRKH.shape[3]
  q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H))
  logits_BKGTR = H**-0.5 * jnp.einsum(
    "BTKGH,BTRKH->BKGTR", q_BTKGH, own.keys_BTRKH, preferred_element_type=jnp.float32
  )
  window_BR = own.first_B[:, None] + jnp.arange(own.num, dtype=jnp.int32)[None, :]
  first_B1R = (level * rule.kernel_stride * window_BR)[:, None, :]
  is_past_BTR = first_B1R + (level * rule.kernel_size - 1) <= pos_BT[:, :, None]
  is_seen_BTR = is_past_BTR & (first_B1R >= start_BT[:, :, None])
  return logits_BKGTR, is_seen_BTR[:, None, None]


def _own_part(q_BTNH, own, pos_BT, start_BT, rule, level: int, heads: int, queries: int):
  """The own windows' part of the normaliser, as a tile of `few_norms`: two [B, K, 1, rows]."""
  logits_BKGTR, is_seen = _own_logits(q_BTNH, own, pos_BT, start_BT, rule, level)
  logits_BKGTR = LOG2E * logits_BKGTR
  top_BKGT = jnp.max(jnp.where(is_seen, logits_BKGTR, FLOOR), axis=-1)
  exps_BKGTR = jnp.where(is_seen, jnp.exp2(logits_BKGTR - top_BKGT[..., None]), 0.0)

  def rows(x_BKGT, value):
    B, K, G, T = x_BKGT.shape
    widths = ((0, 0), (0, 0), (0, heads - G), (0, queries - T))
    x = jnp.pad(x_BKGT, widths, constant_values=value)
    return jnp.reshape(x, (B, K, 1, heads * queries))

  return rows(top_BKGT, FLOOR), rows(jnp.sum(exps_BKGTR, axis=-1), 0.0)


def _with_own(scores_BKTF, q_BTNH, own: nodes_lib.Own, norms, pos_BT, start_BT, rule: rules.Rule):
  """The windows' scores with those of the nodes' own windows in their places."""
  (B, K, T, F), G = scores_BKTF.shape, q_BTNH.shape[2] // scores_BKTF.shape[1]
  logits_BKGTR, is_seen = _own_logits(q_BTNH, own, pos_BT, start_BT, rule, 1)
  tops_BKir, sums_BKir = norms
  top_BK1r = jnp.max(tops_BKir, axis=2, keepdims=True)
  sum_BKr = jnp.sum(sums_BKir * jnp.exp2(tops_BKir - top_BK1r), axis=2)
  norm_BKr = (top_BK1r[:, :, 0] + jnp.log2(jnp.where(sum_BKr > 0, sum_BKr, 1.0))) / LOG2E
  heads = sum_BKr.shape[2] // gpu.next_power_of_two(T)
  norm_BKGT1, sum_BKGT1 = (
    jnp.reshape(x, (B, K, heads, -1))[:, :, :G, :T, None] for x in (norm_BKr, sum_BKr)
  )
  probs_BKGTR = jnp.exp(jnp.minimum(logits_BKGTR - norm_BKGT1, CLAMP))
  own_BKTR = jnp.sum(jnp.where(is_seen & (sum_BKGT1 > 0), probs_BKGTR, 0.0), axis=2)
  window_F = jnp.arange(F, dtype=jnp.int32)
  for r in range(own.num):
    is_own_BF = window_F[None, :] == own.first_B[:, None] + r
    scores_BKTF = jnp.where(is_own_BF[:, None, None], own_BKTR[..., r : r + 1], scores_BKTF)
  return scores_BKTF


def _choose(scores_BKTF, offset_B, start_BT, rule: rules.Rule, num_slots: int, compute_capability):
  """(ids [B, K, T, W], counts [B, K, T]) from the scores of windows."""
  B, K, T, _ = scores_BKTF.shape
  M = -(-rule.num_blocks(num_slots) // 16) * 16
  scores_RM = xla.pool(jnp.reshape(scores_BKTF, (B * K * T, -1)), rule, M)
  return launches.choose(
    *(jnp.reshape(scores_RM, (B, K, T, M)), offset_B, start_BT, np.int32(0), rule),
    blocks_per_warp=BLOCKS_PER_WARP,
    compute_capability=compute_capability,
  )
