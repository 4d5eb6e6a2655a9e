"""Attention over selected blocks: matmuls grouped by key block, so that the work is sparse.

Neighbouring queries need not agree on any of their free blocks, and gathering 2 * W blocks a query
moves more bytes than it computes with. So, for a chunk of queries:

  local blocks   an ordinary band: tiles of queries against the keys from their first local block,
                 or from the first of all for queries whose lists hold the whole past;
  other blocks   the (query, block) pairs are sorted by block, `tile` pairs of one block make one
                 matmul [tile * G, H] x [H, block], whose exp(score - reference) is added to the
                 sums of its queries. These begin with the band's. Tiles run in the order of their
                 first queries, so that the sums they need next are still in the cache.

The reference of a query and head is fixed beforehand (`_reference`), so that a tile costs two
matmuls, one exp and one addition. The backward pass is `xla_backward`. Both are bitwise
deterministic: the order of every sum is fixed. One batch row, key head and chunk at a time: XLA's
CPU backend uses several cores inside one matmul, in pieces of up to about 490 rows for these
widths, and not for independent loops, heads or batches, hence the sizes of tiles. (Independent
loops share temporaries in XLA's buffer assignment, and so wait for each other. Written so that they
need none they ran side by side in a layer by itself, but in most layers of a whole model not: a
chunk behind 30k tokens took a fifth longer than with shared tiles.) Gathered queries
are written by one core and read by another: cores without a common cache lose most by that.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import xla_layout

FLOOR = -1e30  # maximum of nothing
HIGHEST = 60.0  # of score - reference: sums of exp (1e26 each) times values stay finite in float32
DEEPEST = 64.0  # of reference - best score: exp still has all its digits
COPIES = 8  # of a reference, see `_probs`
NOTHING = 1e30  # lse of a row that sees nothing, so that its probabilities are 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig:
  """Queries a chunk, pairs a tile, queries and keys of a tile of the band.

  More queries a chunk fill the tiles of a block better, and take chunk * G * (H + V) numbers.
  """

  chunk: int = 4096
  tile: int = 60
  band_queries: int = 64
  band_keys: int = 704

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
  """Tiles of 960 rows, which XLA's CPU matmul cuts into equal halves for two cores; 65536 a chunk.

  A block's last tile is half empty on average: fewer queries make smaller tiles, which one core
  multiplies. Of 2048 queries with groups of 3 at 32k tiles of 320 took 0.76 of the time of 113.
  """
  band = max(1, min(64, 1024 // group))
  num_queries = max(1, num_queries)
  chunks = -(-num_queries // min(4096, max(64, 65536 // group)))
  chunk = -(-num_queries // (chunks * band)) * band
  return XlaConfig(chunk=chunk, tile=max(4, min(960 // group, chunk // 6)), band_queries=band)


@dataclasses.dataclass(frozen=True)
class Static:
  block_size: int
  num_local: int  # blocks at the end of the past that every list contains; 0 = nothing is known
  scale: float
  config: XlaConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["q_CGH", "pos_C", "start_C", "low_C", "ids_CW", "is_pair_CW"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries at work and their lists; is_pair_CW leaves out the band, slots from low_C on."""

  q_CGH: jax.Array
  pos_C: jax.Array
  start_C: jax.Array
  low_C: jax.Array
  ids_CW: jax.Array
  is_pair_CW: jax.Array


def dot(a, b, contract: tuple[int, int]):
  dims = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


# --- The band of local blocks --------------------------------------------------------------------


