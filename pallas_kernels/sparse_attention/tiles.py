"""Tiles of a few queries that share the union of their block lists: what the Pallas backends share.

A tile is Q queries times the G heads of one key head; tiles go by row of the batch, then along the
queries, then by key head: x = (b * tiles + t) * K + h.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu

MAX_QUERIES = 31  # of a tile: a bit each
TILES_A_RUN = 4096
UNION_PROGRAMS = 2048  # of Triton's union: about what a Hopper GPU runs at a time
_NONE = 2**31 - 1  # sorts behind every entry


def union(ids_XQW, num_blocks: int):
  """(ids [X, U] ascending, members [X, U], counts [X]); member bit t = query t lists the block.

  Q <= 31 lists a tile, -1 = none, in any order; U = min(num_blocks, Q * W). Entries from a tile's
  count on are block 0 with no member.
  """
  X, Q, W = ids_XQW.shape
  E = Q * W
  U = min(num_blocks, E)
  t_1Q1 = jnp.arange(Q, dtype=jnp.int32)[None, :, None]
  keys_XE = jnp.where(ids_XQW >= 0, ids_XQW * 32 + t_1Q1, _NONE)
  keys_XE = jnp.sort(jnp.reshape(keys_XE, (X, E)), axis=-1)
  before_XE = jnp.pad(keys_XE[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  is_entry_XE = (keys_XE < _NONE) & (keys_XE != before_XE)
  is_first_XE = is_entry_XE & (keys_XE // 32 != before_XE // 32)
  bits_XE = jnp.where(is_entry_XE, jnp.left_shift(1, keys_XE % 32), 0)
  sums_XE1 = jnp.pad(jnp.cumsum(bits_XE, axis=-1), ((0, 0), (1, 0)))  # wraps; differences are exact
  places_XE = jnp.where(is_first_XE, jnp.arange(E, dtype=jnp.int32)[None, :], E)
  places_XU = jnp.sort(places_XE, axis=-1)[:, :U]
  next_XU = jnp.pad(places_XU[:, 1:], ((0, 0), (0, 1)), constant_values=E)
  members_XU = jnp.take_along_axis(sums_XE1, next_XU, axis=-1)
  members_XU = members_XU - jnp.take_along_axis(sums_XE1, places_XU, axis=-1)
  ids_XU = jnp.take_along_axis(keys_XE // 32, jnp.minimum(places_XU, E - 1), axis=-1)
  ids_XU = jnp.where(places_XU < E, ids_XU, 0)
  return ids_XU, members_XU.astype(jnp.int32), jnp.sum(is_first_XE, axis=-1, dtype=jnp.int32)


def sizes(num_queries: int, group: int, rows: int, warpgroups: int) -> tuple[int, int]:
  """(queries of a warpgroup of `rows` rows, warpgroups of a tile), at most as many as are asked
  for."""
  queries = max(1, min(MAX_QUERIES, rows // group, num_queries))
  return queries, max(1, min(warpgroups, MAX_QUERIES // queries, -(-num_queries // queries)))


def in_warpgroups(x_XR, warpgroups: int, rows: int):
  """[X, C, rows, ...] of the rows of C warpgroups, zeros behind each one's own."""
  x_XCr = jnp.reshape(x_XR, (x_XR.shape[0], warpgroups, -1, *x_XR.shape[2:]))
  widths = ((0, 0), (0, 0), (0, rows - x_XCr.shape[2])) + ((0, 0),) * (x_XR.ndim - 2)
  return jnp.pad(x_XCr, widths)


def from_warpgroups(x_XCR, batch: int, num_queries: int, queries: int, group: int, heads: int):
  """[B, T, N, ...] of [X, C, rows, ...] with `queries` queries of `group` heads a warpgroup."""
  X, C = x_XCR.shape[:2]
  x_XR = jnp.reshape(x_XCR[:, :, : queries * group], (X, -1, *x_XCR.shape[3:]))
  return from_tiles(x_XR, batch, num_queries, C * queries, heads)


def of_queries(x_BT, queries: int, warpgroups: int, value: int):
  """[Y, C, queries] of a number a query; `value` past the last."""
  x_BT = jnp.pad(
    x_BT, ((0, 0), (0, -x_BT.shape[1] % (queries * warpgroups))), constant_values=value
  )
  return jnp.reshape(x_BT, (-1, warpgroups, queries))


