"""Sparse decoding in XLA gathers the listed blocks: one form with `sparse_attention`'s "gather"."""

from pallas_kernels.sparse_attention import gather


def decode_xla(q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM, *, block_size):
  """As `api.decode_blocks`."""
  args = (q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM)
  return gather.attend_gather(*args, block_size=block_size)
