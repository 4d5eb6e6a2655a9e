"""Packed product of one row of 16-bit activations on NVIDIA GPUs: decoding, batch 1.

Bound by the bytes of the codes. Nothing runs beside the kernel unless inputs are split between
programs (their float32 results are summed by XLA). Deterministic.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, tune

COLUMNS = 16  # outputs of a thread: one load of 16 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatvecConfig:
  """A program: `block_n` outputs, 1 / `num_splits` of the inputs, shared by `lanes` lanes.

  A thread has 16 outputs of one lane; it loads `unroll` rows of bytes together, `num_stages` deep.
  """

  block_n: int = 64
  lanes: int = 64
  num_splits: int = 1
  unroll: int = 4
  num_stages: int = 4
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, block_n=64, lanes=8, unroll=1)
    for name in ("num_splits", "num_stages"):
      if getattr(self, name) < 1:
        found = getattr(self, name)
        raise ValueError(f"MatvecConfig.{name}: found {found}, expected at least 1")
    if not 1 <= self.num_warps <= 32:
      raise ValueError(
        f"MatvecConfig: found {self.lanes} lanes of {self.block_n // COLUMNS} threads, expected "
        "32 to 1024 threads"
      )

  @property
  def num_warps(self) -> int:
    return self.lanes * self.block_n // COLUMNS // 32

  def fits(self, K: int, N: int, group_size: int, bits: int) -> bool:
    """Whether outputs, lanes and groups are whole."""
    lanes, rows = self.num_splits * self.lanes, self.unroll * 8 // bits
    if K % (lanes * rows) or N % self.block_n:
      return False
    return (K if group_size == -1 else group_size) % (K // lanes) == 0


def default_config(K: int, N: int, group_size: int, bits: int) -> MatvecConfig | None:
  """The fewest splits that make about two programs a multiprocessor; None where nothing fits."""
  found = None
  for splits in range(1, 65):
    config = MatvecConfig(num_splits=splits)
    if config.fits(K, N, group_size, bits):
      found = config
      if splits * (N // config.block_n) >= 200:
        break
  return found


def key(K: int, N: int, group_size: int, dtype) -> str:
  """Of tuned.json, beside those of tiles. One group is -1 or K."""
  group_size = -1 if group_size == K else group_size
  return f"matvec_N{N}_K{K}_g{group_size}_{dtype}"


def config_of(x_MK, codes_RN, scale_QN, *, bits: int, op: str) -> MatvecConfig | None:
  """The tuned or the heuristic's; None where the call is not one of a row in 16 bits that fits."""
  (M, K), N, num_groups = x_MK.shape, codes_RN.shape[1], scale_QN.shape[0]
  if M != 1 or x_MK.dtype.itemsize != 2 or K * bits // 8 != codes_RN.shape[0]:
    return None
  group_size = -1 if num_groups == 1 else K // num_groups
  tuned = tune.lookup(op, MatvecConfig, key(K, N, group_size, x_MK.dtype))
  return tuned or default_config(K, N, group_size, bits)


def matmul(x_MK, codes_RN, scale_QN, zero_QN, *, bits: int, low: int, config, op: str):
  """As `api.matmul` of one row, or NotImplementedError where `config` does not fit."""
  (M, K), (R, N), num_groups = x_MK.shape, codes_RN.shape, scale_QN.shape[0]
  group_size = K // num_groups
  if M != 1 or x_MK.dtype.itemsize != 2 or not config.fits(K, N, group_size, bits):
    raise NotImplementedError(
      f"{op}: {config} found {x_MK.dtype}{[M, K]} and {N} outputs in groups of {group_size}, "
      "expected one row in 16 bits, outputs and groups that divide"
    )
  from pallas_kernels.w4a16_gemm import triton_kernels

  splits = config.num_splits
  y_sN = gpu.launch(
    triton_kernels.matvec,
    *(x_MK, codes_RN, scale_QN, scale_QN if zero_QN is None else zero_QN),
    out_shape=jax.ShapeDtypeStruct((splits, N), x_MK.dtype if splits == 1 else jnp.float32),
    grid=(N // config.block_n, splits),
    num_warps=config.num_warps,
    num_stages=config.num_stages,
    compute_capability=config.compute_capability,
    N=N,
    K=K,
    R=R,
    GROUP=group_size,
    HAS_ZERO=zero_QN is not None,
    BITS=bits,
    LOW=low,
    BN=config.block_n,
    LANES=config.lanes,
    UNROLL=config.unroll,
    STAGES=config.num_stages,
    SPLITS=splits,
    INPUTS=gpu.next_power_of_two(K // (splits * config.lanes)),
  )
  return y_sN if splits == 1 else jnp.sum(y_sN, axis=0, keepdims=True).astype(x_MK.dtype)
