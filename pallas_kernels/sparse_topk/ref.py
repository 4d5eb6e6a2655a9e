"""InfLLM v2 block selection as the definition reads, for documents that start anywhere.

Every slot x stands for the window [x, x + size); a query of the document that starts at `start`
uses the windows at start, start + stride, ... So windows, blocks and visibility restart in each
document without any common grid. Memory is O(T * S) a head: for tests and short rows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_topk import rule as rules


def window_means(k_BSKH, size: int):
  """[B, S, K, H] float32: mean of k[x : x + size] at every slot x (zeros follow the last key)."""
  S = k_BSKH.shape[1]
  k_BSKH = jnp.pad(k_BSKH.astype(jnp.float32), ((0, 0), (0, size - 1), (0, 0), (0, 0)))
  return sum(k_BSKH[:, i : i + S] for i in range(size)) / size


def _logits(q_BTNH, k_BSKH):
  """q k^T / sqrt(H), [B, K, G, T, S] float32."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H)).astype(jnp.float32)
  return H**-0.5 * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)


def _is_visible(pos_BT, start_BT, num_slots: int, rule: rules.Rule, level: int):
  """Bool [B, T, S]: the window at slot x is on the document's grid and complete in the past."""
  x_11S = jnp.arange(num_slots)[None, None, :]
  pos_BT1, start_BT1 = pos_BT[:, :, None], start_BT[:, :, None]
  is_on_grid = (x_11S - start_BT1) % (level * rule.kernel_stride) == 0
  is_past = x_11S + level * rule.kernel_size - 1 <= pos_BT1
  return is_on_grid & is_past & (x_11S >= start_BT1)


def kernel_scores(q_BTNH, k_BSKH, pos_BT, start_BT, rule: rules.Rule):
  """S [B, K, T, S] float32: group sum of the normalised relevance of the window at each slot."""
  S = k_BSKH.shape[1]
  visible_BTS = _is_visible(pos_BT, start_BT, S, rule, 1)
  fine_BKGTS = _logits(q_BTNH, window_means(k_BSKH, rule.kernel_size))
  level = 1 if rule.lse == "exact" else rules.COARSE
  norm_BTS = _is_visible(pos_BT, start_BT, S, rule, level)
  norm_BKGTS = _logits(q_BTNH, window_means(k_BSKH, level * rule.kernel_size))
  masked_BKGTS = jnp.where(norm_BTS[:, None, None], norm_BKGTS, -jnp.inf)
  lse_BKGT1 = jax.nn.logsumexp(masked_BKGTS, axis=-1, keepdims=True)
  has_norm_B1T1 = jnp.any(norm_BTS, axis=-1)[:, None, :, None]
  lse_BKGT1 = jnp.where(has_norm_B1T1[:, :, None], lse_BKGT1, 0.0)
  probs_BKGTS = jnp.exp(jnp.minimum(fine_BKGTS - lse_BKGT1, 80.0))
  counts_B1TS = visible_BTS[:, None] & has_norm_B1T1
  return jnp.where(counts_B1TS, jnp.sum(probs_BKGTS, axis=2), 0.0)


def block_scores(kernel_BKTS, start_BT, rule: rules.Rule, num_blocks: int):
  """P [B, K, T, M]: maximum over the windows that overlap block m of the query's document."""
  S = kernel_BKTS.shape[-1]
  blocks_M = jnp.arange(num_blocks) * rule.block_size
  first = rule.kernel_stride - rule.kernel_size
  best = jnp.zeros((*kernel_BKTS.shape[:3], num_blocks), jnp.float32)
  for tap in range(first, rule.block_size, rule.kernel_stride):
    x_BTM = start_BT[:, :, None] + (blocks_M + tap)[None, None, :]
    is_inside_BTM = (x_BTM < S) & (blocks_M + tap >= 0)[None, None, :]
    x_B1TM = jnp.clip(x_BTM, 0, S - 1)[:, None]
    x_BKTM = jnp.broadcast_to(x_B1TM, best.shape)
    value = jnp.take_along_axis(kernel_BKTS, x_BKTM, axis=-1)
    best = jnp.maximum(best, jnp.where(is_inside_BTM[:, None], value, 0.0))
  return best


def choose(scores_XM, cur_X, rule: rules.Rule, first_X=None):
  """(block ids [X, W] ascending, -1 = none; counts [X]) from block scores >= 0.

  Candidates are first_X <= b <= cur_X; `first_X` (default 0) is the first block of the document.
  Ties go to the lower block (section 7.3). A row with cur < first takes nothing.
  """
  X, M = scores_XM.shape
  b_1M = jnp.arange(M, dtype=jnp.int32)[None, :]
  cur_X1 = cur_X[:, None]
  first_X1 = jnp.zeros_like(cur_X1) if first_X is None else first_X[:, None]
  is_candidate = (b_1M >= first_X1) & (b_1M <= cur_X1)
  is_init = b_1M < first_X1 + rule.init_blocks
  is_local = b_1M > cur_X1 - rule.num_local
  joint = rule.selection == "joint"
  if joint:
    is_forced, is_open, budget = is_init | is_local, is_candidate, rule.num_selected
  else:
    is_forced, is_open, budget = is_init, is_candidate & (is_init | ~is_local), rule.topk
  ranked_XM = jnp.where(is_open, jnp.where(is_forced, jnp.inf, scores_XM), -jnp.inf)
  top_XW, ids_XW = jax.lax.top_k(ranked_XM, min(budget, M))
  ids_XW = jnp.where(top_XW > -jnp.inf, ids_XW, M)
  if not joint and rule.num_local:
    local_XW = cur_X1 - jnp.arange(rule.num_local, dtype=jnp.int32)[None, :]
    is_new = (local_XW >= first_X1 + rule.init_blocks) & (local_XW <= M - 1)
    ids_XW = jnp.concatenate((ids_XW, jnp.where(is_new, local_XW, M)), axis=1)
  ids_XW = jnp.sort(ids_XW.astype(jnp.int32), axis=1)
  ids_XW = jnp.where(ids_XW < M, ids_XW, -1)[:, : rule.num_selected]
  missing = rule.num_selected - ids_XW.shape[1]
  ids_XW = jnp.pad(ids_XW, ((0, 0), (0, missing)), constant_values=-1)
  return ids_XW, jnp.sum(ids_XW >= 0, axis=1, dtype=jnp.int32)


def select_ref(q_BTNH, k_BSKH, pos_BT, start_BT, rule: rules.Rule):
  """(ids [B, K, T, W], counts [B, K, T]); block ids count from the start of the document.

  pos_BT: slot of every query, below 0 or before its start = padding, which takes no block.
  """
  num_blocks = rule.num_blocks(k_BSKH.shape[1])
  kernel_BKTS = kernel_scores(q_BTNH, k_BSKH, pos_BT, start_BT, rule)
  scores_BKTM = block_scores(kernel_BKTS, start_BT, rule, num_blocks)
  cur_BT = jnp.where(pos_BT >= start_BT, (pos_BT - start_BT) // rule.block_size, -1)
  cur_BKT = jnp.broadcast_to(cur_BT[:, None], scores_BKTM.shape[:3])
  ids, counts = choose(
    jnp.reshape(scores_BKTM, (-1, num_blocks)), jnp.reshape(cur_BKT, (-1,)), rule
  )
  return jnp.reshape(ids, (*cur_BKT.shape, -1)), jnp.reshape(counts, cur_BKT.shape)
