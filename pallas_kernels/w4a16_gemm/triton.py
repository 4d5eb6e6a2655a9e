"""Packed matmul on NVIDIA GPUs (sm_80 and later) through jax-triton; no gradient.

Checked in Triton's interpreter, as machine code for sm_80 and sm_90, and on an H200. One row in 16
bits goes to `matvec`. A program adds in a fixed order; with splits XLA sums their float32 results.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, tune
from pallas_kernels.w4a16_gemm import matvec

SHARED = 227 * 1024  # bytes a program may use on sm_90; sm_80 has 163 KiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
  """Tiles; `num_splits` programs share the inputs of one tile of outputs."""

  block_m: int = 16
  block_n: int = 64
  block_k: int = 128
  num_splits: int = 1
  num_warps: int = 4
  num_stages: int = 3
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, block_m=16, block_n=16, block_k=32, num_splits=1, num_warps=1)
    if self.num_stages < 1:
      raise ValueError(f"TritonConfig.num_stages: found {self.num_stages}, expected at least 1")
    tile = self.block_k * (2 * self.block_m + self.block_n // 2)
    size = self.num_stages * tile + 2 * self.block_k * self.block_n
    if size > SHARED:
      raise ValueError(
        f"TritonConfig: found tiles of {size} bytes in 16 bits, expected at most {SHARED}"
      )


def least_block_k(bits: int) -> int:
  """A product needs 16 inputs, and a tile of inputs is split into 8 / bits products."""
  return 16 * 8 // bits


def default_config(M: int, N: int, K: int, group_size: int) -> TritonConfig:
  """Few rows: tiles as high as the rows, inputs split until about 256 programs. Many: 64 x 128.

  `group_size` is -1 or a multiple of `least_block_k`.
  """
  block_k = 128 if group_size == -1 else min(128, group_size & -group_size)
  if M > 64:
    return TritonConfig(block_m=64, block_n=128, block_k=block_k, num_warps=8)
  block_m = gpu.next_power_of_two(M, least=16)
  programs, steps = -(-N // 64), -(-K // block_k)
  splits = gpu.next_power_of_two(-(-256 // programs))
  while splits > 1 and splits * 4 > steps:  # at least four steps a program
    splits //= 2
  return TritonConfig(block_m=block_m, block_k=block_k, num_splits=splits)


def key(M: int, N: int, K: int, group_size: int, dtype) -> str:
  """Of tuned.json; rows in classes, as a decode batch changes. One group is -1 or K."""
  group_size = -1 if group_size == K else group_size
  return f"M{gpu.next_power_of_two(M, least=16)}_N{N}_K{K}_g{group_size}_{dtype}"


def matmul_triton(
  x_MK,
  codes_RN,
  scale_QN,
  zero_QN=None,
  *,
  bits: int = 4,
  low: int = -8,
  out_dtype=None,
  config: TritonConfig | matvec.MatvecConfig | None = None,
  op: str = "w4a16_gemm",
):
  """As `api.matmul`, or NotImplementedError with the reason."""
  (M, K), (R, N), num_groups = x_MK.shape, codes_RN.shape, scale_QN.shape[0]
  if M == 0:
    raise NotImplementedError(f"{op}: no rows, triton serves 1 and more")
  gpu.check_cuda(op, None if config is None else config.compute_capability)
  gpu.check_arrays(op, x=x_MK)
  if str(scale_QN.dtype) not in gpu.FLOATS:
    raise NotImplementedError(f"{op}: found scale {scale_QN.dtype}, expected one of {gpu.FLOATS}")
  if R * N >= 2**31:
    raise NotImplementedError(f"{op}: found {R * N} bytes of codes, expected less than 2^31")
  group_size = -1 if num_groups == 1 else K // num_groups
  if config is None:
    config = matvec.config_of(x_MK, codes_RN, scale_QN, bits=bits, op=op)
  if isinstance(config, matvec.MatvecConfig):
    options = dict(bits=bits, low=low, out_dtype=out_dtype, config=config, op=op)
    return matvec.matmul(x_MK, codes_RN, scale_QN, zero_QN, **options)
  least = least_block_k(bits)
  if group_size != -1 and group_size % least:
    raise NotImplementedError(
      f"{op}: group_size = {group_size}, expected -1 or a multiple of {least}"
    )
  config = config or tune.lookup(op, TritonConfig, key(M, N, K, group_size, x_MK.dtype))
  config = config or default_config(M, N, K, group_size)
  if config.block_k < least:
    raise NotImplementedError(f"{op}: block_k = {config.block_k}, expected at least {least}")
  if group_size != -1 and group_size % config.block_k:
    raise NotImplementedError(
      f"{op}: group_size = {group_size}, expected a multiple of block_k = {config.block_k}"
    )
  from pallas_kernels.w4a16_gemm import triton_kernels

  splits, out_dtype = config.num_splits, out_dtype or x_MK.dtype
  y_sMN = gpu.launch(
    triton_kernels.matmul,
    *(x_MK, codes_RN, scale_QN, scale_QN if zero_QN is None else zero_QN),
    out_shape=jax.ShapeDtypeStruct((splits, M, N), out_dtype if splits == 1 else jnp.float32),
    grid=(-(-N // config.block_n), -(-M // config.block_m), splits),
    num_warps=config.num_warps,
    num_stages=config.num_stages,
    compute_capability=config.compute_capability,
    M=M,
    N=N,
    K=K,
    R=R,
    GROUP=K if group_size == -1 else group_size,
    PER_CHANNEL=group_size == -1,
    HAS_ZERO=zero_QN is not None,
    BITS=bits,
    LOW=low,
    BM=config.block_m,
    BN=config.block_n,
    BK=config.block_k,
    SPLITS=splits,
    PRECISION=gpu.precision(x_MK.dtype),
  )
  return y_sMN[0] if splits == 1 else jnp.sum(y_sMN, axis=0).astype(out_dtype)
