"""Block-scaled FP8 product on Hopper GPUs through Pallas Mosaic GPU; no gradient.

Rows are padded to whole tiles of 64, outputs to whole blocks of `block_n`, inputs to 128 (copies
where a size is no multiple). Deterministic. Lowered and checked in the interpreter; it has not run
on a device.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.common import gpu, mgpu, tune
from pallas_kernels.fp8_gemm import ref, triton

OP = "fp8_gemm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
  """`block_n` outputs a program of 64 rows; `num_stages` steps of 128 inputs are in flight."""

  block_n: int = 128
  num_stages: int = 4

  def __post_init__(self):
    if self.block_n not in (64, ref.BLOCK):
      raise ValueError(f"MosaicGpuConfig.block_n: found {self.block_n}, expected 64 or {ref.BLOCK}")
    if not 2 <= self.num_stages <= 8:
      raise ValueError(f"MosaicGpuConfig.num_stages: found {self.num_stages}, expected 2 to 8")


def default_config(N: int) -> MosaicGpuConfig:
  return MosaicGpuConfig(block_n=ref.BLOCK if N % ref.BLOCK == 0 else 64)


def key(M: int, N: int, K: int, dtype) -> str:
  """Of tuned.json, beside those of Triton."""
  return f"mosaic_gpu_{triton.key(M, N, K, dtype)}"


def _padded(x, *multiples: int):
  return jnp.pad(x, [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)])


def matmul_mosaic_gpu(
  xq_MK, xs_MQ, wq_KN, ws_QP, out_dtype=jnp.float32, *, config=None, interpret: bool | None = None
):
  """As `api.matmul`, or NotImplementedError with the reason."""
  (M, K), N = xq_MK.shape, wq_KN.shape[1]
  mgpu.check_installed(OP)
  interpreted = mgpu.is_interpreted(OP, interpret)
  if str(jnp.dtype(out_dtype)) not in gpu.FLOATS:
    raise NotImplementedError(f"{OP}: found output {out_dtype}, expected one of {gpu.FLOATS}")
  config = config or tune.lookup(OP, MosaicGpuConfig, key(M, N, K, xq_MK.dtype))
  config = config or default_config(N)
  from pallas_kernels.fp8_gemm import mgpu_kernels

  itemsize = jnp.dtype(out_dtype).itemsize
  size = mgpu_kernels.shared_bytes(ref.BLOCK, config.block_n, config.num_stages, itemsize)
  mgpu.check_shared_memory(OP, size, f"{config.num_stages} stages of 64 x {config.block_n}")
  y_MN = mgpu_kernels.matmul(
    _padded(xq_MK, mgpu.ROWS, ref.BLOCK),
    _padded(xs_MQ.T, 1, mgpu.ROWS),
    _padded(wq_KN.T, config.block_n, ref.BLOCK),
    ws_QP,
    block_n=config.block_n,
    num_stages=config.num_stages,
    out_dtype=out_dtype,
    interpreted=interpreted,
  )
  return y_MN[:M, :N]
