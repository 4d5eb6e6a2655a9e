"""Block-scaled FP8 product on NVIDIA GPUs (sm_89 and later) through jax-triton; no gradient.

Checked in Triton's interpreter, as machine code for sm_89 and sm_90, and on an H200. A program adds
in a fixed order.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, tune
from pallas_kernels.fp8_gemm import ref

OP = "fp8_gemm"
LEAST_CAPABILITY = 89
TILE_ROWS = 16  # walked together
SHARED = 227 * 1024  # bytes a program may use on sm_90; sm_89 has 99 KiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
  """Tiles of outputs; a step is one block of 128 inputs, as its scales are."""

  block_m: int = 64
  block_n: int = 128
  num_warps: int = 4
  num_stages: int = 3
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, block_m=16, block_n=16, num_warps=1)
    for name, most in (("block_m", 256), ("block_n", ref.BLOCK), ("num_warps", 16)):
      value = getattr(self, name)
      if value > most:
        raise ValueError(f"TritonConfig.{name}: found {value}, expected at most {most}")
    if self.num_stages < 1:
      raise ValueError(f"TritonConfig.num_stages: found {self.num_stages}, expected at least 1")
    size = self.num_stages * ref.BLOCK * (self.block_m + self.block_n)
    if size > SHARED:
      raise ValueError(f"TritonConfig: found tiles of {size} bytes, expected at most {SHARED}")


def default_config(M: int, N: int) -> TritonConfig:
  """128 x 128 with eight warps where that fills a device; else 64 x 64 with four, or fewer rows."""
  if -(-M // 128) * -(-N // 128) >= 128 and M >= 128:
    return TritonConfig(block_m=128, num_warps=8)
  return TritonConfig(block_m=min(64, gpu.next_power_of_two(M, least=16)), block_n=64)


def key(M: int, N: int, K: int, dtype) -> str:
  """Of tuned.json; rows in classes."""
  return f"M{gpu.next_power_of_two(M, least=16)}_N{N}_K{K}_{dtype}"


def matmul_triton(
  xq_MK, xs_MQ, wq_KN, ws_QP, out_dtype=jnp.float32, *, config: TritonConfig | None = None
):
  """As `api.matmul`, or NotImplementedError with the reason."""
  (M, K), N = xq_MK.shape, wq_KN.shape[1]
  if M == 0:
    raise NotImplementedError(f"{OP}: no rows, triton serves 1 and more")
  capability = None if config is None else config.compute_capability
  gpu.check_cuda(OP, capability, least=LEAST_CAPABILITY, reason="no FP8 tensor cores before it")
  if str(jnp.dtype(out_dtype)) not in gpu.FLOATS:
    raise NotImplementedError(f"{OP}: found output {out_dtype}, expected one of {gpu.FLOATS}")
  config = config or tune.lookup(OP, TritonConfig, key(M, N, K, xq_MK.dtype))
  config = config or default_config(M, N)
  from pallas_kernels.fp8_gemm import triton_kernels

  return gpu.launch(
    triton_kernels.matmul,
    *(xq_MK, xs_MQ, wq_KN.T, ws_QP),
    out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
    grid=(-(-N // config.block_n) * -(-M // config.block_m),),
    num_warps=config.num_warps,
    num_stages=config.num_stages,
    compute_capability=config.compute_capability,
    M=M,
    N=N,
    K=K,
    BLOCK=ref.BLOCK,
    BM=config.block_m,
    BN=config.block_n,
    ROWS=TILE_ROWS,
  )
