"""Decoding against selected blocks behind one function; see `decode_blocks`."""

import jax.numpy as jnp

from pallas_kernels.common import spec
from pallas_kernels.sparse_attention import mosaic_tpu as tpu_config
from pallas_kernels.sparse_decode import mosaic_gpu, mosaic_tpu, ref, triton, xla
from pallas_kernels.sparse_topk import rule as rules


def decode_blocks(
  q_BTNH,
  k,
  v,
  ids_BKTW,
  *,
  block_size: int = 64,
  q_offset=0,
  kv_length=None,
  start_BT=None,
  base_B=None,
  page_table_BM=None,
  implementation: spec.Implementation = "auto",
  config: triton.TritonConfig | mosaic_gpu.MosaicGpuConfig | tpu_config.TpuConfig | None = None,
  interpret: bool | None = None,
):
  """softmax(q k^T / sqrt(H)) v over the tokens of the listed blocks, for a few queries a row.

  k, v: the cache [B, S, K, H], where position p of row b is slot base_B[b] + p (default p);
    or pages [P, block_size, K, H], where block m of row b is page page_table_BM[b, m] (int32).
  ids_BKTW: block ids, none of them twice; -1 = none, at the end.
  q_offset: int or int32 [] or [B], position of the first query; or [B, T], of each. A query sees
    tokens up to its own position.
  kv_length: queries at or beyond it are padding. start_BT: first position of the query's document
    (`rules.NOWHERE` = padding: sees nothing, gives 0 and lse -inf); None = 0.

  Returns (out [B, T, N, H] in v's dtype, lse [B, T, N] float32). No gradient: see
  `sparse_attention`. Reads 2 * W * block_size * H numbers a query and key head
  (infllm_v2.md sections 13 and 15). `config` is of the implementation of its class;
  others that `auto` tries take their own. `interpret` is of the Mosaic ones: None = on a CPU.
  """
  tiles = spec.configs(
    "sparse_decode",
    implementation,
    config,
    mosaic_gpu=mosaic_gpu.MosaicGpuConfig,
    triton=triton.TritonConfig,
    mosaic_tpu=tpu_config.TpuConfig,
  )
  spec.check_shape("sparse_decode", "q", q_BTNH, (None,) * 4)
  B, T, N, H = q_BTNH.shape
  rows = B if page_table_BM is None else None
  spec.check_shape("sparse_decode", "k", k, (rows, None, None, H))
  K = k.shape[2]
  spec.check_shape("sparse_decode", "v", v, (*k.shape[:3], None))
  spec.check_shape("sparse_decode", "ids", ids_BKTW, (B, K, T, None))
  spec.check_shape("sparse_decode", "start", start_BT, (B, T))
  spec.check_shape("sparse_decode", "base", base_B, (B,))
  spec.check_shape("sparse_decode", "page_table", page_table_BM, (B, None))
  spec.check_heads("sparse_decode", N, K)
  if page_table_BM is not None and base_B is not None:
    raise ValueError("sparse_decode: base_B and page_table_BM are both given, expected one at most")
  if page_table_BM is not None and k.shape[1] != block_size:
    raise ValueError(f"sparse_decode: pages of {k.shape[1]} tokens, expected {block_size}")
  pos_BT = jnp.asarray(q_offset, jnp.int32)
  if pos_BT.ndim == 2 and pos_BT.shape != (B, T):
    raise ValueError(f"sparse_decode: q_offset of shape {pos_BT.shape}, expected {(B, T)}, by q")
  if pos_BT.ndim < 2:
    pos_BT = jnp.broadcast_to(pos_BT, (B,))[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
  start_BT = jnp.zeros((B, T), jnp.int32) if start_BT is None else start_BT
  if kv_length is not None:
    length_B1 = jnp.broadcast_to(jnp.asarray(kv_length, jnp.int32), (B,))[:, None]
    start_BT = jnp.where(pos_BT < length_B1, start_BT, rules.NOWHERE)
  args = (q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM)
  return spec.dispatch(
    "sparse_decode",
    implementation,
    {
      "ref": lambda: ref.decode_ref(*args, block_size=block_size),
      "xla": lambda: xla.decode_xla(*args, block_size=block_size),
      "triton": lambda: triton.decode_triton(*args, block_size=block_size, config=tiles["triton"]),
      "mosaic_gpu": lambda: mosaic_gpu.decode_mosaic_gpu(
        *args, block_size=block_size, config=tiles["mosaic_gpu"], interpret=interpret
      ),
      "mosaic_tpu": lambda: mosaic_tpu.decode_tpu(
        *args, block_size=block_size, config=tiles["mosaic_tpu"], interpret=interpret
      ),
    },
  )
