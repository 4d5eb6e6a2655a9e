"""Sparse decoding on Hopper GPUs through Pallas Mosaic GPU. Deterministic; no gradient.

A row's queries of one key head are one tile of 64 rows (wgmma has no fewer); `num_splits` programs
share the union of their lists and XLA merges the splits. Rows must start at slot 0, or have a page
table. Compiled for sm_90a and checked in the interpreter; it has not run on a device.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.common import gpu, mgpu, tune
from pallas_kernels.sparse_attention import mosaic_gpu, tiles


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
  q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM, *, block_size, config=None
):
  """As `api.decode_blocks`, or NotImplementedError with the reason."""
  op = "sparse_decode"
  B, T, N, H = q_BTNH.shape
  K, W = k.shape[2], ids_BKTW.shape[3]
  G = N // K
  name = f"{tune.key(G, H, q_BTNH.dtype, 'mosaic_gpu')}_rows{B * K}"
  config = config or tune.lookup(op, MosaicGpuConfig, name) or default_config(B * K, T * W)
  interpreted = mgpu.is_interpreted(op, config.interpret)
  mgpu.check_arrays(op, interpreted, q=q_BTNH, k=k, v=v)
  mosaic_gpu.check_shapes(op, q_BTNH, k, v, block_size)
  if T * G > mgpu.ROWS or T > mosaic_gpu.MAX_QUERIES:
    raise NotImplementedError(
      f"{op}: {T} queries of {G} heads a group, mosaic_gpu serves {mgpu.ROWS} rows and "
      f"{mosaic_gpu.MAX_QUERIES} queries"
    )
  if base_B is not None:
    raise NotImplementedError(f"{op}: rows that start at other slots than 0 (base_B)")
  from pallas_kernels.sparse_attention import mgpu_kernels

  num_bytes = mgpu_kernels.shared_bytes(block_size, H, config.num_stages, q_BTNH.dtype.itemsize, 4)
  mgpu.check_shared_memory(op, num_bytes, f"{config.num_stages} stages of {block_size} x {H}")
  is_paged = page_table_BM is not None
  M = page_table_BM.shape[1] if is_paged else -(-k.shape[1] // block_size)
  ids_XTW = jnp.reshape(ids_BKTW, (B * K, T, W))
  ids_XU, bits_XU, counts_X = _one_list(ids_XTW[:, 0]) if T == 1 else tiles.union(ids_XTW, M)
  first_X = jnp.arange(B * K, dtype=jnp.int32) // K * M

  def of_rows(x_BT):
    return tiles.pad_rows(jnp.repeat(x_BT, G, axis=1), mgpu.ROWS)

  parts_XCRH, lses_XCR = mgpu_kernels.forward(
    (ids_XU, bits_XU, counts_X, first_X),
    jnp.reshape(page_table_BM, (-1,)) if is_paged else None,
    tiles.pad_rows(tiles.to_tiles(q_BTNH, T, K), mgpu.ROWS),
    k if is_paged else tiles.blocks(k, block_size),
    v if is_paged else tiles.blocks(v, block_size),
    of_rows(jnp.broadcast_to(pos_BT, (B, T))),
    of_rows(jnp.broadcast_to(start_BT, (B, T))),
    group=G,
    scale=H**-0.5,
    splits=config.num_splits,
    num_stages=config.num_stages,
    out_dtype=jnp.float32,
    interpreted=interpreted,
  )
  out_XRH, lse_XR = merge(parts_XCRH[:, :, : T * G], lses_XCR[:, :, : T * G])
  out_BTNH = tiles.from_tiles(out_XRH, B, T, T, K).astype(v.dtype)
  return out_BTNH, tiles.from_tiles(lse_XR, B, T, T, K)


def _one_list(ids_XW):
  """`tiles.union` of one query: its own list, without the union's sorts."""
  is_block_XW = ids_XW >= 0
  counts_X = jnp.sum(is_block_XW, axis=-1, dtype=jnp.int32)
  return jnp.maximum(ids_XW, 0), is_block_XW.astype(jnp.int32), counts_X


def merge(parts_XCRH, lses_XCR):
  """(out [X, R, H], lse [X, R]) of softmaxes over C parts; 0 and -inf where none saw anything."""
  top_X1R = jnp.max(lses_XCR, axis=1, keepdims=True)
  top_X1R = jnp.where(top_X1R > -jnp.inf, top_X1R, 0.0)
  weights_XCR = jnp.exp(lses_XCR - top_X1R)
  sum_XR = jnp.sum(weights_XCR, axis=1)
  safe_XR = jnp.where(sum_XR > 0, sum_XR, 1.0)
  out_XRH = jnp.sum(parts_XCRH * weights_XCR[..., None], axis=1) / safe_XR[..., None]
  return out_XRH, jnp.where(sum_XR > 0, top_X1R[:, 0] + jnp.log(safe_XR), -jnp.inf)
