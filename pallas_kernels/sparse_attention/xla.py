"""Attention over selected blocks: matmuls grouped by key block, so that the work is sparse.

Neighbouring queries rarely agree on all their blocks, and gathering 2 * W blocks a query moves more
bytes than it computes with. So, for a chunk of queries:

  local blocks   an ordinary band: a tile of queries against the keys from its first local block on;
  other blocks   the (query, block) pairs are sorted by block, `tile` pairs of one block make one
                 matmul [tile * G, H] x [H, block]; each pair leaves (max, sum, out), and the
                 queries gather theirs and merge them with the band by log-sum-exp.

A layout of pairs is made once per chunk and used forward and backward. The backward pass recomputes
the probabilities from lse; dk and dv are added up tile after tile in float32. Both passes are
bitwise deterministic: the order of every sum is fixed. One batch row and key head at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

FLOOR = -1e30  # log-sum-exp of nothing while merging
NOTHING = 1e30  # lse of a row that sees nothing, so that its probabilities are 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
  """Queries a chunk, pairs a tile, tiles a loop step, queries a tile of the band."""

  chunk: int = 256
  tile: int = 16
  tiles_per_step: int = 8
  band: int = 32

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(
          f"XlaConfig.{field.name}: found {getattr(self, field.name)}, expected >= 1"
        )


def default_config(num_queries: int, group: int) -> XlaConfig:
  tile = max(4, min(64, 256 // group))
  return XlaConfig(
    chunk=max(1, min(num_queries, 256)), tile=tile, band=max(1, min(64, 512 // group))
  )


@dataclasses.dataclass(frozen=True)
class Static:
  block_size: int
  num_local: int  # blocks at the end of the past that every list contains; 0 = nothing is known
  scale: float
  config: XlaConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["token_IP", "is_pair_IP", "block_I", "num_tiles", "place_CW"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Layout:
  """Pairs of one chunk in tiles of one block each.

  token_IP: query of each place; is_pair_IP: is the place filled; block_I: block of each tile;
  num_tiles: tiles in use; place_CW: place (tile * P + p) of every entry of the lists.
  """

  token_IP: jax.Array
  is_pair_IP: jax.Array
  block_I: jax.Array
  num_tiles: jax.Array
  place_CW: jax.Array


def layout(ids_CW, is_pair_CW, num_blocks: int, config: XlaConfig) -> Layout:
  """Sorts the pairs by (block, query) and pads each block's pairs to whole tiles."""
  C, W = ids_CW.shape
  P = config.tile
  max_tiles = C * W // P + min(num_blocks, C * W)
  max_tiles = -(-max_tiles // config.tiles_per_step) * config.tiles_per_step
  last = jnp.int32(num_blocks * C)
  key_CW = jnp.where(is_pair_CW, ids_CW * C + jnp.arange(C, dtype=jnp.int32)[:, None], last)
  key_R = jnp.sort(jnp.reshape(key_CW, (-1,)))
  bounds = jnp.searchsorted(key_R, C * jnp.arange(num_blocks + 1, dtype=jnp.int32))
  bounds = bounds.astype(jnp.int32)
  first_M, sizes_M = bounds[:-1], bounds[1:] - bounds[:-1]
  tiles_M = -(-sizes_M // P)
  ends_M = jnp.cumsum(tiles_M)
  starts_M = ends_M - tiles_M
  tile_I = jnp.arange(max_tiles, dtype=jnp.int32)
  block_I = jnp.searchsorted(ends_M, tile_I, side="right").astype(jnp.int32)
  block_I = jnp.minimum(block_I, num_blocks - 1)
  rank_IP = (tile_I - starts_M[block_I])[:, None] * P + jnp.arange(P, dtype=jnp.int32)[None, :]
  is_pair_IP = (rank_IP < sizes_M[block_I][:, None]) & (tile_I < ends_M[-1])[:, None]
  pair_IP = jnp.clip(first_M[block_I][:, None] + rank_IP, 0, C * W - 1)
  order_CW = jnp.searchsorted(key_R, key_CW).astype(jnp.int32)
  own_CW = jnp.clip(ids_CW, 0, num_blocks - 1)
  place_CW = starts_M[own_CW] * P + order_CW - first_M[own_CW]
  return Layout(
    token_IP=jnp.where(is_pair_IP, key_R[pair_IP] % C, 0),
    is_pair_IP=is_pair_IP,
    block_I=block_I,
    num_tiles=ends_M[-1],
    place_CW=jnp.where(is_pair_CW, place_CW, 0),
  )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["q_CGH", "pos_C", "start_C", "ids_CW", "is_pair_CW"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries at work and their lists; is_pair_CW leaves out what the band does."""

  q_CGH: jax.Array
  pos_C: jax.Array
  start_C: jax.Array
  ids_CW: jax.Array
  is_pair_CW: jax.Array


def _dot(a, b, contract: tuple[int, int], batch: int = 0):
  dims = (((contract[0],), (contract[1],)), (tuple(range(batch)), tuple(range(batch))))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


# --- The band of local blocks --------------------------------------------------------------------


def _band_size(static: Static, num_slots: int) -> int:
  """Keys that a tile of `band` queries at any position needs, whole blocks."""
  blocks = static.num_local + -(-(static.config.band - 1) // static.block_size)
  return min(num_slots, blocks * static.block_size)


def _band_tile(static: Static, pos_b, start_b, num_slots: int):
  """(first key, mask [band, keys]) of the tile of queries at pos_b."""
  size, block = _band_size(static, num_slots), static.block_size
  first = jnp.clip((pos_b[0] // block - static.num_local + 1) * block, 0, num_slots - size)
  slots = first + jnp.arange(size, dtype=jnp.int32)[None, :]
  pos, start = pos_b[:, None], start_b[:, None]
  is_local = slots // block > pos // block - static.num_local
  return first, is_local & (slots <= pos) & (slots >= start)


def _band_scores(static: Static, q_RH, k_kH, mask_bk):
  band, size = mask_bk.shape
  scores = jnp.reshape(static.scale * _dot(q_RH, k_kH, (1, 1)), (band, -1, size))
  return jnp.reshape(jnp.where(mask_bk[:, None, :], scores, 2 * FLOOR), (-1, size))


def _band_forward(static: Static, chunk: Chunk, k_SH, v_SV):
  """(max, sum [C, G], out [C, G, V] not divided) of the local blocks."""
  C, G, H = chunk.q_CGH.shape
  S, V, band = k_SH.shape[0], v_SV.shape[1], static.config.band
  if static.num_local == 0:
    zeros = jnp.zeros((C, G), jnp.float32)
    return zeros + FLOOR, zeros, jnp.zeros((C, G, V), jnp.float32)

  def one(rows):
    q_bGH, pos_b, start_b = rows
    first, mask_bk = _band_tile(static, pos_b, start_b, S)
    k_kH, v_kV = (jax.lax.dynamic_slice_in_dim(x, first, mask_bk.shape[1]) for x in (k_SH, v_SV))
    scores_Rk = _band_scores(static, jnp.reshape(q_bGH, (-1, H)), k_kH, mask_bk)
    top_R1 = jnp.maximum(jnp.max(scores_Rk, axis=1, keepdims=True), FLOOR)
    probs_Rk = jnp.exp(scores_Rk - top_R1)
    out_RV = _dot(probs_Rk.astype(v_kV.dtype), v_kV, (1, 0))
    return top_R1[:, 0], jnp.sum(probs_Rk, axis=1), out_RV

  rows = (chunk.q_CGH, chunk.pos_C, chunk.start_C)
  rows = jax.tree.map(lambda x: jnp.reshape(x, (C // band, band, *x.shape[1:])), rows)
  top, total, out = jax.lax.map(one, rows)
  return jnp.reshape(top, (C, G)), jnp.reshape(total, (C, G)), jnp.reshape(out, (C, G, V))


# --- The other blocks ----------------------------------------------------------------------------


def _step_tiles(static: Static, chunk: Chunk, at: Layout, i, k_MsH):
  """(queries [U, P*G, H], tokens [U, P], mask, blocks [U], keys [U, s, H]) of loop step i."""
  U = static.config.tiles_per_step
  token_UP, is_pair_UP, block_U = (
    jax.lax.dynamic_slice_in_dim(x, i * U, U) for x in (at.token_IP, at.is_pair_IP, at.block_I)
  )
  q_URH = jnp.reshape(chunk.q_CGH[token_UP], (U, -1, chunk.q_CGH.shape[-1]))
  mask_UPs = is_pair_UP[:, :, None]
  if static.num_local == 0:  # the current block is among the pairs: causality by token
    slots = block_U[:, None, None] * static.block_size
    slots = slots + jnp.arange(static.block_size, dtype=jnp.int32)[None, None, :]
    pos, start = chunk.pos_C[token_UP][:, :, None], chunk.start_C[token_UP][:, :, None]
    mask_UPs = mask_UPs & (slots <= pos) & (slots >= start)
  return q_URH, token_UP, mask_UPs, block_U, k_MsH[block_U]


def _masked(scores_URs, mask_UPs, group: int, value: float):
  U, _, size = scores_URs.shape
  scores = jnp.reshape(scores_URs, (U, -1, group, size))
  return jnp.reshape(jnp.where(mask_UPs[:, :, None, :], scores, value), scores_URs.shape)


def _pairs_forward(static: Static, chunk: Chunk, at: Layout, k_MsH, v_MsV):
  """(max, sum [places, G], out [places, G, V] not divided) of every pair."""
  G, V = chunk.q_CGH.shape[1], v_MsV.shape[2]
  U, P = static.config.tiles_per_step, static.config.tile
  places = at.token_IP.size

  def body(i, buffers):
    q_URH, _, mask_UPs, block_U, k_UsH = _step_tiles(static, chunk, at, i, k_MsH)
    scores_URs = static.scale * _dot(q_URH, k_UsH, (2, 2), 1)
    if static.num_local == 0:
      scores_URs = _masked(scores_URs, mask_UPs, G, 2 * FLOOR)
    top_UR1 = jnp.maximum(jnp.max(scores_URs, axis=2, keepdims=True), FLOOR)
    probs_URs = jnp.exp(scores_URs - top_UR1)
    out_URV = _dot(probs_URs.astype(v_MsV.dtype), v_MsV[block_U], (2, 1), 1)
    new = (
      jnp.reshape(top_UR1, (U * P, G)),
      jnp.reshape(jnp.sum(probs_URs, axis=2), (U * P, G)),
      jnp.reshape(out_URV, (U * P, G, V)),
    )
    return jax.tree.map(
      lambda b, x: jax.lax.dynamic_update_slice_in_dim(b, x, i * U * P, axis=0), buffers, new
    )

  buffers = (
    jnp.zeros((places, G), jnp.float32),
    jnp.zeros((places, G), jnp.float32),
    jnp.zeros((places, G, V), jnp.float32),
  )
  return jax.lax.fori_loop(0, -(-at.num_tiles // U), body, buffers)


def _sum_pairs(values_RGV, at: Layout, weight_CWG, init_CGV):
  """init + sum over the list of weight * value of the pair, in list order."""

  def body(w, total_CGV):
    place_C = jax.lax.dynamic_index_in_dim(at.place_CW, w, axis=1, keepdims=False)
    weight_CG = jax.lax.dynamic_index_in_dim(weight_CWG, w, axis=1, keepdims=False)
    return total_CGV + weight_CG[:, :, None] * values_RGV[place_C]

  return jax.lax.fori_loop(0, at.place_CW.shape[1], body, init_CGV)


def _chunk_layout(static: Static, chunk: Chunk, num_blocks: int) -> Layout:
  return layout(chunk.ids_CW, chunk.is_pair_CW, num_blocks, static.config)


def _chunk_forward(static: Static, chunk: Chunk, k_SH, v_SV):
  """(out [C, G, V], lse [C, G])."""
  block = static.block_size
  top_CG, sum_CG, out_CGV = _band_forward(static, chunk, k_SH, v_SV)
  if chunk.ids_CW.shape[1]:
    k_MsH, v_MsV = (jnp.reshape(x, (-1, block, x.shape[1])) for x in (k_SH, v_SV))
    at = _chunk_layout(static, chunk, k_MsH.shape[0])
    top_RG, sum_RG, out_RGV = _pairs_forward(static, chunk, at, k_MsH, v_MsV)
    top_CWG = jnp.where(chunk.is_pair_CW[:, :, None], top_RG[at.place_CW], FLOOR)
    best_CG = jnp.maximum(top_CG, jnp.max(top_CWG, axis=1))
    weight_CWG = jnp.exp(top_CWG - best_CG[:, None, :])
    weight_CWG = jnp.where(chunk.is_pair_CW[:, :, None], weight_CWG, 0.0)
    scale_CG = jnp.exp(top_CG - best_CG)
    sum_CG = scale_CG * sum_CG + jnp.sum(weight_CWG * sum_RG[at.place_CW], axis=1)
    out_CGV = _sum_pairs(out_RGV, at, weight_CWG, scale_CG[:, :, None] * out_CGV)
    top_CG = best_CG
  is_seen_CG = sum_CG > 0
  sum_CG = jnp.where(is_seen_CG, sum_CG, 1.0)
  lse_CG = jnp.where(is_seen_CG, top_CG + jnp.log(sum_CG), NOTHING)
  return (out_CGV / sum_CG[:, :, None]).astype(v_SV.dtype), lse_CG


# --- Backward ------------------------------------------------------------------------------------


def _probs_and_grads(static: Static, scores, lse, delta, dout, v, batch: int):
  """(P, dS) in float32: P = exp(S - lse), dS = scale P (dout v^T - delta) (section 11)."""
  probs = jnp.exp(scores - lse)
  dprobs = _dot(dout, v, (batch + 1, batch + 1), batch)
  return probs, static.scale * probs * (dprobs - delta)


def _add_at(total_SH, new_kH, first):
  old = jax.lax.dynamic_slice_in_dim(total_SH, first, new_kH.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(total_SH, old + new_kH, first, axis=0)


def _band_backward(static: Static, chunk: Chunk, k_SH, v_SV, dout_CGV, lse_CG, delta_CG, dk, dv):
  """(dq [C, G, H], dk, dv) with the band's share added to dk [S, H] and dv [S, V]."""
  C, G, H = chunk.q_CGH.shape
  band = static.config.band
  if static.num_local == 0:
    return jnp.zeros((C, G, H), jnp.float32), dk, dv

  def one(carry, rows):
    dk, dv = carry
    q_bGH, pos_b, start_b, dout_bGV, lse_bG, delta_bG = rows
    first, mask_bk = _band_tile(static, pos_b, start_b, k_SH.shape[0])
    k_kH, v_kV = (jax.lax.dynamic_slice_in_dim(x, first, mask_bk.shape[1]) for x in (k_SH, v_SV))
    q_RH, dout_RV = (jnp.reshape(x, (-1, x.shape[-1])) for x in (q_bGH, dout_bGV))
    scores_Rk = _band_scores(static, q_RH, k_kH, mask_bk)
    lse_R1, delta_R1 = (jnp.reshape(x, (-1, 1)) for x in (lse_bG, delta_bG))
    probs, dscores = _probs_and_grads(static, scores_Rk, lse_R1, delta_R1, dout_RV, v_kV, 0)
    dscores = dscores.astype(q_RH.dtype)
    dv = _add_at(dv, _dot(probs.astype(dout_RV.dtype), dout_RV, (0, 0)), first)
    dk = _add_at(dk, _dot(dscores, q_RH, (0, 0)), first)
    return (dk, dv), _dot(dscores, k_kH, (1, 0))

  rows = (chunk.q_CGH, chunk.pos_C, chunk.start_C, dout_CGV, lse_CG, delta_CG)
  rows = jax.tree.map(lambda x: jnp.reshape(x, (C // band, band, *x.shape[1:])), rows)
  (dk, dv), dq = jax.lax.scan(one, (dk, dv), rows)
  return jnp.reshape(dq, (C, G, H)), dk, dv


def _pairs_backward(static: Static, chunk: Chunk, k_SH, v_SV, dout_CGV, lse_CG, delta_CG, dk, dv):
  """(dq [C, G, H], dk, dv) with the pairs' share added to dk and dv."""
  (C, G, H), block = chunk.q_CGH.shape, static.block_size
  U, P = static.config.tiles_per_step, static.config.tile
  k_MsH, v_MsV = (jnp.reshape(x, (-1, block, x.shape[1])) for x in (k_SH, v_SV))
  at = _chunk_layout(static, chunk, k_MsH.shape[0])

  def body(i, carry):
    dq_RGH, dk, dv = carry
    q_URH, token_UP, mask_UPs, block_U, k_UsH = _step_tiles(static, chunk, at, i, k_MsH)
    scores_URs = static.scale * _dot(q_URH, k_UsH, (2, 2), 1)
    scores_URs = _masked(scores_URs, mask_UPs, G, 2 * FLOOR)
    dout_URV = jnp.reshape(dout_CGV[token_UP], (U, P * G, -1))
    lse_UR1, delta_UR1 = (jnp.reshape(x[token_UP], (U, -1, 1)) for x in (lse_CG, delta_CG))
    probs, dscores = _probs_and_grads(
      static, scores_URs, lse_UR1, delta_UR1, dout_URV, v_MsV[block_U], 1
    )
    dscores = dscores.astype(q_URH.dtype)
    dk_UsH = _dot(dscores, q_URH, (1, 1), 1)
    dv_UsV = _dot(probs.astype(dout_URV.dtype), dout_URV, (1, 1), 1)
    for u in range(U):
      dk = _add_at(dk, dk_UsH[u], block_U[u] * block)
      dv = _add_at(dv, dv_UsV[u], block_U[u] * block)
    new = jnp.reshape(_dot(dscores, k_UsH, (2, 1), 1), (U * P, G, H))
    return jax.lax.dynamic_update_slice_in_dim(dq_RGH, new, i * U * P, axis=0), dk, dv

  dq_RGH = jnp.zeros((at.token_IP.size, G, H), jnp.float32)
  dq_RGH, dk, dv = jax.lax.fori_loop(0, -(-at.num_tiles // U), body, (dq_RGH, dk, dv))
  weight_CWG = jnp.broadcast_to(
    chunk.is_pair_CW[:, :, None].astype(jnp.float32), (*chunk.is_pair_CW.shape, G)
  )
  dq_CGH = _sum_pairs(dq_RGH, at, weight_CWG, jnp.zeros((C, G, H), jnp.float32))
  return dq_CGH, dk, dv


# --- All rows of one head ------------------------------------------------------------------------


def _chunks(static: Static, q_TGH, pos_T, start_T, ids_TW, *others):
  """(Chunk with a leading axis of chunks, others alike)."""
  lowest_T = jnp.where(start_T <= pos_T, pos_T // static.block_size - static.num_local + 1, 0)
  if static.num_local:
    # Lists ascend and end with the local blocks: these columns hold everything else.
    ids_TW = ids_TW[:, : max(0, ids_TW.shape[1] - static.num_local)]
    is_pair_TW = (ids_TW >= 0) & (ids_TW < lowest_T[:, None])
  else:
    is_pair_TW = ids_TW >= 0
  chunk = Chunk(q_TGH, pos_T, start_T, ids_TW, is_pair_TW)
  size = static.config.chunk
  return jax.tree.map(lambda x: jnp.reshape(x, (-1, size, *x.shape[1:])), (chunk, *others))


def head_forward(static: Static, q_TGH, k_SH, v_SV, pos_T, start_T, ids_TW):
  """(out [T, G, V], lse [T, G]); T is a multiple of the chunk, S of the block."""
  (chunks,) = _chunks(static, q_TGH, pos_T, start_T, ids_TW)
  out, lse = jax.lax.map(lambda c: _chunk_forward(static, c, k_SH, v_SV), chunks)
  return tuple(jnp.reshape(x, (-1, *x.shape[2:])) for x in (out, lse))


def head_backward(static: Static, q_TGH, k_SH, v_SV, pos_T, start_T, ids_TW, lse, delta, dout):
  """(dq, dk, dv), dk and dv summed over the group and all queries in float32."""
  chunks = _chunks(static, q_TGH, pos_T, start_T, ids_TW, dout, lse, delta)

  def one(carry, x):
    chunk, *rest = x
    dq, dk, dv = _band_backward(static, chunk, k_SH, v_SV, *rest, *carry)
    if chunk.ids_CW.shape[1]:
      more, dk, dv = _pairs_backward(static, chunk, k_SH, v_SV, *rest, dk, dv)
      dq = dq + more
    return (dk, dv), dq

  zeros = (jnp.zeros(k_SH.shape, jnp.float32), jnp.zeros(v_SV.shape, jnp.float32))
  (dk, dv), dq = jax.lax.scan(one, zeros, chunks)
  dq = jnp.reshape(dq, q_TGH.shape)
  return dq.astype(q_TGH.dtype), dk.astype(k_SH.dtype), dv.astype(v_SV.dtype)
