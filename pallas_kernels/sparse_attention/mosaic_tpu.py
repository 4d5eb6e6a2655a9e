"""Attention over selected blocks on TPUs (Pallas): tiles of queries over the union of their lists.

Residuals: q, k, v, out, lists [B, K, T, W] int32, lse [B, T, N] float32. Tiles go through the
kernels `chunk` at a time, as many as their lists fit in scalar memory. Forward and backward are
bitwise deterministic: dk and dv of a block add its tiles in order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, spec
from pallas_kernels.common import interpret as interpret_lib
from pallas_kernels.sparse_attention import tiles, vjp
from pallas_kernels.sparse_attention import tpu_kernels as kernels
from pallas_kernels.sparse_topk import rule as rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
  """`rows` of a tile (queries times group; 128 fill the matrix unit), `chunk` tiles a call at most.

  Fewer where the lists of so many tiles would exceed `max_list_bytes` of scalar memory.
  """

  rows: int = 128
  chunk: int = 64
  max_list_bytes: int = 2**19
  interpret: bool | None = None  # None = on a CPU

  def __post_init__(self):
    for name in ("rows", "chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"TpuConfig.{name}: found {getattr(self, name)}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class _Static:
  block: int
  queries: int  # of a tile
  group: int
  heads: int  # key heads
  scale: float
  chunk: int
  interpret: bool


def attend_tpu(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  ids_BKTW,
  pos_BT,
  start_BT,
  *,
  block_size,
  num_local=0,
  config=None,
  interpret=None,
):
  """As `vjp.attend_xla`, or NotImplementedError with the reason. The band is part of the union."""
  del num_local
  config = spec.requested(config or TpuConfig(), interpret)
  (_, _, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
  gpu.check_arrays("sparse_attention", q=q_BTNH, k=k_BSKH, v=v_BSKH)
  if H != v_BSKH.shape[-1]:
    raise NotImplementedError(f"sparse_attention: head widths {H} and {v_BSKH.shape[-1]}")
  kernels.lanes(K, H)
  is_interpreted = interpret_lib.is_interpreted("sparse_attention", config.interpret, "tpu")
  queries = max(1, min(31, config.rows // (N // K)))
  num_listed = min(-(-k_BSKH.shape[1] // block_size), queries * ids_BKTW.shape[3])
  chunk = max(1, min(config.chunk, config.max_list_bytes // (5 * 4 * num_listed)))
  static = _Static(block_size, queries, N // K, K, H**-0.5, chunk, is_interpreted)
  pos_BT = jnp.broadcast_to(pos_BT, start_BT.shape)
  return _attend(static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT)


def embed(x_XRH, width: int, head_X):
  """[X, R, C = width]: rows in the lanes of their head, zero in those of its neighbours."""
  H, C = x_XRH.shape[-1], width
  lane_C = jnp.arange(C)[None, None, :]
  place_X11 = (head_X % (C // H))[:, None, None]
  return jnp.where(lane_C // H == place_X11, jnp.tile(x_XRH, (1, 1, C // H)), 0)


def extract(x_XRC, head_dim: int, head_X):
  """[X, R, H]: the lanes of each tile's head."""
  X, R, C = x_XRC.shape
  x_XRPH = jnp.reshape(x_XRC, (X, R, C // head_dim, head_dim))
  place_X111 = (head_X % (C // head_dim))[:, None, None, None]
  return jnp.take_along_axis(x_XRPH, place_X111, axis=2)[:, :, 0]


def flat_keys(k_BSKH, block: int):
  """[B * S', K*H] with S' = S rounded up to whole blocks."""
  B, S, K, H = k_BSKH.shape
  k_BSC = jnp.pad(jnp.reshape(k_BSKH, (B, S, K * H)), ((0, 0), (0, -S % block), (0, 0)))
  return jnp.reshape(k_BSC, (-1, K * H))


def _by_tile(static: _Static, x_BT, value: int):
  """[X, R, 1] of a number a query."""
  B, T = x_BT.shape
  x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % static.queries)), constant_values=value)
  x_BTN = jnp.broadcast_to(x_BT[:, :, None], (*x_BT.shape, static.heads * static.group))
  return tiles.to_tiles(x_BTN, static.queries, static.heads)[:, :, None]


def _chunked(static: _Static, x):
  """[chunks, chunk, ...]; tiles that fill the last chunk are copies of the first."""
  X = x.shape[0]
  chunk = min(static.chunk, X)
  more = -X % chunk
  x = jnp.concatenate((x, jnp.broadcast_to(x[:1], (more, *x.shape[1:]))))
  return jnp.reshape(x, (-1, chunk, *x.shape[1:]))


def _prepare(static: _Static, q_BTNH, k_BSKH, ids_BKTW, pos_BT, start_BT):
  """(arrays of tiles, in chunks; [R, 1] member bits): what forward and backward share."""
  B, T, _, H = q_BTNH.shape
  S, K, Q = k_BSKH.shape[1], static.heads, static.queries
  M = -(-S // static.block)
  ids_XQW = tiles.list_tiles(ids_BKTW, Q)
  X = ids_XQW.shape[0]
  tile_X = jnp.arange(X, dtype=jnp.int32)
  head_X, batch_X = tile_X % K, tile_X // (X // B)
  arrays = dict(
    q=embed(tiles.to_tiles(q_BTNH, static.queries, static.heads), kernels.lanes(K, H), head_X),
    pos=_by_tile(static, pos_BT, -1),
    start=_by_tile(static, start_BT, rules.NOWHERE),
    ids=ids_XQW,
    head=head_X,
    first=batch_X * M,
    is_real=jnp.ones((X,), bool),
  )
  chunks = {name: _chunked(static, x) for name, x in arrays.items()}
  row = jnp.arange(Q * static.group, dtype=jnp.int32)[:, None]
  is_real = jnp.arange(chunks["is_real"].size) < X
  chunks["is_real"] = jnp.reshape(is_real, chunks["is_real"].shape)
  return chunks, jnp.left_shift(1, row // static.group), H, M


def _lists(static: _Static, chunk, num_blocks: int, head_dim: int):
  """(physical, logical, bits, counts, column) of the tiles of a chunk."""
  logical, bits, counts = tiles.union(chunk["ids"], num_blocks)
  column = chunk["head"] * head_dim // kernels.lanes(static.heads, head_dim)
  return logical + chunk["first"][:, None], logical, bits, counts, column.astype(jnp.int32)


def _flat(x, num_tiles: int):
  return jnp.reshape(x, (-1, *x.shape[2:]))[:num_tiles]


def _forward(static: _Static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT):
  B, T = q_BTNH.shape[:2]
  chunks, bit_R1, H, M = _prepare(static, q_BTNH, k_BSKH, ids_BKTW, pos_BT, start_BT)
  k_PC, v_PC = flat_keys(k_BSKH, static.block), flat_keys(v_BSKH, static.block)

  def one(chunk):
    out, lse = kernels.forward(
      _lists(static, chunk, M, H),
      *(chunk["q"], k_PC, v_PC, bit_R1, chunk["pos"], chunk["start"]),
      block=static.block,
      scale=static.scale,
      interpret=static.interpret,
    )
    return extract(out, H, chunk["head"]), lse[:, :, 0]

  out, lse = jax.lax.map(one, chunks)
  X = B * static.heads * -(-T // static.queries)
  return tuple(
    tiles.from_tiles(_flat(x, X), B, T, static.queries, static.heads) for x in (out, lse)
  )


def _backward(static: _Static, residuals, cotangents):
  q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, out_BTNH, lse_BTN = residuals
  dout_BTNH, dlse_BTN = cotangents
  B, T = q_BTNH.shape[:2]
  chunks, bit_R1, H, M = _prepare(static, q_BTNH, k_BSKH, ids_BKTW, pos_BT, start_BT)
  k_PC, v_PC = flat_keys(k_BSKH, static.block), flat_keys(v_BSKH, static.block)
  delta_BTN = vjp.delta(out_BTNH, dout_BTNH, dlse_BTN, lse_BTN > -jnp.inf)
  lse_BTN = jnp.where(lse_BTN > -jnp.inf, lse_BTN, kernels.NOTHING)
  to_tiles = functools.partial(tiles.to_tiles, queries=static.queries, heads=static.heads)
  chunks |= {
    "dout": _chunked(static, to_tiles(dout_BTNH.astype(q_BTNH.dtype))),
    "lse": _chunked(static, to_tiles(lse_BTN)[:, :, None]),
    "delta": _chunked(static, to_tiles(delta_BTN)[:, :, None]),
  }
  sizes = dict(block=static.block, scale=static.scale, interpret=static.interpret)
  k_lanes = kernels.lanes(static.heads, H)

  def one(carry, chunk):
    lists = _lists(static, chunk, M, H)
    dout = embed(chunk["dout"], k_lanes, chunk["head"])
    arrays = (chunk["q"], k_PC, v_PC, bit_R1, chunk["pos"], chunk["start"], dout)
    arrays += (chunk["lse"], chunk["delta"])
    dq = kernels.backward_q(lists, *arrays, **sizes)
    pairs = _pairs(lists, chunk["is_real"], k_PC.shape[0] // static.block)
    return tuple(kernels.backward_kv(pairs, *arrays, *carry, **sizes)), extract(
      dq, H, chunk["head"]
    )

  zeros = (jnp.zeros(k_PC.shape, jnp.float32),) * 2
  shares, dq = jax.lax.scan(one, zeros, chunks)
  dq_XRH = _flat(dq, B * static.heads * -(-T // static.queries))
  dq_BTNH = tiles.from_tiles(dq_XRH, B, T, static.queries, static.heads)
  dk_BSKH, dv_BSKH = (
    jnp.reshape(x, (B, M * static.block, *k_BSKH.shape[2:]))[:, : k_BSKH.shape[1]] for x in shares
  )
  return (
    dq_BTNH.astype(q_BTNH.dtype),
    dk_BSKH.astype(k_BSKH.dtype),
    dv_BSKH.astype(v_BSKH.dtype),
    None,
    None,
    None,
  )


def _pairs(lists, is_real_X, num_blocks: int):
  """(physical, logical, bits, tile, column [P]) of the lists' entries, by column, block, tile.

  Places past the last entry repeat it with no member, so that they fetch nothing new.
  """
  physical, logical, bits, counts, column = lists
  X, U = physical.shape
  is_entry = (jnp.arange(U)[None, :] < counts[:, None]) & is_real_X[:, None]
  tile_XU = jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32)[:, None], (X, U))
  column_XU = jnp.broadcast_to(column[:, None], (X, U))
  last = jnp.iinfo(jnp.int32).max
  key = jnp.where(is_entry, column_XU * num_blocks + physical, last)
  order_P = jnp.argsort(jnp.reshape(key, (-1,)), stable=True)
  num_entries = jnp.maximum(jnp.sum(is_entry), 1)
  place_P = jnp.arange(X * U)
  order_P = order_P[jnp.minimum(place_P, num_entries - 1)]
  take = functools.partial(jnp.take, indices=order_P)
  bits = jnp.where(is_entry, bits, 0)
  found = [take(jnp.reshape(x, (-1,))) for x in (physical, logical, bits, tile_XU, column_XU)]
  found[2] = jnp.where(place_P < num_entries, found[2], 0)
  return tuple(x.astype(jnp.int32) for x in found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *arrays):
  return _forward(static, *arrays)


def _attend_fwd(static: _Static, *arrays):
  out, lse = _forward(static, *arrays)
  return (out, lse), (*arrays, out, lse)


_attend.defvjp(_attend_fwd, _backward)