def band_keys(static: Static, num_slots: int) -> int:
  """Keys of a tile: whole blocks, whole tiles for the window of local blocks."""
  tiles = -(-static.num_local * static.block_size // static.config.band_keys)
  return min(num_slots, -(-static.num_local // tiles) * static.block_size)


def band_range(pos_b, low_b, size: int):
  """(first key, key tiles that all see whole, key tiles) of a tile of queries."""
  is_real_b = low_b <= pos_b
  first = jnp.min(jnp.where(is_real_b, low_b, jnp.iinfo(jnp.int32).max))
  end = jnp.max(jnp.where(is_real_b, pos_b + 1, 0))
  tiles = jnp.where(end > first, -(-(end - first) // size), 0)
  whole = jnp.where(jnp.max(low_b) <= first, (jnp.min(pos_b) + 1 - first) // size, 0)
  return first, jnp.clip(whole, 0, tiles), tiles


def band_scores(static: Static, q_RH, k_SH, at, size: int, seen=None):
  """(scores [band * G, k] of the keys from `at` on, first slot of the keys taken).

  seen: (lowest, highest) slot of every query, None = all keys are seen. The last keys are taken
  where fewer than a tile follow, without those before `at`. Masked scores are 2 * FLOOR, by a
  minimum, which XLA fuses into the matmul (it takes a quarter longer).
  """
  taken = jnp.minimum(at, k_SH.shape[0] - size)
  k_kH = jax.lax.dynamic_slice_in_dim(k_SH, taken, size)
  scores_Rk = static.scale * dot(q_RH, k_kH, (1, 1))
  if seen is None:
    return scores_Rk, taken
  low_b, high_b = seen
  slots_1k = taken + jnp.arange(size, dtype=jnp.int32)[None, :]
  mask_bk = (slots_1k >= jnp.maximum(low_b, at)[:, None]) & (slots_1k <= high_b[:, None])
  most_bk = jnp.where(mask_bk, jnp.finfo(jnp.float32).max, 2 * FLOOR)
  scores_bGk = jnp.reshape(scores_Rk, (low_b.shape[0], -1, size))
  return jnp.reshape(jnp.minimum(scores_bGk, most_bk[:, None, :]), scores_Rk.shape), taken


def in_tiles(static: Static, *arrays):
  band = static.config.band_queries
  return [jnp.reshape(x, (-1, band, *x.shape[1:])) for x in arrays]


def _over_band(static: Static, chunk: Chunk, k_SH, others, step, init):
  """[tiles of queries, ...] of step(carry, scores [band * G, k], first key, *others of the tile).

  One call for every tile of keys, from `init` on.
  """
  size = band_keys(static, k_SH.shape[0])

  def one(rows):
    q_bGH, pos_b, low_b, *others = rows
    q_RH = jnp.reshape(q_bGH, (-1, q_bGH.shape[2]))
    first, whole, tiles = band_range(pos_b, low_b, size)

    def key_tile(seen, i, carry):
      scores_Rk, taken = band_scores(static, q_RH, k_SH, first + i * size, size, seen)
      here, _ = jax.lax.optimization_barrier((others, i))  # keeps what `_probs` does in the loop
      return step(carry, scores_Rk, taken, *here)

    carry = jax.lax.fori_loop(0, whole, functools.partial(key_tile, None), init)
    return jax.lax.fori_loop(whole, tiles, functools.partial(key_tile, (low_b, pos_b)), carry)

  arrays = in_tiles(static, chunk.q_CGH, chunk.pos_C, chunk.low_C, *others)
  return jax.lax.map(one, arrays)


def _band_top(static: Static, chunk: Chunk, k_SH):
  """The maximum [C, G] of the scores of the local blocks."""

  def step(top_R, scores_Rk, first):
    del first
    return jnp.maximum(top_R, jnp.max(scores_Rk, axis=1))

  G = chunk.q_CGH.shape[1]
  init_R = jnp.full((static.config.band_queries * G,), FLOOR)
  return jnp.reshape(_over_band(static, chunk, k_SH, (), step, init_R), (-1, G))


def _band_forward(static: Static, chunk: Chunk, k_SH, v_SV, ref_CGx):
  """(sum [C, G], out [C, G, V]) of exp(score - reference) over the local blocks."""
  (C, G, _), V = chunk.q_CGH.shape, v_SV.shape[1]

  def step(carry, scores_Rk, first, ref_bGx):
    probs_Rk = _probs(scores_Rk, ref_bGx)
    v_kV = jax.lax.dynamic_slice_in_dim(v_SV, first, probs_Rk.shape[1])
    sum_R, out_RV = carry
    out_RV = out_RV + dot(probs_Rk.astype(v_kV.dtype), v_kV, (1, 0))
    return sum_R + jnp.sum(probs_Rk, axis=1), out_RV

  rows = static.config.band_queries * G
  init = jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, V), jnp.float32)
  sum_XR, out_XRV = _over_band(static, chunk, k_SH, (ref_CGx,), step, init)
  return jnp.reshape(sum_XR, (C, G)), jnp.reshape(out_XRV, (C, G, V))


# --- The other blocks ----------------------------------------------------------------------------


def put_rows(rows_PGH, x_CGH, token_P, filled):
  """rows with x of the first `filled` tokens; the others keep what they held.

  A loop of slices is a loop of memcpy; a gather on CPU is not.
  """

  def copy(p, rows_PGH):
    row_GH = jax.lax.dynamic_index_in_dim(x_CGH, token_P[p], keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(rows_PGH, row_GH, p, axis=0)

  return jax.lax.fori_loop(0, filled, copy, rows_PGH)


def pair_scores(static: Static, chunk: Chunk, at: xla_layout.Layout, i, q_RH, k_sH):
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


def _add_rows(x_CG, token_P, new_PG):
  """x with new rows added at their tokens, but for token C.

  As x.at[token].add(new) in the form that XLA's scatter has inside, else it makes a copy of `new`.
  """
  dims = jax.lax.ScatterDimensionNumbers(tuple(range(1, x_CG.ndim + 1)), (), (0,))
  mode = jax.lax.GatherScatterMode.FILL_OR_DROP
  return jax.lax.scatter_add(x_CG, token_P[:, None], new_PG[:, None], dims, mode=mode)


def _tile_of(chunk: Chunk, at: xla_layout.Layout, i):
  """(token of each place, C where it is not filled; queries [R, H]) of tile i."""
  C, _, H = chunk.q_CGH.shape
  token_P = at.token_IP[i]
  q_PGH = chunk.q_CGH.at[token_P].get(mode="promise_in_bounds")
  is_filled_P = jnp.arange(token_P.shape[0]) < at.filled_I[i]
  return jnp.where(is_filled_P, token_P, C), jnp.reshape(q_PGH, (-1, H))


def _pairs_top(static: Static, chunk: Chunk, at: xla_layout.Layout, k_MsH, top_CG):
  """The maximum [C, G] of `top` and all scores of the pairs."""
  P, G = static.config.tile, chunk.q_CGH.shape[1]

  def one_tile(i, top_CG):
    token_P, q_RH = _tile_of(chunk, at, i)
    scores_Rs = pair_scores(static, chunk, at, i, q_RH, k_MsH[at.block_I[i]])
    top_PG = jnp.reshape(jnp.max(scores_Rs, axis=1), (P, G))
    return top_CG.at[token_P].max(top_PG, mode="drop")

  return jax.lax.fori_loop(0, at.num_tiles, one_tile, top_CG)


def _pairs_forward(
  static: Static, chunk: Chunk, at: xla_layout.Layout, k_MsH, v_MsV, ref_CGx, state
):
  """`state`, (sum [C, G], out [C, G, V]) of exp(score - reference), with every pair added."""
  P, G = static.config.tile, chunk.q_CGH.shape[1]

  def one_tile(i, state):
    sum_CG, out_CGV = state
    token_P, q_RH = _tile_of(chunk, at, i)
    k_sH, v_sV = k_MsH[at.block_I[i]], v_MsV[at.block_I[i]]
    scores_Rs = pair_scores(static, chunk, at, i, q_RH, k_sH)
    probs_Rs = _probs(scores_Rs, ref_CGx.at[token_P].get(mode="clip"))
    sum_PG = jnp.reshape(jnp.sum(probs_Rs, axis=1), (P, G))
    out_PGV = jnp.reshape(dot(probs_Rs.astype(v_sV.dtype), v_sV, (1, 0)), (P, G, -1))
    return _add_rows(sum_CG, token_P, sum_PG), _add_rows(out_CGV, token_P, out_PGV)

  return jax.lax.fori_loop(0, at.num_tiles, one_tile, state)


def blocks(static: Static, x_SH):
  return jnp.reshape(x_SH, (-1, static.block_size, x_SH.shape[1]))


# --- Both ----------------------------------------------------------------------------------------


def _probs(scores_Rs, ref_XGx):
  """exp(score - reference); x are COPIES of the reference of every row.

  Their maximum is the reference. XLA's CPU backend fuses exp into the matmul where the row's
  number comes out of a reduction, as in a softmax, and otherwise does not.
  """
  ref_R1 = jnp.max(jnp.reshape(ref_XGx, (-1, COPIES)), axis=1, keepdims=True)
  return jnp.exp(scores_Rs - ref_R1)


def _reference(static: Static, chunk: Chunk, at: xla_layout.Layout, k_SH, longest_key, dtype):
  """What is subtracted from the scores [C, G] of a query and head before exp.

  Any number gives the same softmax as their maximum does, as long as exp neither overflows nor
  loses the largest terms. No score is above `bound` (Cauchy-Schwarz), the maximum is not below the
  score of the query's own key; where these are at most HIGHEST + DEEPEST apart,
  max(own, bound - HIGHEST) will do. Otherwise the maximum is computed: one matmul a tile more.
  dtype: of the values, which exp is rounded to.
  """

  def exact():
    top_CG = jnp.full(chunk.q_CGH.shape[:2], FLOOR)
    if static.num_local:
      top_CG = _band_top(static, chunk, k_SH)
    return _pairs_top(static, chunk, at, blocks(static, k_SH), top_CG)

  if not static.num_local or dtype == jnp.float16:  # float16 would hold no exp(HIGHEST)
    return exact()
  q_CGH = chunk.q_CGH.astype(jnp.float32)
  own_CH = k_SH.at[chunk.pos_C].get(mode="clip").astype(jnp.float32)
  own_CG = static.scale * jnp.sum(q_CGH * own_CH[:, None, :], axis=-1)
  bound_CG = static.scale * longest_key * jnp.linalg.norm(q_CGH, axis=-1)
  is_near_CG = bound_CG - own_CG <= HIGHEST + DEEPEST
  sees_nothing_C1 = (chunk.start_C > chunk.pos_C)[:, None]
  near_CG = jnp.where(sees_nothing_C1, 0.0, jnp.maximum(own_CG, bound_CG - HIGHEST))
  return jax.lax.cond(jnp.all(is_near_CG | sees_nothing_C1), lambda: near_CG, exact)


def _chunk_forward(static: Static, chunk: Chunk, k_SH, v_SV, longest_key):
  """(out [C, G, V], lse [C, G]); longest_key: the largest length of a key."""
  (C, G, _), V = chunk.q_CGH.shape, v_SV.shape[1]
  num_blocks, tile = k_SH.shape[0] // static.block_size, static.config.tile
  at = xla_layout.layout(chunk.ids_CW, chunk.is_pair_CW, num_blocks, tile)
  ref_CG = _reference(static, chunk, at, k_SH, longest_key, v_SV.dtype)
  ref_CGx = jax.lax.optimization_barrier(jnp.repeat(ref_CG[:, :, None], COPIES, axis=2))
  if static.num_local:
    state = _band_forward(static, chunk, k_SH, v_SV, ref_CGx)
  else:
    state = jnp.zeros((C, G), jnp.float32), jnp.zeros((C, G, V), jnp.float32)
  k_MsH, v_MsV = blocks(static, k_SH), blocks(static, v_SV)
  sum_CG, out_CGV = _pairs_forward(static, chunk, at, k_MsH, v_MsV, ref_CGx, state)
  is_seen_CG = sum_CG > 0
  sum_CG = jnp.where(is_seen_CG, sum_CG, 1.0)
  lse_CG = jnp.where(is_seen_CG, ref_CG + jnp.log(sum_CG), NOTHING)
  return (out_CGV / sum_CG[:, :, None]).astype(v_SV.dtype), lse_CG


# --- All rows of one head ------------------------------------------------------------------------


def in_chunks(static: Static, q_TGH, pos_T, start_T, ids_TW, *others):
  """(Chunk, *others) with the chunks as leading axis."""
  is_pair_TW, low_T = ids_TW >= 0, start_T
  if static.num_local:
    # Lists ascend and end with the local blocks: the first columns hold everything else. Those that
    # hold all the past (as many blocks as there are) are all band.
    cur_T, first_T = pos_T // static.block_size, start_T // static.block_size
    is_whole_T = jnp.sum(is_pair_TW, axis=1, dtype=jnp.int32) > cur_T - first_T
    low_T = jnp.maximum((cur_T - static.num_local + 1) * static.block_size, start_T)
    low_T = jnp.where(is_whole_T, start_T, low_T)
    ids_TW = ids_TW[:, : max(1, ids_TW.shape[1] - static.num_local)]
    is_pair_TW = is_pair_TW[:, : ids_TW.shape[1]] & (ids_TW < (low_T // static.block_size)[:, None])
    is_pair_TW = is_pair_TW & (start_T <= pos_T)[:, None]
  chunk = Chunk(q_TGH, pos_T, start_T, low_T, ids_TW, is_pair_TW)
  lead = (q_TGH.shape[0] // static.config.chunk, static.config.chunk)
  return jax.tree.map(lambda x: jnp.reshape(x, (*lead, *x.shape[1:])), (chunk, *others))


def in_order(x_XC):
  """[chunks, C, ...] as [T, ...]."""
  return jnp.reshape(x_XC, (-1, *x_XC.shape[2:]))


def head_forward(static: Static, q_TGH, k_SH, v_SV, pos_T, start_T, ids_TW):
  """(out [T, G, V], lse [T, G]); T is a multiple of the chunk, S of the block."""
  (chunks,) = in_chunks(static, q_TGH, pos_T, start_T, ids_TW)
  longest_key = jnp.max(jnp.linalg.norm(k_SH.astype(jnp.float32), axis=-1))
  is_scaled = q_TGH.dtype == jnp.float32  # then the scale costs a pass over queries, not scores
  inner = dataclasses.replace(static, scale=1.0) if is_scaled else static

  def step(chunk):
    if is_scaled:
      chunk = dataclasses.replace(chunk, q_CGH=static.scale * chunk.q_CGH)
    return _chunk_forward(inner, chunk, k_SH, v_SV, longest_key)

  return jax.tree.map(in_order, jax.lax.map(step, chunks))
