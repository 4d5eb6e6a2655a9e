"""Attention over selected blocks by gathering them: for a few queries against a long cache.

Moves 2 * W * block_size rows of keys and values a query, which a decode step has to read anyway.
Also the XLA form of `sparse_decode`, but for several queries of a row on a CPU. Differentiable as
written.
"""

import jax
import jax.numpy as jnp


def attend_gather(
  q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B=None, page_table_BM=None, *, block_size
):
  """As `sparse_decode.api.decode_blocks`: k and v are rows [B, S, K, H] or pages [P, s, K, H]."""
  B, T, N, H = q_BTNH.shape
  K, W = k.shape[2], ids_BKTW.shape[3]
  lane_s = jnp.arange(block_size, dtype=jnp.int32)[None, None, None, None, :]
  spots = jnp.maximum(ids_BKTW, 0)[..., None] * block_size + lane_s
  pos, start = pos_BT[:, None, :, None, None], start_BT[:, None, :, None, None]
  mask = (ids_BKTW >= 0)[..., None] & (spots <= pos) & (spots >= start)
  if page_table_BM is None:
    slots = spots if base_B is None else spots + base_B[:, None, None, None, None]
    first_B = k.shape[1] * jnp.arange(B, dtype=jnp.int32)
    slots = jnp.minimum(slots, k.shape[1] - 1) + first_B[:, None, None, None, None]
  else:
    table_BK1M = jnp.broadcast_to(page_table_BM[:, None, None], (B, K, T, page_table_BM.shape[1]))
    pages_BKTW = jnp.take_along_axis(table_BK1M, jnp.maximum(ids_BKTW, 0), axis=3)
    slots = jnp.maximum(pages_BKTW, 0)[..., None] * block_size + lane_s
  slots_BKTR = jnp.reshape(slots, (B, K, T, W * block_size))

  rows_BKTR = slots_BKTR * K + jnp.arange(K, dtype=jnp.int32)[None, :, None, None]

  def pick(x):  # [B, K, T, R, width]; from rows as they lie: by head, x would be transposed whole
    return jnp.reshape(x, (-1, x.shape[-1]))[rows_BKTR]

  mask_BKT1R = jnp.reshape(mask, (B, K, T, 1, W * block_size))
  q_BKTGH = jnp.moveaxis(jnp.reshape(q_BTNH, (B, T, K, N // K, H)), 2, 1)
  scores = H**-0.5 * jnp.einsum(
    "BKTGH,BKTRH->BKTGR", q_BKTGH, pick(k), preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask_BKT1R, scores, -1e30)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  probs = jnp.where(mask_BKT1R, jnp.exp(scores - top), 0.0)
  total = jnp.sum(probs, axis=-1, keepdims=True)
  is_seen = total > 0
  total = jnp.where(is_seen, total, 1.0)
  out = jnp.einsum(
    "BKTGR,BKTRV->BKTGV",
    (probs / total).astype(v.dtype),
    pick(v),
    preferred_element_type=jnp.float32,
  )
  lse = jnp.where(is_seen, top + jnp.log(total), -jnp.inf)[..., 0]
  out_BTNV = jnp.reshape(jnp.moveaxis(out, 1, 2), (B, T, N, -1)).astype(v.dtype)
  return out_BTNV, jnp.reshape(jnp.moveaxis(lse, 1, 2), (B, T, N))
