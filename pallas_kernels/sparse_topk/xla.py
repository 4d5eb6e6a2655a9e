"""InfLLM v2 block selection in chunks of queries on one grid of windows and blocks.

All documents of a row start at multiples of `rule.alignment`, so one set of compressed keys serves
the row and visibility is a range of windows. Memory: one chunk's logits against the fine keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_topk import choice, ref
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import rule as rules

TILE = 512  # windows of one matmul
FLOOR = -1e30  # maximum of nothing
MANY = 32  # queries a chunk from which on bisection beats a sort of every row


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
  """`max_logits` logits of one chunk; at most `max_bands` unrolled numbers of visible windows."""

  max_logits: int = 2**21
  max_bands: int = 8


def compress(k_BSKH, rule: rules.Rule, level: int = 1):
  """[B, C, K, H] means of complete windows, float32 sums, k's dtype (section 4)."""
  size, stride = level * rule.kernel_size, level * rule.kernel_stride
  B, S, K, H = k_BSKH.shape
  num = rule.num_windows(S, level)
  if num == 0:
    return jnp.zeros((B, 0, K, H), k_BSKH.dtype)
  parts = S // stride
  k_BPsKH = jnp.reshape(k_BSKH[:, : parts * stride], (B, parts, stride, K, H))
  sums_BPKH = jnp.sum(k_BPsKH, axis=2, dtype=jnp.float32)
  total = sum(sums_BPKH[:, i : i + num] for i in range(size // stride))
  return (total / size).astype(k_BSKH.dtype)


def _over_tiles(q_CGH, keys_FH, own, pos_C, start_C, rule: rules.Rule, level: int, step, init):
  """step(carry, first window, logits [C, G, n], visible [C, n]) over the tiles that any query sees.

  The last tile ends with the keys; a window that it shares with the one before is visible once.
  own: (first window, keys [C, R, H]) that replace the common keys of each query, or None.
  """
  C, G, H = q_CGH.shape
  F = keys_FH.shape[0]
  n = min(TILE, F) if C >= MANY else F
  q_RH, stride = jnp.reshape(q_CGH, (C * G, H)), level * rule.kernel_stride
  dims = (((1,), (1,)), ((), ()))

  def one(i, carry):
    first = jnp.minimum(i * n, F - n)
    keys_nH = jax.lax.dynamic_slice_in_dim(keys_FH, first, n)
    dots = jax.lax.dot_general(q_RH, keys_nH, dims, preferred_element_type=jnp.float32)
    dots_CGn = jnp.reshape(dots, (C, G, n))
    window_n = first + jnp.arange(n, dtype=jnp.int32)
    if own is not None:
      dots_CGn = nodes_lib.with_own(dots_CGn, q_CGH, window_n, *own)
    is_past_Cn = stride * window_n[None, :] + (level * rule.kernel_size - 1) <= pos_C[:, None]
    is_own_Cn = stride * window_n[None, :] >= start_C[:, None]
    visible_Cn = is_past_Cn & is_own_Cn & (window_n >= i * n)[None, :]
    return step(carry, first, H**-0.5 * dots_CGn, visible_Cn)

  if n == F:
    return one(0, init)
  is_real_C = start_C <= pos_C
  begin = jnp.min(jnp.where(is_real_C, start_C, rules.NOWHERE)) // stride
  last = jnp.max(jnp.where(is_real_C, pos_C, -1)) + 1 - level * rule.kernel_size
  end = jnp.minimum(jnp.where(last < 0, 0, last // stride + 1), F)
  return jax.lax.fori_loop(begin // n, -(-end // n), one, init)


def chunk_scores(
  q_CGH,
  fine_FH,
  coarse_FH,
  pos_C,
  start_C,
  rule: rules.Rule,
  num_blocks: int,
  own_fine=None,
  own_coarse=None,
):
  """Block scores [C, M] float32 of one key head (sections 5 and 6).

  own: (first window, keys [C, R, H]) of each query's own windows, see `nodes`.
  """
  C, G, _ = q_CGH.shape
  F = fine_FH.shape[0]
  norm_FH, own_norm, level = fine_FH, own_fine, 1
  if rule.lse == "coarse":
    norm_FH, own_norm, level = coarse_FH, own_coarse, rules.COARSE
  if F == 0 or norm_FH.shape[0] == 0:
    return jnp.zeros((C, num_blocks), jnp.float32)

  def add(carry, first, logits_CGn, visible_Cn):
    del first
    top_CG1, total_CG1 = carry
    masked_CGn = jnp.where(visible_Cn[:, None, :], logits_CGn, 2 * FLOOR)
    new_CG1 = jnp.maximum(top_CG1, jnp.max(masked_CGn, axis=2, keepdims=True))
    sum_CG1 = jnp.sum(jnp.exp(masked_CGn - new_CG1), axis=2, keepdims=True)
    return new_CG1, total_CG1 * jnp.exp(top_CG1 - new_CG1) + sum_CG1

  init = jnp.full((C, G, 1), FLOOR), jnp.zeros((C, G, 1), jnp.float32)
  args = (pos_C, start_C, rule)
  top_CG1, total_CG1 = _over_tiles(q_CGH, norm_FH, own_norm, *args, level, add, init)
  lse_CG1 = top_CG1 + jnp.log(jnp.where(total_CG1 > 0, total_CG1, 1.0))
  has_norm_C1 = total_CG1[:, 0] > 0

  def put(scores_CF, first, logits_CGn, visible_Cn):
    probs_CGn = jnp.exp(jnp.minimum(logits_CGn - lse_CG1, 80.0))
    scores_Cn = jnp.sum(probs_CGn, axis=1)
    n = scores_Cn.shape[1]
    if n == F:
      return jnp.where(visible_Cn & has_norm_C1, scores_Cn, 0.0)
    old_Cn = jax.lax.dynamic_slice_in_dim(scores_CF, first, n, axis=1)
    scores_Cn = jnp.where(visible_Cn & has_norm_C1, scores_Cn, old_Cn)
    return jax.lax.dynamic_update_slice_in_dim(scores_CF, scores_Cn, first, axis=1)

  init_CF = jnp.zeros((C, F), jnp.float32)
  scores_CF = _over_tiles(q_CGH, fine_FH, own_fine, *args, 1, put, init_CF)
  return pool(scores_CF, rule, num_blocks)


def pool(scores_CF, rule: rules.Rule, num_blocks: int):
  """[C, M]: maximum over the windows that overlap each block; 0 where there is none (section 6).

  Scores are >= 0 and blocks without a window are the last ones, so 0 ranks them as -inf would.
  """
  per_block = rule.block_size // rule.kernel_stride
  left = rule.kernel_size // rule.kernel_stride - 1
  right = num_blocks * per_block - scores_CF.shape[1]
  padded = jnp.pad(scores_CF, ((0, 0), (left, max(0, right))))
  inside = padded[:, left : left + num_blocks * per_block]
  best = jnp.max(jnp.reshape(inside, (-1, num_blocks, per_block)), axis=-1)
  for i in range(left):
    best = jnp.maximum(best, padded[:, i : i + (num_blocks - 1) * per_block + 1 : per_block])
  return best


def _bands(T: int, chunk: int, offset: int | None, num_slots: int, max_bands: int):
  """(first chunk, chunks, visible slots): later bands see more keys (static offsets only)."""
  chunks = T // chunk
  if offset is None:
    return [(0, chunks, num_slots)]
  step = -(-chunks // max_bands)
  ends = [min(chunks, i + step) for i in range(0, chunks, step)]
  starts = [0, *ends[:-1]]
  seen = [max(1, min(num_slots, offset + end * chunk)) for end in ends]
  return [(s, e - s, n) for s, e, n in zip(starts, ends, seen, strict=True)]


def select_xla(
  q_BTNH,
  fine_BFKH,
  coarse_BFKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  config: XlaConfig | None = None,
  nodes: nodes_lib.Nodes | None = None,
):
  """(ids [B, K, T, W] ascending on the row's grid, -1 = none; counts [B, K, T]).

  q_offset: int or int32 [B], grid position of the first query; start_BT: grid position of the
  first token of the query's document (`rules.NOWHERE` = padding). `num_slots` bounds all positions.
  nodes: a draft tree's, with positions of their own.
  """
  config = config or XlaConfig()
  B, T, N, H = q_BTNH.shape
  K, num_blocks = fine_BFKH.shape[2], rule.num_blocks(num_slots)
  static_offset = q_offset if isinstance(q_offset, int) and nodes is None else None
  offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
  pos_BT = offset_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
  pos_BT = pos_BT if nodes is None else nodes.pos_BT
  if num_blocks <= rule.num_selected:  # everything in the past fits: no scores needed
    ids, counts = all_blocks(pos_BT, start_BT, rule, rule.num_selected)
    W = ids.shape[-1]
    return (
      jnp.broadcast_to(ids[:, None], (B, K, T, W)),
      jnp.broadcast_to(counts[:, None], (B, K, T)),
    )
  widest = max(1, fine_BFKH.shape[1])
  chunk = max(1, min(T, config.max_logits // (N // K * widest)))
  chunk = -(-T // -(-T // chunk))  # even ones
  padded = -(-T // chunk) * chunk
  q_BTNH, pos_BT, start_BT = (
    jnp.pad(x, ((0, 0), (0, padded - T)) + ((0, 0),) * (x.ndim - 2), constant_values=value)
    for x, value in ((q_BTNH, 0), (pos_BT, 0), (start_BT, rules.NOWHERE))
  )
  own_BK = () if nodes is None else _own_by_head((nodes.fine, nodes.coarse), padded)

  def one_head(q_TGH, fine_FH, coarse_FH, own, pos_T, start_T):
    def one_chunk(i, visible):
      q, pos, start = (
        jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk) for x in (q_TGH, pos_T, start_T)
      )
      blocks = rule.num_blocks(visible)
      if blocks <= rule.num_selected:
        ids, counts = all_blocks(pos[None], start[None], rule, rule.num_selected)
        return ids[0], counts[0]
      fine = fine_FH[: rule.num_windows(visible)]
      coarse = coarse_FH[: rule.num_windows(visible, rules.COARSE)]
      own_here = [(f, jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk)) for f, x in own]
      scores = chunk_scores(q, fine, coarse, pos, start, rule, blocks, *own_here)
      cur, first = pos // rule.block_size, start // rule.block_size
      choose = choice.choose if chunk >= MANY else ref.choose
      return choose(scores, cur, rule, first)

    parts = []
    for i, num, visible in _bands(padded, chunk, static_offset, num_slots, config.max_bands):
      run = functools.partial(one_chunk, visible=visible)
      ids, counts = (
        jax.lax.map(run, i + jnp.arange(num))
        if num > 1
        else jax.tree.map(lambda x: x[None], run(i))
      )
      parts.append((jnp.reshape(ids, (num * chunk, -1)), jnp.reshape(counts, (-1,))))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs)[:T], *parts)

  q_BKTGH = jnp.moveaxis(jnp.reshape(q_BTNH, (B, padded, K, N // K, H)), 2, 1)
  fine_BKFH, coarse_BKFH = jnp.moveaxis(fine_BFKH, 2, 1), jnp.moveaxis(coarse_BFKH, 2, 1)

  def one_row(row):
    *heads, pos_T, start_T = row
    return over(lambda head: one_head(*head, pos_T, start_T), tuple(heads))

  over = _vmap if T == 1 or nodes is not None else _map
  return over(one_row, (q_BKTGH, fine_BKFH, coarse_BKFH, own_BK, pos_BT, start_BT))


def _own_by_head(levels, num_queries: int):
  """Of every level (first window [B, K], keys [B, K, T, R, H]), padded to `num_queries`."""

  def one(own: nodes_lib.Own):
    keys_BKTRH = jnp.moveaxis(own.keys_BTRKH, 3, 1)
    rest = num_queries - keys_BKTRH.shape[2]
    keys_BKTRH = jnp.pad(keys_BKTRH, ((0, 0), (0, 0), (0, rest), (0, 0), (0, 0)))
    return jnp.broadcast_to(own.first_B[:, None], keys_BKTRH.shape[:2]), keys_BKTRH

  return tuple(map(one, levels))


def _map(function, xs):
  return jax.lax.map(function, xs)


def _vmap(function, xs):
  return jax.vmap(function)(xs)


def all_blocks(pos_BT, start_BT, rule: rules.Rule, width: int):
  """(ids [B, T, width], counts [B, T]): every block from the document's first to the current."""
  first_BT, cur_BT = start_BT // rule.block_size, pos_BT // rule.block_size
  ids_BTW = first_BT[:, :, None] + jnp.arange(width, dtype=jnp.int32)[None, None, :]
  ids_BTW = jnp.where(
    (ids_BTW <= cur_BT[:, :, None]) & (pos_BT >= start_BT)[:, :, None], ids_BTW, -1
  )
  return ids_BTW, jnp.sum(ids_BTW >= 0, axis=-1, dtype=jnp.int32)
