"""Dense causal attention as the equation reads (MiniCPM section 3; float32 softmax)."""

import jax
import jax.numpy as jnp


def attention_mask(
  num_queries: int,
  num_keys: int,
  *,
  q_offset=0,
  kv_length=None,
  q_segment_ids_BT=None,
  kv_segment_ids_BS=None,
):
  """Bool [B or 1, T, S], True = attend: causal by slot, inside the segment, below kv_length.

  Query t sits in slot q_offset + t. Segment id 0 is padding: it attends to nothing.
  `q_offset` and `kv_length` are ints or int32 arrays of shape [] or [B].
  """
  slots_T = jnp.arange(num_queries)
  slots_S = jnp.arange(num_keys)
  q_slots_BT = jnp.reshape(jnp.asarray(q_offset), (-1, 1)) + slots_T[None, :]
  mask_BTS = slots_S[None, None, :] <= q_slots_BT[:, :, None]
  if kv_length is not None:
    length_B11 = jnp.reshape(jnp.asarray(kv_length), (-1, 1, 1))
    mask_BTS = mask_BTS & (slots_S[None, None, :] < length_B11)
  if q_segment_ids_BT is not None:
    q_BT1, kv_B1S = q_segment_ids_BT[:, :, None], kv_segment_ids_BS[:, None, :]
    mask_BTS = mask_BTS & (q_BT1 == kv_B1S) & (q_BT1 != 0)
  return mask_BTS


def flash_attention_ref(
  q_BTNH,
  k_BSKH,
  v_BSKV,
  *,
  scale: float,
  q_offset=0,
  kv_length=None,
  q_segment_ids_BT=None,
  kv_segment_ids_BS=None,
):
  """softmax(scale q k^T + mask) v with all scores in memory; rows that see nothing give 0."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  mask_BTS = attention_mask(
    T,
    k_BSKH.shape[1],
    q_offset=q_offset,
    kv_length=kv_length,
    q_segment_ids_BT=q_segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
  )
  q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H))
  scores_BKGTS = scale * jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  mask_B11TS = mask_BTS[:, None, None]
  scores_BKGTS = jnp.where(mask_B11TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
  probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
  probs_BKGTS = jnp.where(mask_B11TS, probs_BKGTS, 0.0).astype(v_BSKV.dtype)
  out_BTKGV = jnp.einsum("BKGTS,BSKV->BTKGV", probs_BKGTS, v_BSKV)
  return jnp.reshape(out_BTKGV, (B, T, N, v_BSKV.shape[-1]))
