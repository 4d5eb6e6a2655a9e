"""Backward pass of attention over selected blocks on Hopper GPUs (Pallas Mosaic GPU).

dq goes over the tiles of the forward pass. dk and dv go over inverse lists of units, a few queries
times the G heads of one key head; a block's units are cut into runs, whose float32 shares are added
in order: bitwise deterministic. Memory beyond the residuals: two copies of q and dout (tiles and
units), lists of 8 bytes an entry (at most T * W a key head, sorted out of place), and
8 * block * H bytes a run, at most M + T * W / run_units runs a key head.
"""

import jax.numpy as jnp

from pallas_kernels.common import gpu, mgpu
from pallas_kernels.sparse_attention import inverse, tiles, vjp
from pallas_kernels.sparse_topk import rule as rules


def check_fits(op: str, block: int, head_dim: int, itemsize: int, config) -> None:
  """NotImplementedError where the kernels' tiles exceed the shared memory."""
  from pallas_kernels.sparse_attention import mgpu_backward_kernels as kernels

  num_bytes = kernels.shared_bytes_q(block, head_dim, config.q_stages, itemsize, config.warpgroups)
  mgpu.check_shared_memory(op, num_bytes, f"{config.q_stages} stages of {block} x {head_dim}")
  num_bytes = kernels.shared_bytes_kv(head_dim, config.kv_stages, itemsize)
  mgpu.check_shared_memory(op, num_bytes, f"{config.kv_stages} stages of {head_dim} columns")


