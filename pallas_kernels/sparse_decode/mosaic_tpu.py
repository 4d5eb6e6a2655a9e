"""Sparse decoding on TPUs (Pallas): a row's queries of one key head are one tile.

No split over the list: a TPU core walks the blocks one after the other, fetching the next while it
works on one. A block comes with all its key heads, K times what the one head needs: their rows are
interleaved in the cache [.., K, H], and bringing them apart would copy the whole cache. Rows must
start at slot 0, or have a page table.
"""

import jax.numpy as jnp

from pallas_kernels.common import gpu, spec
from pallas_kernels.common import interpret as interpret_lib
from pallas_kernels.sparse_attention import mosaic_tpu, tiles
from pallas_kernels.sparse_attention import tpu_kernels as kernels


def decode_tpu(
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
  config = spec.requested(config or mosaic_tpu.TpuConfig(), interpret)
  B, T, N, H = q_BTNH.shape
  K, W = k.shape[2], ids_BKTW.shape[3]
  G = N // K
  gpu.check_arrays("sparse_decode", q=q_BTNH, k=k, v=v)
  if T > 31:
    raise NotImplementedError(f"sparse_decode: {T} queries a row, at most 31")
  if base_B is not None:
    raise NotImplementedError("sparse_decode: rows that start at other slots than 0 (base_B)")
  is_interpreted = interpret_lib.is_interpreted("sparse_decode", config.interpret, "tpu")
  ids_XTW = jnp.reshape(ids_BKTW, (B * K, T, W))
  num_blocks = page_table_BM.shape[1] if page_table_BM is not None else -(-k.shape[1] // block_size)
  logical_XU, bits_XU, counts_X = tiles.union(ids_XTW, num_blocks)
  batch_X, head_X = (x for x in jnp.divmod(jnp.arange(B * K, dtype=jnp.int32), K))
  if page_table_BM is None:
    physical_XU = logical_XU + num_blocks * batch_X[:, None]
  else:
    physical_XU = jnp.take_along_axis(jnp.maximum(page_table_BM, 0)[batch_X], logical_XU, axis=1)
  q_BKTGH = jnp.moveaxis(jnp.reshape(q_BTNH, (B, T, K, G, H)), 2, 1)
  q_XRH = jnp.reshape(q_BKTGH, (B * K, T * G, H))
  row = jnp.arange(T * G, dtype=jnp.int32)[:, None]

  def rows(x_BT):  # [X, R, 1]
    x_BKTG = jnp.broadcast_to(x_BT[:, None, :, None], (B, K, T, G))
    return jnp.reshape(x_BKTG, (B * K, T * G, 1))

  def blocks(x):  # [P, s, K, H]: a view; nothing of the cache is copied
    if page_table_BM is None:
      x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_size), (0, 0), (0, 0)))
    return jnp.reshape(x, (-1, block_size, K, H))

  out_XRC, lse_XR1 = kernels.forward(
    (physical_XU, logical_XU, bits_XU, counts_X, jnp.zeros_like(head_X)),
    mosaic_tpu.embed(q_XRH, K * H, head_X),
    blocks(k),
    blocks(v),
    jnp.left_shift(1, row // G),
    rows(pos_BT),
    rows(start_BT),
    block=block_size,
    scale=H**-0.5,
    interpret=is_interpreted,
  )
  out_XRH = mosaic_tpu.extract(out_XRC, H, head_X)
  out_BTKGH = jnp.moveaxis(jnp.reshape(out_XRH, (B, K, T, G, H)), 1, 2)
  lse_BTKG = jnp.moveaxis(jnp.reshape(lse_XR1, (B, K, T, G)), 1, 2)
  return jnp.reshape(out_BTKGH, q_BTNH.shape), jnp.reshape(lse_BTKG, (B, T, N))
