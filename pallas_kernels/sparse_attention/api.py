"""Attention over selected blocks behind one function; see `attend_blocks`."""

from typing import Literal

import jax.numpy as jnp

from pallas_kernels.common import spec
from pallas_kernels.sparse_attention import gather, mosaic_gpu, mosaic_tpu, ref, triton, vjp, xla
from pallas_kernels.sparse_topk import rule as rules

Implementation = Literal[spec.Implementation, "gather"]
Config = xla.XlaConfig | triton.TritonConfig | mosaic_tpu.TpuConfig | mosaic_gpu.MosaicGpuConfig
FEW = 16  # queries for which gathering their blocks is the better form


def attend_blocks(
  q_BTNH,
  k_BSKH,
  v_BSKV,
  ids_BKTW,
  counts_BKT=None,
  *,
  block_size: int = 64,
  num_local: int = 0,
  q_offset=0,
  kv_length=None,
  start_BT=None,
  base_B=None,
  implementation: Implementation = "auto",
  config: Config | None = None,
  interpret: bool | None = None,
):
  """softmax(q k^T / sqrt(H)) v over the tokens of the listed blocks (MiniCPM4 section 2.1.2).

  ids_BKTW: block ids on the row's grid in any order, none of them twice; -1 = none, at the end.
  num_local: promise that every list ascends and ends with the last `num_local` blocks up to the
    current one (fewer where the document is younger): they then run as a band. 0 = no promise.
  counts_BKT: entries of each list, for backends that stop there.
  q_offset: int or int32 [] or [B], position of the first query; it sees tokens up to its own.
  kv_length: queries at or beyond it are padding. start_BT: first position of the query's document
    (`rules.NOWHERE` = padding: sees nothing, gives 0 and lse -inf); None = 0.
  base_B: slot of position 0 of each row (`gather` only).

  Returns (out [B, T, N, V] in v's dtype, lse [B, T, N] float32). Gradients reach q, k and v.
  `auto`: `gather` (2 * W * block rows of memory a query) for at most 16 queries, else on CUDA
  `mosaic_gpu` (Hopper, 16-bit floats; backward too, or Triton's where its own tiles do not fit)
  or `triton`, on TPU `mosaic_tpu`, else `xla`. `ref` holds T x S scores. `config` is
  of the implementation of its class; others that `auto` tries take their own. `interpret` is of
  the Mosaic ones: None = on a CPU.
  """
  tiles = spec.configs(
    "sparse_attention",
    implementation,
    config,
    xla=xla.XlaConfig,
    mosaic_gpu=mosaic_gpu.MosaicGpuConfig,
    triton=triton.TritonConfig,
    mosaic_tpu=mosaic_tpu.TpuConfig,
  )
  spec.check_shape("sparse_attention", "q", q_BTNH, (None,) * 4)
  B, T, N, H = q_BTNH.shape
  spec.check_shape("sparse_attention", "k", k_BSKH, (B, None, None, H))
  S, K = k_BSKH.shape[1:3]
  spec.check_shape("sparse_attention", "v", v_BSKV, (B, S, K, None))
  spec.check_shape("sparse_attention", "ids", ids_BKTW, (B, K, T, None))
  spec.check_shape("sparse_attention", "counts", counts_BKT, (B, K, T))
  spec.check_shape("sparse_attention", "start", start_BT, (B, T))
  spec.check_heads("sparse_attention", N, K)
  if block_size < 1 or num_local < 0:
    raise ValueError(
      f"sparse_attention: block_size, num_local: found {block_size}, {num_local}, expected at "
      "least 1, 0"
    )
  offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
  pos_BT = offset_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
  start_BT = jnp.zeros((B, T), jnp.int32) if start_BT is None else start_BT
  if kv_length is not None:
    length_B1 = jnp.broadcast_to(jnp.asarray(kv_length, jnp.int32), (B,))[:, None]
    start_BT = jnp.where(pos_BT < length_B1, start_BT, rules.NOWHERE)
  if implementation == "auto" and T <= FEW:
    implementation = "gather"
  args = (q_BTNH, k_BSKH, v_BSKV, ids_BKTW, pos_BT, start_BT)
  if implementation == "gather":
    return gather.attend_gather(*args, block_size=block_size, base_B=base_B)
  if base_B is not None:
    raise NotImplementedError("sparse_attention: base_B is served by 'gather' only")
  sizes = dict(block_size=block_size, num_local=num_local)
  return spec.dispatch(
    "sparse_attention",
    implementation,
    {
      "xla": lambda: vjp.attend_xla(*args, **sizes, config=tiles["xla"]),
      "mosaic_gpu": lambda: mosaic_gpu.attend_mosaic_gpu(
        *args, **sizes, config=tiles["mosaic_gpu"], interpret=interpret
      ),
      "triton": lambda: triton.attend_triton(*args, **sizes, config=tiles["triton"]),
      "mosaic_tpu": lambda: mosaic_tpu.attend_tpu(
        *args, **sizes, config=tiles["mosaic_tpu"], interpret=interpret
      ),
      "ref": lambda: ref.attend_ref(*args[:3], ref.grid_mask(*args[3:], S, block_size)),
    },
  )
