"""Attention over selected blocks by gathering them: for a few queries against a long cache.

Moves 2 * W * block_size rows of keys and values a query, which a decode step has to read anyway.
"""

import jax
import jax.numpy as jnp


def attend_gather(q_BTNH, k_BSKH, v_BSKV, ids_BKTW, pos_BT, start_BT, *, block_size, base_B=None):
  """As `api.attend_blocks`; grid position p of row b is slot base_B[b] + p (default 0)."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  W = ids_BKTW.shape[3]
  steps_s = jnp.arange(block_size, dtype=jnp.int32)
  spots = jnp.maximum(ids_BKTW, 0)[..., None] * block_size + steps_s[None, None, None, None, :]
  pos, start = pos_BT[:, None, :, None, None], start_BT[:, None, :, None, None]
  mask = (ids_BKTW >= 0)[..., None] & (spots <= pos) & (spots >= start)
  slots = spots if base_B is None else spots + base_B[:, None, None, None, None]
  slots = jnp.minimum(slots, S - 1)

  def pick(x_BSKH):  # [B, K, T, W * block, H]
    rows = jax.vmap(jax.vmap(lambda x_SH, at: x_SH[at], in_axes=(1, 0)), in_axes=(0, 0))
    return jnp.reshape(rows(x_BSKH, slots), (B, K, T, W * block_size, -1))

  mask_BKT1R = jnp.reshape(mask, (B, K, T, 1, W * block_size))
  q_BKTGH = jnp.moveaxis(jnp.reshape(q_BTNH, (B, T, K, N // K, H)), 2, 1)
  scores = H**-0.5 * jnp.einsum(
    "BKTGH,BKTRH->BKTGR", q_BKTGH, pick(k_BSKH), preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask_BKT1R, scores, -1e30)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  probs = jnp.where(mask_BKT1R, jnp.exp(scores - top), 0.0)
  total = jnp.sum(probs, axis=-1, keepdims=True)
  is_seen = total > 0
  total = jnp.where(is_seen, total, 1.0)
  out = jnp.einsum(
    "BKTGR,BKTRV->BKTGV",
    (probs / total).astype(v_BSKV.dtype),
    pick(v_BSKV),
    preferred_element_type=jnp.float32,
  )
  lse = jnp.where(is_seen, top + jnp.log(total), -jnp.inf)[..., 0]
  out_BTNV = jnp.reshape(jnp.moveaxis(out, 1, 2), (B, T, N, -1)).astype(v_BSKV.dtype)
  return out_BTNV, jnp.reshape(jnp.moveaxis(lse, 1, 2), (B, T, N))
