"""Attention over selected blocks with all scores in memory (infllm_v2.md section 9).

One softmax over the selected tokens of the past. Differentiable as written; memory O(T * S) a head.
"""

import jax
import jax.numpy as jnp


def block_mask(ids_BKTW, pos_BT, start_BT, num_slots: int, block_size: int):
  """Bool [B, K, T, S]: slot s is at or before the query and in one of its blocks.

  Blocks count from the start of the query's document, which may lie anywhere.
  """
  s_11S = jnp.arange(num_slots)[None, None, :]
  past_BTS = (s_11S <= pos_BT[:, :, None]) & (s_11S >= start_BT[:, :, None])
  block_BTS = (s_11S - start_BT[:, :, None]) // block_size
  num_blocks = -(-num_slots // block_size)
  member_BKTM = jnp.any(
    ids_BKTW[..., None] == jnp.arange(num_blocks)[None, None, None, None, :], axis=-2
  )
  block_BKTS = jnp.broadcast_to(
    jnp.clip(block_BTS, 0, num_blocks - 1)[:, None], (*ids_BKTW.shape[:3], num_slots)
  )
  return jnp.take_along_axis(member_BKTM, block_BKTS, axis=-1) & past_BTS[:, None]


def grid_mask(ids_BKTW, pos_BT, start_BT, num_slots: int, block_size: int):
  """As `block_mask` for blocks that count from slot 0, the row's grid."""
  mask_BKTS = block_mask(ids_BKTW, pos_BT, jnp.zeros_like(start_BT), num_slots, block_size)
  slots_11S = jnp.arange(num_slots)[None, None, :]
  return mask_BKTS & (slots_11S >= start_BT[:, :, None])[:, None]


def attend_ref(q_BTNH, k_BSKH, v_BSKV, mask_BKTS):
  """(out [B, T, N, V], lse [B, T, N] float32); a row that sees nothing gives 0 and -inf."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H))
  scores_BKGTS = H**-0.5 * jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  mask_BK1TS = mask_BKTS[:, :, None]
  scores_BKGTS = jnp.where(mask_BK1TS, scores_BKGTS, -1e30)
  top_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
  probs_BKGTS = jnp.where(mask_BK1TS, jnp.exp(scores_BKGTS - top_BKGT1), 0.0)
  sum_BKGT1 = jnp.sum(probs_BKGTS, axis=-1, keepdims=True)
  is_seen = sum_BKGT1 > 0
  probs_BKGTS = probs_BKGTS / jnp.where(is_seen, sum_BKGT1, 1.0)
  out_BTKGV = jnp.einsum("BKGTS,BSKV->BTKGV", probs_BKGTS.astype(v_BSKV.dtype), v_BSKV)
  lse_BKGT1 = jnp.where(is_seen, top_BKGT1 + jnp.log(jnp.where(is_seen, sum_BKGT1, 1.0)), -jnp.inf)
  lse_BTN = jnp.reshape(jnp.moveaxis(lse_BKGT1[..., 0], 3, 1), (B, T, N))
  return jnp.reshape(out_BTKGV, (B, T, N, -1)), lse_BTN