def backward(residuals, cotangents, *, block_size: int, config, interpreted: bool, listed):
  """(dq, dk, dv). residuals: (q, k, v, ids, pos, start, out, lse); config: a MosaicGpuConfig;
  listed: `tiles.listed` of the forward pass."""
  from pallas_kernels.sparse_attention import mgpu_backward_kernels as kernels
  from pallas_kernels.sparse_attention import mgpu_kernels

  q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, out_BTNH, lse_BTN = residuals
  dout_BTNH, dlse_BTN = cotangents
  (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  group, M = N // K, -(-S // block_size)
  delta_BTN = vjp.delta(out_BTNH, dout_BTNH, dlse_BTN, lse_BTN > -jnp.inf)
  lse_BTN = jnp.where(lse_BTN > -jnp.inf, lse_BTN * mgpu_kernels.LOG2E, kernels.NOTHING)
  by_row = (q_BTNH, dout_BTNH.astype(q_BTNH.dtype), lse_BTN, delta_BTN)
  k_PsKH, v_PsKH = (tiles.blocks(x, block_size) for x in (k_BSKH, v_BSKH))
  sizes = dict(group=group, scale=H**-0.5, interpreted=interpreted)

  queries, warpgroups = tiles.sizes(T, group, mgpu.ROWS, config.warpgroups)

  def in_warpgroups(x_BTN):
    x_XR = tiles.to_tiles(x_BTN, queries * warpgroups, K)
    return tiles.in_warpgroups(x_XR, warpgroups, mgpu.ROWS)

  q, dout, lse, delta = map(in_warpgroups, by_row)
  dq_XCRH = kernels.backward_q(
    listed,
    *(q, dout, k_PsKH, v_PsKH),
    tiles.of_queries(pos_BT, queries, warpgroups, -1),
    tiles.of_queries(start_BT, queries, warpgroups, rules.NOWHERE),
    *(lse, delta),
    num_stages=config.q_stages,
    **sizes,
  )
  dq_BTNH = tiles.from_warpgroups(dq_XCRH, q_BTNH.shape[0], T, queries, group, K)
  rows = config.unit_rows if group <= config.unit_rows else mgpu.ROWS
  queries = max(1, min(tiles.MAX_QUERIES, rows // group, T))
  wide = [tiles.pad_rows(tiles.to_tiles(x, queries, K), rows) for x in by_row]
  narrow = (
    tiles.query_rows(pos_BT, queries, group, rows, -1),
    tiles.query_rows(start_BT, queries, group, rows, rules.NOWHERE),
    *wide[2:],
  )
  has_triton = not interpreted and gpu.has_triton()
  listed = tiles.listed(ids_BKTW, queries, M, has_triton)
  listed = _with_edges(listed, pos_BT, start_BT, queries, block_size, K)
  runs, first_run_EM1 = _runs(listed, ids_BKTW.shape[:3], queries, M, config.run_units)
  k_PsKH, v_PsKH = (
    jnp.pad(x, ((0, 0), (0, -block_size % mgpu.ROWS), (0, 0), (0, 0))) for x in (k_PsKH, v_PsKH)
  )
  shares = kernels.backward_kv(
    runs,
    *(*wide[:2], k_PsKH, v_PsKH, *narrow),
    block_size=block_size,
    num_stages=config.kv_stages,
    **sizes,
  )
  sums = kernels.sum_runs(first_run_EM1, *shares, dtype=k_BSKH.dtype, interpreted=interpreted)
  dk_BSKH, dv_BSKH = (_to_slots(x, k_BSKH.shape, block_size) for x in sums)
  return dq_BTNH, dk_BSKH, dv_BSKH


def _with_edges(listed, pos_BT, start_BT, queries: int, block_size: int, heads: int):
  """Sets bit 31 of entries whose positions must be compared: the block goes beyond the position of
  one of the unit's queries, or begins before its document."""
  ids_XU, bits_XU, *rest = listed
  pos_Yq = tiles.of_queries(pos_BT, queries, 1, rules.NOWHERE)[:, 0]
  start_Yq = tiles.of_queries(start_BT, queries, 1, 0)[:, 0]
  low_X1 = jnp.repeat(jnp.min(pos_Yq, axis=1), heads)[:, None]
  high_X1 = jnp.repeat(jnp.max(start_Yq, axis=1), heads)[:, None]
  is_edge_XU = ((ids_XU + 1) * block_size > low_X1 + 1) | (ids_XU * block_size < high_X1)
  return ids_XU, bits_XU | jnp.left_shift(is_edge_XU.astype(jnp.int32), 31), *rest


def _runs(listed, shape, queries: int, num_blocks: int, size: int):
  """((block, begin, end of each run, unit and bits of each entry), first run of each block), each
  [B * K, ...] int32. listed: `tiles.listed` of the units; shape: (B, K, T)."""
  (B, K, T), (ids_XU, bits_XU, counts_X, _) = shape, listed
  units, U = -(-T // queries), ids_XU.shape[1]
  is_entry_XU = jnp.arange(U, dtype=jnp.int32)[None, :] < counts_X[:, None]

  def by_head(x_XU):
    return jnp.reshape(jnp.moveaxis(jnp.reshape(x_XU, (B, units, K, U)), 2, 1), (B, K, units * U))

  unit_E = jnp.repeat(jnp.arange(units, dtype=jnp.int32), U)
  block_BKE, unit_BKE, bits_BKE = inverse.sort_by_block(
    by_head(jnp.where(is_entry_XU, ids_XU, num_blocks)),
    jnp.broadcast_to(unit_E[None, None, :], (B, K, units * U)),
    by_head(bits_XU),
    num_blocks=num_blocks,
    num_items=units,
  )
  first_run, *run = inverse.runs(block_BKE, num_blocks, size)
  flat = [jnp.reshape(x, (B * K, -1)) for x in (*run, unit_BKE, bits_BKE, first_run)]
  return flat[:-1], flat[-1]


def _to_slots(x_EMsH, shape, block_size: int):
  """[B, S, K, H] of the blocks of every row and key head."""
  B, S, K, H = shape
  x = jnp.reshape(x_EMsH[:, :, :block_size], (B, K, -1, H))
  return jnp.moveaxis(x, 1, 2)[:, :S]
