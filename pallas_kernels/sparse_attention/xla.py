"""Attention over selected blocks: matmuls grouped by key block, so that the work is sparse.

Neighbouring queries need not agree on any of their free blocks, and gathering 2 * W blocks a query
moves more bytes than it computes with. So, for a chunk of queries:

  local blocks   an ordinary band: tiles of queries against the keys from their first local block;
  other blocks   the (query, block) pairs are sorted by block, `tile` pairs of one block make one
                 matmul [tile * G, H] x [H, block]; its rows are added to the running softmax of
                 their queries, which begins with the band's and stays in the cache.

The backward pass is `xla_backward`. Both are bitwise deterministic: the order of every sum is
fixed. One batch row and key head at a time; `lanes` chunks are independent loops, which XLA's CPU
backend may run side by side (on two cores it did not: 1 to 16 lanes took the same time).
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

FLOOR = -1e30  # log-sum-exp of nothing while merging
NOTHING = 1e30  # lse of a row that sees nothing, so that its probabilities are 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
  """Queries a chunk, chunks a step, pairs a tile, queries and keys of a tile of the band.

  More queries a chunk fill the tiles of a block better, as long as chunk * G * V numbers stay in
  the cache.
  """

  chunk: int = 512
  lanes: int = 1
  tile: int = 16
  band_queries: int = 32
  band_keys: int = 4096

  def __post_init__(self):
    for field in dataclasses.fields(self):
      found = getattr(self, field.name)
      if found < 1:
        raise ValueError(f"XlaConfig.{field.name}: found {found}, expected 1 or more")
    if self.chunk % self.band_queries:
      raise ValueError(
        f"XlaConfig.chunk: found {self.chunk}, expected a multiple of band_queries "
        f"{self.band_queries}"
      )


def default_config(num_queries: int, group: int) -> XlaConfig:
  """Tiles of about 256 rows that stay in a core's cache, and a lane for each of up to 4 cores."""
  band = max(1, min(64, 512 // group))
  chunk = -(-min(num_queries, 512) // band) * band
  lanes = min(4, os.cpu_count() or 1, -(-num_queries // chunk))
  return XlaConfig(chunk=chunk, lanes=lanes, tile=max(4, min(64, 256 // group)), band_queries=band)


@dataclasses.dataclass(frozen=True)
class Static:
  block_size: int
  num_local: int  # blocks at the end of the past that every list contains; 0 = nothing is known
  scale: float
  config: XlaConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["token_IP", "filled_I", "block_I", "num_tiles"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Layout:
  """Pairs of one chunk in tiles of one block each.

  token_IP: query of each place, of which the first filled_I are taken; block_I: block of each tile;
  num_tiles: tiles in use.
  """

  token_IP: jax.Array
  filled_I: jax.Array
  block_I: jax.Array
  num_tiles: jax.Array


def layout(ids_CW, is_pair_CW, num_blocks: int, config: XlaConfig) -> Layout:
  """Sorts the pairs by (block, query) and pads each block's pairs to whole tiles."""
  C, W = ids_CW.shape
  P = config.tile
  max_tiles = C * W // P + min(num_blocks, C * W)
  last = jnp.int32(num_blocks * C)
  key_CW = jnp.where(is_pair_CW, ids_CW * C + jnp.arange(C, dtype=jnp.int32)[:, None], last)
  key_R = jnp.sort(jnp.reshape(key_CW, (-1,)))
  bounds = jnp.searchsorted(key_R, C * jnp.arange(num_blocks + 1, dtype=jnp.int32))
  bounds = bounds.astype(jnp.int32)
  first_M, sizes_M = bounds[:-1], bounds[1:] - bounds[:-1]
  tiles_M = -(-sizes_M // P)
  ends_M = jnp.cumsum(tiles_M)
  tile_I = jnp.arange(max_tiles, dtype=jnp.int32)
  block_I = jnp.searchsorted(ends_M, tile_I, side="right").astype(jnp.int32)
  block_I = jnp.minimum(block_I, num_blocks - 1)
  done_I = P * (tile_I - (ends_M - tiles_M)[block_I])  # pairs of the block in earlier tiles
  pair_IP = (first_M[block_I] + done_I)[:, None] + jnp.arange(P, dtype=jnp.int32)[None, :]
  return Layout(
    token_IP=key_R[jnp.clip(pair_IP, 0, C * W - 1)] % C,
    filled_I=jnp.clip(sizes_M[block_I] - done_I, 0, P),
    block_I=block_I,
    num_tiles=ends_M[-1],
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


def dot(a, b, contract: tuple[int, int], batch: int = 0):
  dims = (((contract[0],), (contract[1],)), (tuple(range(batch)), tuple(range(batch))))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


# --- The band of local blocks --------------------------------------------------------------------


def band_keys(static: Static, num_slots: int) -> tuple[int, int]:
  """(key tiles, keys a tile) that a tile of queries at any position needs."""
  blocks = static.num_local + -(-(static.config.band_queries - 1) // static.block_size)
  keys = min(num_slots, blocks * static.block_size)
  tiles = -(-keys // static.config.band_keys)
  return tiles, -(-keys // tiles)


def band_range(static: Static, pos_b, start_b, num_slots: int):
  """(first key of the band, lowest slot of every query [band]) of the tile of queries at pos_b."""
  block, (tiles, size) = static.block_size, band_keys(static, num_slots)
  low_b = (pos_b // block - static.num_local + 1) * block
  return jnp.clip(low_b[0], 0, max(0, num_slots - tiles * size)), jnp.maximum(low_b, start_b)


def band_scores(static: Static, q_RH, k_kH, first, low_b, pos_b):
  size, band = k_kH.shape[0], pos_b.shape[0]
  slots_1k = first + jnp.arange(size, dtype=jnp.int32)[None, :]
  mask_bk = (slots_1k >= low_b[:, None]) & (slots_1k <= pos_b[:, None])
  scores = jnp.reshape(static.scale * dot(q_RH, k_kH, (1, 1)), (band, -1, size))
  return jnp.reshape(jnp.where(mask_bk[:, None, :], scores, 2 * FLOOR), (-1, size))


def in_tiles(static: Static, *arrays):
  band = static.config.band_queries
  return [jnp.reshape(x, (-1, band, *x.shape[1:])) for x in arrays]


def pad_keys(static: Static, x_SH):
  """Room behind the last key, so that whole key tiles fit."""
  tiles, size = band_keys(static, x_SH.shape[0])
  return jnp.pad(x_SH, ((0, max(0, tiles * size - x_SH.shape[0])), (0, 0)))


def _band_forward(static: Static, chunk: Chunk, k_SH, v_SV):
  """(max, sum [C, G], out [C, G, V] not divided) of the local blocks."""
  C, G, H = chunk.q_CGH.shape
  S, V, band = k_SH.shape[0], v_SV.shape[1], static.config.band_queries
  if static.num_local == 0:
    zeros = jnp.zeros((C, G), jnp.float32)
    return zeros + FLOOR, zeros, jnp.zeros((C, G, V), jnp.float32)
  tiles, size = band_keys(static, S)
  k_SH, v_SV = pad_keys(static, k_SH), pad_keys(static, v_SV)

  def one(rows):
    q_bGH, pos_b, start_b = rows
    q_RH = jnp.reshape(q_bGH, (-1, H))
    first, low_b = band_range(static, pos_b, start_b, S)

    def step(i, carry):
      top_R1, sum_R1, out_RV = carry
      at = first + i * size
      k_kH, v_kV = (jax.lax.dynamic_slice_in_dim(x, at, size) for x in (k_SH, v_SV))
      scores_Rk = band_scores(static, q_RH, k_kH, at, low_b, pos_b)
      best_R1 = jnp.maximum(top_R1, jnp.max(scores_Rk, axis=1, keepdims=True))
      probs_Rk = jnp.exp(scores_Rk - best_R1)
      shrink_R1 = jnp.exp(top_R1 - best_R1)
      sum_R1 = shrink_R1 * sum_R1 + jnp.sum(probs_Rk, axis=1, keepdims=True)
      return best_R1, sum_R1, shrink_R1 * out_RV + dot(probs_Rk.astype(v_kV.dtype), v_kV, (1, 0))

    zeros_R1 = jnp.zeros((band * G, 1), jnp.float32)
    init = (zeros_R1 + FLOOR, zeros_R1, jnp.zeros((band * G, V), jnp.float32))
    return jax.lax.fori_loop(0, tiles, step, init)

  top, total, out = jax.lax.map(one, in_tiles(static, chunk.q_CGH, chunk.pos_C, chunk.start_C))
  return jnp.reshape(top, (C, G)), jnp.reshape(total, (C, G)), jnp.reshape(out, (C, G, V))


# --- The other blocks ----------------------------------------------------------------------------


def put_rows(rows_PGH, x_CGH, token_P, filled):
  """rows with x of the first `filled` tokens; the others keep what they held.

  A loop of slices is a loop of memcpy; a gather on CPU is not.
  """

  def copy(p, rows_PGH):
    row_GH = jax.lax.dynamic_index_in_dim(x_CGH, token_P[p], keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(rows_PGH, row_GH, p, axis=0)

  return jax.lax.fori_loop(0, filled, copy, rows_PGH)


def pair_scores(static: Static, chunk: Chunk, at: Layout, i, q_RH, k_sH):
  """Scores [P * G, s] of tile i; masked ones are 2 * FLOOR.

  Blocks before the local ones lie whole in the past and in the document; without the promise of
  local blocks the current one is among the pairs. Places that are not filled need no mask: they
  hold rows of an earlier tile and nobody reads what comes of them.
  """
  scores_Rs = static.scale * dot(q_RH, k_sH, (1, 1))
  if static.num_local:
    return scores_Rs
  token_P = at.token_IP[i]
  slots_1s = at.block_I[i] * static.block_size + jnp.arange(k_sH.shape[0], dtype=jnp.int32)[None, :]
  pos_P1, start_P1 = chunk.pos_C[token_P][:, None], chunk.start_C[token_P][:, None]
  mask_Ps = (slots_1s <= pos_P1) & (slots_1s >= start_P1)
  scores_PGs = jnp.reshape(scores_Rs, (token_P.shape[0], -1, k_sH.shape[0]))
  return jnp.reshape(jnp.where(mask_Ps[:, None, :], scores_PGs, 2 * FLOOR), scores_Rs.shape)


def _pairs_forward(static: Static, chunk: Chunk, k_MsH, v_MsV, state):
  """`state`, (max and sum [C, 2, G], out [C, G, V] not divided), with every pair added."""
  (_, G, H), P = chunk.q_CGH.shape, static.config.tile
  at = layout(chunk.ids_CW, chunk.is_pair_CW, k_MsH.shape[0], static.config)

  def one_tile(i, carry):
    state, q_PGH = carry
    token_P, filled = at.token_IP[i], at.filled_I[i]
    q_PGH = put_rows(q_PGH, chunk.q_CGH, token_P, filled)
    q_RH = jnp.reshape(q_PGH, (-1, H))
    k_sH, v_sV = k_MsH[at.block_I[i]], v_MsV[at.block_I[i]]
    scores_Rs = pair_scores(static, chunk, at, i, q_RH, k_sH)
    top_R1 = jnp.maximum(jnp.max(scores_Rs, axis=1, keepdims=True), FLOOR)
    probs_Rs = jnp.exp(scores_Rs - top_R1)
    out_PGV = jnp.reshape(dot(probs_Rs.astype(v_sV.dtype), v_sV, (1, 0)), (P, G, -1))
    top_PG, sum_PG = (jnp.reshape(x, (P, G)) for x in (top_R1, jnp.sum(probs_Rs, axis=1)))

    # The tile's share of the running softmax of its queries; places not filled fall off the end.
    stats_C2G, out_CGV = state
    at_P = jnp.where(jnp.arange(P) < filled, token_P, stats_C2G.shape[0])
    old_P2G = stats_C2G.at[at_P].get(mode="clip")
    best_PG = jnp.maximum(old_P2G[:, 0], top_PG)
    old_PG, new_PG = jnp.exp(old_P2G[:, 0] - best_PG), jnp.exp(top_PG - best_PG)
    stats_P2G = jnp.stack((best_PG, old_PG * old_P2G[:, 1] + new_PG * sum_PG), axis=1)
    stats_C2G = stats_C2G.at[at_P].set(stats_P2G, mode="drop")

    def add(p, out_CGV):
      out_GV = jax.lax.dynamic_index_in_dim(out_CGV, token_P[p], keepdims=False)
      out_GV = old_PG[p][:, None] * out_GV + new_PG[p][:, None] * out_PGV[p]
      return jax.lax.dynamic_update_index_in_dim(out_CGV, out_GV, token_P[p], axis=0)

    return (stats_C2G, jax.lax.fori_loop(0, filled, add, out_CGV)), q_PGH

  init = (state, jnp.zeros((P, G, H), chunk.q_CGH.dtype))
  return jax.lax.fori_loop(0, at.num_tiles, one_tile, init)[0]


def blocks(static: Static, x_SH):
  return jnp.reshape(x_SH, (-1, static.block_size, x_SH.shape[1]))


def _chunk_forward(static: Static, chunk: Chunk, k_SH, v_SV):
  """(out [C, G, V], lse [C, G])."""
  top_CG, sum_CG, out_CGV = _band_forward(static, chunk, k_SH, v_SV)
  if chunk.ids_CW.shape[1]:
    state = (jnp.stack((top_CG, sum_CG), axis=1), out_CGV)
    stats_C2G, out_CGV = _pairs_forward(
      static, chunk, blocks(static, k_SH), blocks(static, v_SV), state
    )
    top_CG, sum_CG = stats_C2G[:, 0], stats_C2G[:, 1]
  is_seen_CG = sum_CG > 0
  sum_CG = jnp.where(is_seen_CG, sum_CG, 1.0)
  lse_CG = jnp.where(is_seen_CG, top_CG + jnp.log(sum_CG), NOTHING)
  return (out_CGV / sum_CG[:, :, None]).astype(v_SV.dtype), lse_CG


# --- All rows of one head ------------------------------------------------------------------------


def in_chunks(static: Static, q_TGH, pos_T, start_T, ids_TW, *others):
  """(Chunk, *others) with two leading axes: steps and lanes."""
  if static.num_local:
    # Lists ascend and end with the local blocks: these columns hold everything else.
    lowest_T = pos_T // static.block_size - static.num_local + 1
    ids_TW = ids_TW[:, : max(0, ids_TW.shape[1] - static.num_local)]
    is_pair_TW = (ids_TW >= 0) & (ids_TW < lowest_T[:, None]) & (start_T <= pos_T)[:, None]
  else:
    is_pair_TW = ids_TW >= 0
  chunk = Chunk(q_TGH, pos_T, start_T, ids_TW, is_pair_TW)
  lead = (-1, static.config.lanes, static.config.chunk)
  return jax.tree.map(lambda x: jnp.reshape(x, (*lead, *x.shape[1:])), (chunk, *others))


def by_lane(static: Static, tree):
  return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(static.config.lanes)]


def in_order(parts):
  """Results of the lanes of every step, [steps, C, ...] each, as [T, ...]."""
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *parts)
  return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[3:])), stacked)


def head_forward(static: Static, q_TGH, k_SH, v_SV, pos_T, start_T, ids_TW):
  """(out [T, G, V], lse [T, G]); T is a multiple of lanes * chunk, S of the block."""
  (chunks,) = in_chunks(static, q_TGH, pos_T, start_T, ids_TW)

  def step(chunks):
    return [_chunk_forward(static, chunk, k_SH, v_SV) for chunk in by_lane(static, chunks)]

  return in_order(jax.lax.map(step, chunks))
