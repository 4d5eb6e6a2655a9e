"""Packed matmul on Hopper GPUs through Pallas Mosaic GPU; its gradient is in `vjp.py`.

Up to FEW rows are served by `mgpu_few_kernels` in blocks of up to 64, padded to a multiple of 8;
more by whole tiles of 64 (`mgpu_kernels`). Outputs and inputs are padded to whole tiles (a copy of
the codes where their sizes are no multiples). Deterministic: splits are summed in order by XLA.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.common import mgpu, tune
from pallas_kernels.w4a16_gemm import triton

FEW = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
  """A program: up to 64 rows, 1 / `num_splits` of the inputs, `num_stages` steps in flight.

  block_n outputs where there are more than FEW rows. With fewer always 128, and `num_warpgroups`
  share the inputs: above 2 their registers are enough for 16 rows only.
  """

  block_n: int = 64
  num_splits: int = 1
  num_stages: int = 3
  num_warpgroups: int = 2

  def __post_init__(self):
    for name, choices in (
      ("block_n", (64, 128)),
      ("num_splits", (1, 2, 4, 8, 16, 32)),
      ("num_stages", (2, 3, 4, 5, 6)),
      ("num_warpgroups", (1, 2, 4)),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(f"MosaicGpuConfig.{name}: found {value}, expected one of {choices}")


def default_config(M: int, N: int, K: int, block_k: int) -> MosaicGpuConfig:
  """Few rows: inputs split until there is about a program of at least a step a multiprocessor.

  Many: 128 outputs a program with 4 bits; steps of 2 bits are twice as long.
  """
  stages = 3 if block_k == 128 else 2
  if M > FEW:
    return MosaicGpuConfig(block_n=128 if block_k == 128 else 64, num_stages=stages)
  programs, steps, splits = -(-N // 128) * -(-M // 64), -(-K // block_k), 1
  warpgroups = 4 if M <= 16 else 2
  while splits < 32 and 2 * splits * programs <= 160 and splits * warpgroups * 2 <= steps:
    splits *= 2
  return MosaicGpuConfig(num_splits=splits, num_stages=stages, num_warpgroups=warpgroups)


def key(M: int, N: int, K: int, group_size: int, dtype) -> str:
  """Of tuned.json, beside those of Triton."""
  return f"mosaic_gpu_{triton.key(M, N, K, group_size, dtype)}"


def matmul_mosaic_gpu(
  x_MK,
  codes_RN,
  scale_QN,
  zero_QN=None,
  *,
  bits: int = 4,
  low: int = -8,
  out_dtype=None,
  config: MosaicGpuConfig | None = None,
  interpret: bool | None = None,
  op: str = "w4a16_gemm",
):
  """As `api.matmul`, or NotImplementedError with the reason."""
  (M, K), N, num_groups = x_MK.shape, codes_RN.shape[1], scale_QN.shape[0]
  if M == 0:
    raise NotImplementedError(f"{op}: no rows, mosaic_gpu serves 1 and more")
  mgpu.check_installed(op)
  interpreted = mgpu.is_interpreted(op, interpret)
  mgpu.check_arrays(op, interpreted, x=x_MK)
  from pallas_kernels.w4a16_gemm import mgpu_kernels

  block_k = mgpu_kernels.block_inputs(bits)
  group_size = -1 if num_groups == 1 else K // num_groups
  if group_size != -1 and group_size % block_k:
    raise NotImplementedError(
      f"{op}: group_size = {group_size}, mosaic_gpu serves -1 and multiples of {block_k}"
    )
  config = config or tune.lookup(op, MosaicGpuConfig, key(M, N, K, group_size, x_MK.dtype))
  config = config or default_config(M, N, K, block_k)
  out_dtype = out_dtype or x_MK.dtype
  if M <= FEW:
    options = (config, bits, low, out_dtype, interpreted, op)
    return _few_rows(x_MK, codes_RN, scale_QN, zero_QN, *options)
  block_n, stages = config.block_n, config.num_stages
  size = mgpu_kernels.shared_bytes(block_n, stages, bits, x_MK.dtype.itemsize)
  mgpu.check_shared_memory(op, size, f"{stages} stages of {block_k} x {block_n}")
  if zero_QN is not None:
    zero_QN = mgpu.padded(zero_QN.astype(jnp.int32), 1, block_n)
  y_sMN = mgpu_kernels.matmul(
    _in_fields(mgpu.padded(x_MK, mgpu.ROWS, block_k), block_k, 8 // bits),
    mgpu.padded(codes_RN, mgpu.ROWS, block_n),
    mgpu.padded(scale_QN.astype(jnp.float32), 1, block_n),
    zero_QN,
    bits=bits,
    low=low,
    block_n=block_n,
    splits=config.num_splits,
    num_stages=stages,
    out_dtype=out_dtype,
    interpreted=interpreted,
  )
  y_MN = y_sMN[0] if config.num_splits == 1 else jnp.sum(y_sMN, axis=0).astype(out_dtype)
  return y_MN[:M, :N]


def _few_rows(x_MK, codes_RN, scale_QN, zero_QN, config, bits, low, out_dtype, interpreted, op):
  from pallas_kernels.w4a16_gemm import mgpu_few_kernels as kernels

  M, N, stages = x_MK.shape[0], codes_RN.shape[1], config.num_stages
  blocks = max(1, -(-M // kernels.MOST_ROWS))
  height = max(8, -(-M // blocks // 8) * 8)
  width, block_k = kernels.fragments.ROWS, kernels.BYTES * 8 // bits
  warpgroups = config.num_warpgroups
  if warpgroups > 2 and height > 16:
    raise NotImplementedError(
      f"{op}: num_warpgroups = {warpgroups}, at most 2 for programs of {height} rows (registers)"
    )
  size = kernels.shared_bytes(height, warpgroups, stages, bits, x_MK.dtype.itemsize)
  mgpu.check_shared_memory(op, size, f"{stages} stages of {block_k} x {width}")
  is_cut = M < 8 and not interpreted  # one tile: copies to shared memory add the rows it lacks
  y_sMN = kernels.matmul(
    mgpu.padded(x_MK, 1 if is_cut else blocks * height, block_k),
    mgpu.padded(codes_RN, kernels.BYTES, width),
    mgpu.padded(scale_QN, 1, width),
    None if zero_QN is None else mgpu.padded(zero_QN, 1, width),
    height=height,
    rows=M if blocks == 1 else blocks * height,
    bits=bits,
    low=low,
    splits=config.num_splits,
    warpgroups=warpgroups,
    num_stages=stages,
    out_dtype=out_dtype,
    interpreted=interpreted,
  )
  y_MN = y_sMN[0] if config.num_splits == 1 else jnp.sum(y_sMN, axis=0).astype(out_dtype)
  return y_MN[:M, :N]


def _in_fields(x_MK, block_k: int, per_byte: int):
  """Every step's inputs: those of the lowest bits of its bytes, then those of the next."""
  M, K = x_MK.shape
  x = jnp.reshape(x_MK, (M, K // block_k, block_k // per_byte, per_byte))
  return jnp.reshape(jnp.swapaxes(x, 2, 3), (M, K))
