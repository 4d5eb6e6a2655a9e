"""The k largest logits on NVIDIA GPUs: XLA finds the maximum of every chunk with all
multiprocessors, then one program a row takes the k chunks with the largest and the k largest in
them, one at a time. (XLA's sorts of both, with what lies between: 27 us on an H200.)
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu
from pallas_kernels.vocab_topk import xla

MOST = 64  # of a row: each takes a turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
  """`num_warps` of the program of a row."""

  num_warps: int = 4
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, num_warps=1)


def top_k_triton(x_NV, k: int, config: TritonConfig | None = None):
  """As `api.top_k`, or NotImplementedError with the reason."""
  config = config or TritonConfig()
  N, V = x_NV.shape
  chunk = xla.chunk_of(V, max(k, 1))
  if not 0 < k <= MOST or V < xla.LEAST * k * chunk:
    raise NotImplementedError(
      f"vocab_topk: the {k} largest of {V}, triton serves up to {MOST} of at least {xla.LEAST} "
      f"times as many as {chunk} a piece"
    )
  if N == 0:
    raise NotImplementedError("vocab_topk: no rows, triton serves 1 and more")
  gpu.check_cuda("vocab_topk", config.compute_capability)
  gpu.check_arrays("vocab_topk", x=x_NV)
  from pallas_kernels.vocab_topk import triton_kernels

  maxima_NC = xla.maxima(x_NV, chunk)
  C = maxima_NC.shape[1]
  return tuple(
    gpu.launch(
      triton_kernels.best,
      *(x_NV, maxima_NC),
      out_shape=(
        jax.ShapeDtypeStruct((N, k), x_NV.dtype),
        jax.ShapeDtypeStruct((N, k), jnp.int32),
      ),
      grid=(N,),
      num_warps=config.num_warps,
      num_stages=1,
      compute_capability=config.compute_capability,
      V=V,
      C=C,
      CP=gpu.next_power_of_two(C),
      CHUNK=chunk,
      CHUNKP=gpu.next_power_of_two(chunk),
      NUM=k,
      NUMP=gpu.next_power_of_two(k),
    )
  )
