"""Dense attention behind one function; see `flash_attention`."""

from typing import Literal

from pallas_kernels.flash import cudnn, ref, xla

Implementation = Literal["auto", "ref", "xla", "cudnn"]
_SERVERS = {
  "ref": ref.flash_attention_ref,
  "xla": xla.flash_attention_xla,
  "cudnn": cudnn.flash_attention_cudnn,
}


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
  implementation: Implementation = "auto",
  config: xla.XlaConfig | None = None,
):
  """Causal grouped-query attention, float32 softmax; returns [B, T, N, V] in v's dtype.

  Query head n reads key head n // (N / K). Query t sits in key slot q_offset + t and sees slots
  up to its own, below kv_length, of its own segment (id 0 = padding, sees nothing, gives 0).
  `scale` defaults to H ** -0.5. Work is O(T * S) with the causal half skipped when `q_offset` is
  a Python int; memory is O(T + S) except for `ref`.

  implementation: `auto` takes `cudnn` where it serves the call, else `xla`; `ref` holds all
    scores. A backend that cannot serve a call raises NotImplementedError. `config` is for `xla`.
  """
  arguments = dict(
    scale=q_BTNH.shape[-1] ** -0.5 if scale is None else scale,
    q_offset=q_offset,
    kv_length=kv_length,
    q_segment_ids_BT=q_segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
  )
  if implementation == "auto":
    try:
      return cudnn.flash_attention_cudnn(q_BTNH, k_BSKH, v_BSKV, **arguments)
    except NotImplementedError:
      implementation = "xla"
  if implementation == "xla":
    arguments["config"] = config
  return _SERVERS[implementation](q_BTNH, k_BSKH, v_BSKV, **arguments)
