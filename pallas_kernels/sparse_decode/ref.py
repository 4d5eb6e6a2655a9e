"""Sparse decoding as the definition reads: rebuild each row's cache, mask, one softmax."""

import jax.numpy as jnp

from pallas_kernels.sparse_attention import ref


def unpage(pages_PsKH, page_table_BM):
  """[B, M * s, K, H]: the pages of each row in the order of its table."""
  B, M = page_table_BM.shape
  rows = pages_PsKH[jnp.maximum(page_table_BM, 0)]
  return jnp.reshape(rows, (B, M * pages_PsKH.shape[1], *pages_PsKH.shape[2:]))


def decode_ref(q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM, *, block_size):
  """As `api.decode_blocks`."""
  if page_table_BM is not None:
    k, v = unpage(k, page_table_BM), unpage(v, page_table_BM)
  if base_B is not None:
    slots_BS = base_B[:, None] + jnp.arange(k.shape[1])[None, :]
    slots_BS11 = jnp.minimum(slots_BS, k.shape[1] - 1)[:, :, None, None]
    k, v = (jnp.take_along_axis(x, jnp.broadcast_to(slots_BS11, x.shape), axis=1) for x in (k, v))
  mask_BKTS = ref.grid_mask(ids_BKTW, pos_BT, start_BT, k.shape[1], block_size)
  return ref.attend_ref(q_BTNH, k, v, mask_BKTS)
