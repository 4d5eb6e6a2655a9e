"""Dense attention behind one function; see `flash_attention`."""

from typing import Literal

from pallas_kernels.flash import ref


def flash_attention(
  q_BTNH,
  k_BSKH,
  v_BSKV,
  *,
  scale: float | None = None,
  q_offset=0,
  kv_length=None,
  q_segment_ids_BT=None,
  kv_segment_ids_BS=None,
  implementation: Literal["auto", "ref"] = "auto",
):
  """Causal grouped-query attention, float32 softmax; returns [B, T, N, V] in v's dtype.

  Query head n reads key head n // (N / K). Query t sits in key slot q_offset + t and sees slots
  up to its own, below kv_length, of its own segment (id 0 = padding, sees nothing, gives 0).
  `scale` defaults to H ** -0.5.
  """
  del implementation
  return ref.flash_attention_ref(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    scale=q_BTNH.shape[-1] ** -0.5 if scale is None else scale,
    q_offset=q_offset,
    kv_length=kv_length,
    q_segment_ids_BT=q_segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
  )
