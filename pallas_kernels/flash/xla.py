"""Dense causal attention in query blocks that fit a cache, with its own gradient.

Softmax attention without the T x S matrix (MiniCPM section 3; FlashAttention, arXiv 2205.14135,
arXiv 2307.08691): queries are taken in blocks, every block reads only the keys that causality
allows it, the backward pass recomputes the probabilities from the saved log-sum-exp. Only
`jnp` operations: it runs wherever XLA does. Query heads of one key head are laid side by side,
so that every matmul has block_q * G rows.

Residuals: q, k, v, out, and lse [B, K, T*G] float32 (4 B per query and head).
Forward and backward are deterministic (no atomics; the order of sums is fixed at trace time).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

_FLOOR = -1e30  # below every real score; scores under a mask are finfo.min, far below this


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
  """Block sizes: `block_q` queries at a time, at most `max_bands` unrolled key lengths.

  Work beyond the causal half is 1 / number of bands.
  """

  block_q: int = 128
  max_bands: int = 8

  def __post_init__(self):
    for name in ("block_q", "max_bands"):
      if getattr(self, name) < 1:
        raise ValueError(f"XlaConfig.{name}: found {getattr(self, name)}, expected 1 or more")


def default_config(q_shape, k_shape) -> XlaConfig:
  """Blocks of about 1M scores (4 MB) on a CPU, 64M elsewhere; 128 to 512 queries."""
  B, _, N, _ = q_shape
  scores = 2**20 if jax.default_backend() == "cpu" else 2**26
  return XlaConfig(block_q=max(128, min(512, scores // (B * N * k_shape[1]) // 64 * 64)))


def flash_attention_xla(
  q_BTNH,
  k_BSKH,
  v_BSKV,
  *,
  scale: float,
  q_offset=0,
  kv_length=None,
  q_segment_ids_BT=None,
  kv_segment_ids_BS=None,
  config: XlaConfig | None = None,
):
  """As `api.flash_attention`; gradients flow to q, k and v."""
  config = default_config(q_BTNH.shape, k_BSKH.shape) if config is None else config
  B, T, N, _ = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  is_static = isinstance(q_offset, int)
  static = _Static(
    scale=float(scale), offset=q_offset if is_static else None, group=N // K, config=config
  )

  def per_row(x):
    return None if x is None else jnp.broadcast_to(jnp.asarray(x), (B,))

  masks = _Masks(
    q_offset_B=None if is_static else per_row(q_offset),
    kv_length_B=per_row(kv_length),
    q_segment_ids_BT=q_segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
  )
  # [B, K, T*G, H]: the queries that share a key head are rows of one matmul.
  q_BKRH = jnp.reshape(
    jnp.swapaxes(jnp.reshape(q_BTNH, (B, T, K, N // K, -1)), 1, 2), (B, K, T * (N // K), -1)
  )
  k_BKSH, v_BKSV = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKV, 1, 2)
  out_BKRV = _attention(static, q_BKRH, k_BKSH, v_BKSV, masks)
  out_BKTGV = jnp.reshape(out_BKRV, (B, K, T, N // K, -1))
  return jnp.reshape(jnp.swapaxes(out_BKTGV, 1, 2), (B, T, N, -1))


@dataclasses.dataclass(frozen=True)
class _Static:
  scale: float
  offset: int | None  # None = traced, then every block reads all keys
  group: int  # query heads of one key head
  config: XlaConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["q_offset_B", "kv_length_B", "q_segment_ids_BT", "kv_segment_ids_BS"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Masks:
  """What restricts attention beyond a static causal offset; every field may be None."""

  q_offset_B: jax.Array | None
  kv_length_B: jax.Array | None
  q_segment_ids_BT: jax.Array | None
  kv_segment_ids_BS: jax.Array | None


def _bands(T: int, S: int, static: _Static) -> list[tuple[int, int, int, int]]:
  """(first query, queries, block, keys) of every band; each is scanned in blocks of one size."""
  block = min(static.config.block_q, T)
  whole = T // block
  per_band = -(-whole // static.config.max_bands)
  bands = [(i * block, min(per_band, whole - i) * block, block) for i in range(0, whole, per_band)]
  if T % block:
    bands.append((whole * block, T % block, T % block))

  def visible(stop: int) -> int:
    return S if static.offset is None else max(1, min(S, static.offset + stop))

  return [(start, size, block, visible(start + size)) for start, size, block in bands]


def _mask(start, block: int, keys: int, static: _Static, masks: _Masks):
  """Bool [B or 1, block, keys]; `start` is the first query of the block (may be traced)."""
  slots_S = jnp.arange(keys)[None, None, :]
  slots_T = (start + jnp.arange(block))[None, :, None]
  if masks.q_offset_B is None:
    mask_BTS = slots_S <= slots_T + static.offset
  else:
    mask_BTS = slots_S <= slots_T + masks.q_offset_B[:, None, None]
  if masks.kv_length_B is not None:
    mask_BTS = mask_BTS & (slots_S < masks.kv_length_B[:, None, None])
  if masks.q_segment_ids_BT is not None:
    ids_BT = jax.lax.dynamic_slice_in_dim(masks.q_segment_ids_BT, start, block, axis=1)
    ids_BS = masks.kv_segment_ids_BS[:, :keys]
    mask_BTS = mask_BTS & (ids_BT[:, :, None] == ids_BS[:, None, :]) & (ids_BT[:, :, None] != 0)
  return mask_BTS


def _dot(a_BKxx, b_BKxx, contract: tuple[int, int]):
  """Batched matmul over [B, K], float32 result."""
  dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(a_BKxx, b_BKxx, dims, preferred_element_type=jnp.float32)


def _sum_over_queries(a_BKRH, b_BKRS):
  """a^T b [B, K, H, S]; the barrier keeps the small transpose apart from the product.

  XLA's fast CPU matmul takes no transposed left side; the one it falls back to takes 1.6 times as
  long, and packs b, which here is the large side.
  """
  a_BKHR = jax.lax.optimization_barrier(jnp.swapaxes(a_BKRH, 2, 3))
  return _dot(a_BKHR, b_BKRS, (3, 2))


def _scores(q_BKRH, k_BKSH, start, static: _Static, masks: _Masks, block: int):
  """Masked, scaled scores [B, K, block*G, S] float32 of the block that starts at `start`."""
  scores_BKRS = static.scale * _dot(q_BKRH, k_BKSH, (3, 3))
  B, K, R, S = scores_BKRS.shape
  mask_BTS = _mask(start, block, S, static, masks)
  mask_B1T1S = mask_BTS[:, None, :, None, :]
  scores_BKTGS = jnp.reshape(scores_BKRS, (B, K, block, R // block, S))
  scores_BKTGS = jnp.where(mask_B1T1S, scores_BKTGS, jnp.finfo(jnp.float32).min)
  return jnp.reshape(scores_BKTGS, (B, K, R, S))


def _forward_block(static: _Static, q_BKRH, k_BKSH, v_BKSV, masks, start, block):
  """(out [B, K, R, V], lse [B, K, R]) of one block of queries against the keys given."""
  scores_BKRS = _scores(q_BKRH, k_BKSH, start, static, masks, block)
  top_BKR = jnp.maximum(jnp.max(scores_BKRS, axis=-1), _FLOOR)
  probs_BKRS = jnp.exp(scores_BKRS - top_BKR[..., None])
  sum_BKR = jnp.sum(probs_BKRS, axis=-1)
  out_BKRV = _dot(probs_BKRS.astype(v_BKSV.dtype), v_BKSV, (3, 2))
  is_seen_BKR = sum_BKR > 0
  out_BKRV = out_BKRV / jnp.where(is_seen_BKR, sum_BKR, 1.0)[..., None]
  # A row that sees nothing gets lse = -_FLOOR, so that its probabilities are 0 in the backward.
  lse_BKR = jnp.where(is_seen_BKR, top_BKR + jnp.log(sum_BKR), -_FLOOR)
  return out_BKRV.astype(v_BKSV.dtype), lse_BKR


def _forward_rows(static: _Static, q_BKRH, k_BKSH, v_BKSV, masks: _Masks):
  """(out [B, K, T*G, V], lse [B, K, T*G])."""
  G, S = static.group, k_BKSH.shape[2]
  parts = []
  for first, size, block, keys in _bands(q_BKRH.shape[2] // G, S, static):
    k_BKsH, v_BKsV = k_BKSH[:, :, :keys], v_BKSV[:, :, :keys]

    def one(start, k_BKsH=k_BKsH, v_BKsV=v_BKsV, block=block):
      q_BKrH = _rows(q_BKRH, start * G, block * G)
      return _forward_block(static, q_BKrH, k_BKsH, v_BKsV, masks, start, block)

    if size == block:
      parts.append(one(first))
    else:
      stacked = jax.lax.map(one, first + block * jnp.arange(size // block))
      parts.append(jax.tree.map(_unstack_blocks, stacked))
  return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), *parts)


def _backward_block(static: _Static, q_BKRH, k_BKSH, v_BKSV, masks, start, block, dout, lse, delta):
  """(dq, dk transposed, dv transposed) in float32 that one block of queries contributes."""
  scores_BKRS = _scores(q_BKRH, k_BKSH, start, static, masks, block)
  probs_BKRS = jnp.exp(scores_BKRS - lse[..., None])
  dv_BKVS = _sum_over_queries(dout, probs_BKRS.astype(dout.dtype))
  dprobs_BKRS = _dot(dout, v_BKSV, (3, 3))
  dscores_BKRS = (static.scale * probs_BKRS * (dprobs_BKRS - delta[..., None])).astype(q_BKRH.dtype)
  dq_BKRH = _dot(dscores_BKRS, k_BKSH, (3, 2))
  dk_BKHS = _sum_over_queries(q_BKRH, dscores_BKRS)
  return dq_BKRH, dk_BKHS, dv_BKVS


def _backward_rows(static: _Static, q_BKRH, k_BKSH, v_BKSV, masks: _Masks, out, lse, dout):
  """(dq, dk, dv): sums over query blocks run from the first block to the last, in float32."""
  G, S = static.group, k_BKSH.shape[2]
  delta_BKR = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  dk_BKHS = jnp.zeros((*k_BKSH.shape[:2], k_BKSH.shape[3], S), jnp.float32)
  dv_BKVS = jnp.zeros((*v_BKSV.shape[:2], v_BKSV.shape[3], S), jnp.float32)
  dqs = []
  for first, size, block, keys in _bands(q_BKRH.shape[2] // G, S, static):
    k_BKsH, v_BKsV = k_BKSH[:, :, :keys], v_BKSV[:, :, :keys]

    def one(start, k_BKsH=k_BKsH, v_BKsV=v_BKsV, block=block):
      rows = [_rows(x, start * G, block * G) for x in (q_BKRH, dout, lse, delta_BKR)]
      return _backward_block(static, rows[0], k_BKsH, v_BKsV, masks, start, block, *rows[1:])

    def add(carry, start, one=one):
      dq, dk, dv = one(start)
      return (carry[0] + dk, carry[1] + dv), dq

    if size == block:
      dq, dk, dv = one(first)
    else:
      zeros = (jnp.zeros_like(dk_BKHS[..., :keys]), jnp.zeros_like(dv_BKVS[..., :keys]))
      (dk, dv), dq = jax.lax.scan(add, zeros, first + block * jnp.arange(size // block))
      dq = _unstack_blocks(dq)
    dqs.append(dq)
    dk_BKHS = dk_BKHS.at[..., :keys].add(dk)
    dv_BKVS = dv_BKVS.at[..., :keys].add(dv)
  dq_BKRH = jnp.concatenate(dqs, axis=2)
  dk_BKSH, dv_BKSV = jnp.swapaxes(dk_BKHS, 2, 3), jnp.swapaxes(dv_BKVS, 2, 3)
  return dq_BKRH.astype(q_BKRH.dtype), dk_BKSH.astype(k_BKSH.dtype), dv_BKSV.astype(v_BKSV.dtype)


def _rows(x_BKR, start, size: int):
  return jax.lax.dynamic_slice_in_dim(x_BKR, start, size, axis=2)


def _unstack_blocks(x_IBKr):
  """[blocks, B, K, rows, ...] -> [B, K, blocks * rows, ...]."""
  x_BKIr = jnp.moveaxis(x_IBKr, 0, 2)
  return jnp.reshape(x_BKIr, (*x_BKIr.shape[:2], -1, *x_BKIr.shape[4:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q_BKRH, k_BKSH, v_BKSV, masks: _Masks):
  return _attention_fwd(static, q_BKRH, k_BKSH, v_BKSV, masks)[0]


def _attention_fwd(static: _Static, q_BKRH, k_BKSH, v_BKSV, masks: _Masks):
  out_BKRV, lse_BKR = _forward_rows(static, q_BKRH, k_BKSH, v_BKSV, masks)
  return out_BKRV, (q_BKRH, k_BKSH, v_BKSV, masks, out_BKRV, lse_BKR)


def _attention_bwd(static: _Static, residuals, dout_BKRV):
  return *_backward_rows(static, *residuals, dout_BKRV), None


_attention.defvjp(_attention_fwd, _attention_bwd)