def to_tiles(x_BTN, queries: int, heads: int):
  """[X, Q * G, ...] of [B, T, N, ...], padded with zeros along T."""
  B, T, N = x_BTN.shape[:3]
  x = jnp.pad(x_BTN, ((0, 0), (0, -T % queries)) + ((0, 0),) * (x_BTN.ndim - 2))
  x = jnp.reshape(x, (B, -1, queries, heads, N // heads, *x_BTN.shape[3:]))
  x = jnp.moveaxis(x, 3, 2)  # [B, tiles, K, Q, G, ...]
  return jnp.reshape(x, (-1, queries * (N // heads), *x_BTN.shape[3:]))


def from_tiles(x_XR, batch: int, num_queries: int, queries: int, heads: int):
  """[B, T, N, ...] of [X, Q * G, ...]."""
  x = jnp.reshape(x_XR, (batch, -1, heads, queries, x_XR.shape[1] // queries, *x_XR.shape[2:]))
  x = jnp.moveaxis(x, 2, 3)
  return jnp.reshape(x, (batch, -1, heads * x.shape[4], *x_XR.shape[2:]))[:, :num_queries]


def list_tiles(ids_BKTW, queries: int):
  """[X, Q, W] of the lists, padded with -1 along T."""
  B, K, T, W = ids_BKTW.shape
  ids = jnp.pad(ids_BKTW, ((0, 0), (0, 0), (0, -T % queries), (0, 0)), constant_values=-1)
  ids = jnp.reshape(ids, (B, K, -1, queries, W))
  return jnp.reshape(jnp.moveaxis(ids, 1, 2), (-1, queries, W))


def blocks(x_BSKH, block: int):
  """[B * M, s, K, H]: whole blocks, M a row; a view where S is a multiple of the block."""
  B, S, K, H = x_BSKH.shape
  x = jnp.pad(x_BSKH, ((0, 0), (0, -S % block), (0, 0), (0, 0)))
  return jnp.reshape(x, (-1, block, K, H))


def union_in_runs(ids_XQW, num_blocks: int):
  """`union` of TILES_A_RUN tiles at a time: bounds its temporaries, six integers an entry."""
  if ids_XQW.shape[0] <= TILES_A_RUN:
    return union(ids_XQW, num_blocks)

  def one(ids_QW):
    return tuple(x[0] for x in union(ids_QW[None], num_blocks))

  return jax.lax.map(one, ids_XQW, batch_size=TILES_A_RUN)


def pad_rows(x_XR, rows: int):
  """[X, rows, ...]: zeros behind a tile's own rows."""
  return jnp.pad(x_XR, ((0, 0), (0, rows - x_XR.shape[1])) + ((0, 0),) * (x_XR.ndim - 2))


def query_rows(x_BT, queries: int, group: int, rows: int, value: int):
  """[X / K, rows] of a number a query, the same for every key head; `value` past the last query."""
  x_BT = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % queries)), constant_values=value)
  return pad_rows(jnp.reshape(jnp.repeat(x_BT, group, axis=1), (-1, queries * group)), rows)


def listed(ids_BKTW, queries: int, num_blocks: int, has_triton: bool = False):
  """(ids, bits [X, U], counts [X]) of `union` and the place [X] of each row's block 0.

  has_triton: by Triton's kernel, in a twentieth of the time of the sorts.
  """
  run = union_triton if has_triton else _union_of_lists
  ids_XU, bits_XU, counts_X = run(ids_BKTW, queries, num_blocks)
  X = ids_XU.shape[0]
  row_X = jnp.arange(X, dtype=jnp.int32) // (X // ids_BKTW.shape[0])
  return ids_XU, bits_XU, counts_X, row_X * num_blocks


def _union_of_lists(ids_BKTW, queries: int, num_blocks: int):
  return union_in_runs(list_tiles(ids_BKTW, queries), num_blocks)


def union_triton(ids_BKTW, queries: int, num_blocks: int):
  """`union` of `list_tiles` on a Hopper GPU. Temporary: 4 bytes a block for each program."""
  from pallas_kernels.sparse_attention import union_triton_kernels

  B, K, T, W = ids_BKTW.shape
  num_tiles = -(-T // queries)
  X, U = B * num_tiles * K, min(num_blocks, queries * W)
  part = min(1024, gpu.next_power_of_two(num_blocks, least=128))
  MP, programs = -(-num_blocks // part) * part, min(X, UNION_PROGRAMS)
  numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((X, U), (X,), (programs, MP))]
  return gpu.launch(
    union_triton_kernels.union,
    ids_BKTW,
    out_shape=(numbers[0], *numbers),
    grid=(programs,),
    num_warps=8,
    num_stages=1,
    compute_capability=90,
    X=X,
    TILES=num_tiles,
    T=T,
    K=K,
    W=W,
    U=U,
    QUERIES=queries,
    QP=gpu.next_power_of_two(queries),
    WIDE=min(128, gpu.next_power_of_two(W)),
    MP=MP,
    PART=part,
    PROGRAMS=programs,
  )[:3]
