"""cuDNN's fused attention through `jax.nn.dot_product_attention` (NVIDIA, sm_80 and later)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash import ref


def flash_attention_cudnn(
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
  """As `api.flash_attention`, or NotImplementedError with the reason.

  Served: 16-bit floats, head widths that are multiples of 8 up to 128 (256 is Hopper's limit for
  some versions only), equal query and key lengths. Rows of one document with
  padding behind are causal attention; other packed rows pay for a [B, 1, T, S] mask, and their
  backward pass runs the forward again. Which of the two a call is, the device decides (a branch).
  """
  T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[-1]
  if jax.default_backend() != "gpu":
    raise NotImplementedError(f"cudnn: the default backend is {jax.default_backend()}, not gpu")
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or not (
    q_BTNH.dtype == k_BSKH.dtype == v_BSKV.dtype
  ):
    raise NotImplementedError(
      f"cudnn: found {q_BTNH.dtype}, {k_BSKH.dtype}, {v_BSKV.dtype}, expected one 16-bit float"
    )
  if H != v_BSKV.shape[-1] or H % 8 or H > 128:
    raise NotImplementedError(f"cudnn: head widths {H} and {v_BSKV.shape[-1]}")
  if not isinstance(q_offset, int) or q_offset != 0 or T != S or kv_length is not None:
    raise NotImplementedError("cudnn: serves whole sequences only (no offset, no cache)")
  one_run = functools.partial(_attend, scale=scale, is_causal=True)
  if q_segment_ids_BT is None:
    return one_run(q_BTNH, k_BSKH, v_BSKV)

  @jax.checkpoint  # or the gradient of the other branch would carry a mask of zeros
  def packed(q_BTNH, k_BSKH, v_BSKV):
    mask_BTS = ref.attention_mask(
      T, S, q_segment_ids_BT=q_segment_ids_BT, kv_segment_ids_BS=kv_segment_ids_BS
    )
    # A row of padding must not be all masked (NaN): it sees itself, its output is zeroed below.
    mask_B1TS = (mask_BTS | jnp.eye(T, dtype=bool)[None])[:, None]
    return _attend(q_BTNH, k_BSKH, v_BSKV, scale=scale, is_causal=False, mask=mask_B1TS)

  is_plain = is_one_run(q_segment_ids_BT) & jnp.all(q_segment_ids_BT == kv_segment_ids_BS)
  out_BTNV = jax.lax.cond(is_plain, one_run, packed, q_BTNH, k_BSKH, v_BSKV)
  return jnp.where((q_segment_ids_BT != 0)[:, :, None, None], out_BTNV, 0)


def is_one_run(ids_BT):
  """True where every row is one document, then nothing but padding: plain causal attention."""
  same_BT = (ids_BT[:, 1:] == ids_BT[:, :-1]) | (ids_BT[:, 1:] == 0)
  return jnp.all(same_BT)


def _attend(q_BTNH, k_BSKH, v_BSKV, **options):
  try:
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKV, **options, implementation="cudnn")
  except RuntimeError as error:  # jax looks for the library, its version and the device here
    raise NotImplementedError(f"cudnn: {error}") from error
