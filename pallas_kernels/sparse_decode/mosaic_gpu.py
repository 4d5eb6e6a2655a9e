"""Sparse decoding on Hopper GPUs through Pallas Mosaic GPU. Deterministic; no gradient.

A row's queries of one key head are one tile of up to four times 64 rows (wgmma has no fewer);
`num_splits` programs share the union of their lists and XLA merges the splits. On an H200 Triton's
form was faster, and `auto` takes that first. Rows must start at slot 0, or have a page
table.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.common import gpu, mgpu, spec, tune
from pallas_kernels.sparse_attention import mosaic_gpu, tiles
from pallas_kernels.sparse_topk import rule as rules

MAX_WARPGROUPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
  """`num_splits` programs share one list, `num_stages` blocks of keys and values are in flight."""

  num_splits: int = 16
  num_stages: int = 2
  interpret: bool | None = None  # None = on a CPU

  def __post_init__(self):
    for name, least, most in (("num_splits", 1, 128), ("num_stages", 2, 8)):
      value = getattr(self, name)
      if not least <= value <= most:
        raise ValueError(f"MosaicGpuConfig.{name}: found {value}, expected {least} to {most}")


def default_config(num_tiles: int, num_listed: int) -> MosaicGpuConfig:
  """About 256 programs (two for each multiprocessor of an H100), at most one per block."""
  splits = gpu.next_power_of_two(-(-256 // max(1, num_tiles)))
  return MosaicGpuConfig(num_splits=max(1, min(splits, 64, gpu.next_power_of_two(num_listed))))


def decode_mosaic_gpu(
  q_BTNH,
  k,
  v,
  ids_BKTW,
  pos_BT,
  start_BT,
  base_B,
  page_table_BM,
  *,
  block_size,
  config=None,
  interpret=None,
):
  """As `api.decode_blocks`, or NotImplementedError with the reason."""
  op = "sparse_decode"
  B, T, N, H = q_BTNH.shape
  K, W = k.shape[2], ids_BKTW.shape[3]
  G = N // K
  name = f"{tune.key(G, H, q_BTNH.dtype, 'mosaic_gpu')}_rows{B * K}"
  config = config or tune.lookup(op, MosaicGpuConfig, name) or default_config(B * K, T * W)
  config = spec.requested(config, interpret)
  interpreted = mgpu.is_interpreted(op, config.interpret)
  mgpu.check_arrays(op, interpreted, q=q_BTNH, k=k, v=v)
  mosaic_gpu.check_shapes(op, q_BTNH, k, v, block_size)
  queries, warpgroups = tiles.sizes(T, G, mgpu.ROWS, MAX_WARPGROUPS)
  num_queries = queries * warpgroups  # T and those that are none
  if T > num_queries:
    raise NotImplementedError(
      f"{op}: {T} queries of {G} heads a group, mosaic_gpu serves {num_queries}"
    )
  if base_B is not None:
    raise NotImplementedError(f"{op}: rows that start at other slots than 0 (base_B)")
  from pallas_kernels.sparse_attention import mgpu_kernels

  size = q_BTNH.dtype.itemsize
  num_bytes = mgpu_kernels.shared_bytes(block_size, H, config.num_stages, size, warpgroups)
  mgpu.check_shared_memory(op, num_bytes, f"{config.num_stages} stages of {block_size} x {H}")
  is_paged = page_table_BM is not None
  M = page_table_BM.shape[1] if is_paged else -(-k.shape[1] // block_size)
  ids_XTW = jnp.reshape(ids_BKTW, (B * K, T, W))
  ids_XU, bits_XU, counts_X = _one_list(ids_XTW[:, 0]) if T == 1 else tiles.union(ids_XTW, M)
  first_X = jnp.arange(B * K, dtype=jnp.int32) // K * M

  parts_XSCRH, lses_XSCR = mgpu_kernels.forward(
    (ids_XU, bits_XU, counts_X, first_X),
    jnp.reshape(page_table_BM, (-1,)) if is_paged else None,
    tiles.in_warpgroups(tiles.to_tiles(q_BTNH, num_queries, K), warpgroups, mgpu.ROWS),
    k if is_paged else tiles.blocks(k, block_size),
    v if is_paged else tiles.blocks(v, block_size),
    tiles.of_queries(jnp.broadcast_to(pos_BT, (B, T)), queries, warpgroups, -1),
    tiles.of_queries(jnp.broadcast_to(start_BT, (B, T)), queries, warpgroups, rules.NOWHERE),
    group=G,
    scale=H**-0.5,
    splits=config.num_splits,
    num_stages=config.num_stages,
    out_dtype=jnp.float32,
    interpreted=interpreted,
  )
  merged = merge(parts_XSCRH, lses_XSCR)
  out, lse = (tiles.from_warpgroups(x, B, T, queries, G, K) for x in merged)
  return out.astype(v.dtype), lse


def _one_list(ids_XW):
  """`tiles.union` of one query: its own list, without the union's sorts."""
  is_block_XW = ids_XW >= 0
  counts_X = jnp.sum(is_block_XW, axis=-1, dtype=jnp.int32)
  return jnp.maximum(ids_XW, 0), is_block_XW.astype(jnp.int32), counts_X


def merge(parts_XSCRH, lses_XSCR):
  """(out [X, C, R, H], lse [X, C, R]) of softmaxes over S parts; 0 and -inf where none saw
  anything."""
  top_X1CR = jnp.max(lses_XSCR, axis=1, keepdims=True)
  top_X1CR = jnp.where(top_X1CR > -jnp.inf, top_X1CR, 0.0)
  weights_XSCR = jnp.exp(lses_XSCR - top_X1CR)
  sum_XCR = jnp.sum(weights_XSCR, axis=1)
  safe_XCR = jnp.where(sum_XCR > 0, sum_XCR, 1.0)
  out_XCRH = jnp.sum(parts_XSCRH * weights_XSCR[..., None], axis=1) / safe_XCR[..., None]
  return out_XCRH, jnp.where(sum_XCR > 0, top_X1CR[:, 0] + jnp.log(safe_XCR), -jnp.inf)
