"""Packed product of one row of 16-bit activations on NVIDIA GPUs: decoding, batch 1.

Bound by the bytes of the codes. Nothing runs beside the kernel unless inputs are split between
programs (their float32 results are summed by XLA). Deterministic.
"""

import dataclasses
import itertools
import math
import struct

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, tune
from pallas_kernels.w4a16_gemm import matvec_ptx as ptx

KINDS = {"bfloat16": "bf16", "float16": "f16"}
MULTIPROCESSORS = 132
MOST_PART = 64  # rows of bytes whose products are unrolled


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatvecConfig:
  """A program: 128 outputs, 1 / `num_splits` of the inputs, shared by `num_warps` warps.

  A warp takes eight rows of bytes in a step, and loads `unroll` steps together.
  """

  num_warps: int = 16
  num_splits: int = 1
  unroll: int = 4
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, num_warps=1, unroll=1)
    if self.num_warps > 32:
      raise ValueError(f"MatvecConfig.num_warps: found {self.num_warps}, expected at most 32")
    if self.num_splits < 1:
      raise ValueError(f"MatvecConfig.num_splits: found {self.num_splits}, expected at least 1")

  def part(self, K: int, N: int, group_size: int, bits: int) -> int | None:
    """Rows of bytes of one group that a warp takes together; None where outputs, warps or groups
    are not whole."""
    rows, per_byte = self.num_splits * self.num_warps, 8 // bits
    if N % 16 or K % (rows * ptx.STEP * per_byte):
      return None
    rows = K // per_byte // rows
    group = rows if group_size == -1 else group_size // per_byte
    part = math.gcd(rows, group, MOST_PART)
    is_whole = group_size == -1 or group_size % per_byte == 0
    return part if is_whole and part % ptx.STEP == 0 else None


def default_config(K: int, N: int, group_size: int, bits: int) -> MatvecConfig | None:
  """The least rows of bytes one after another, with what a wave of programs and a sum of splits
  cost (an H200: 24 and 20 rows); None where nothing fits.

  A multiprocessor holds 16 warps. More than 128 rows a warp make a long program, and are the last
  choice.
  """
  found = {}
  for warps, splits in itertools.product((16, 8, 4, 2, 1), range(1, 65)):
    config = MatvecConfig(num_warps=warps, num_splits=splits)
    if config.part(K, N, group_size, bits) is not None:
      rows, programs = K * bits // 8 // (warps * splits), splits * -(-N // ptx.OUTPUTS)
      waves = -(-programs * warps // (16 * MULTIPROCESSORS))
      cost = waves * (rows + 24) + 20 * (splits > 1)
      found[config] = (rows > 128, cost, -min(programs, MULTIPROCESSORS - 12), splits)
  return min(found, key=found.get) if found else None


def key(K: int, N: int, group_size: int, dtype) -> str:
  """Of tuned.json, beside those of tiles. One group is -1 or K."""
  group_size = -1 if group_size == K else group_size
  return f"matvec_N{N}_K{K}_g{group_size}_{dtype}"


def config_of(x_MK, codes_RN, scale_QN, *, bits: int, op: str) -> MatvecConfig | None:
  """The tuned or the heuristic's; None where the call is not one of a row in 16 bits that fits."""
  (M, K), N, num_groups = x_MK.shape, codes_RN.shape[1], scale_QN.shape[0]
  if M != 1 or str(x_MK.dtype) not in KINDS or K * bits // 8 != codes_RN.shape[0]:
    return None
  group_size = -1 if num_groups == 1 else K // num_groups
  tuned = tune.lookup(op, MatvecConfig, key(K, N, group_size, x_MK.dtype))
  return tuned or default_config(K, N, group_size, bits)


def matmul(
  x_MK, codes_RN, scale_QN, zero_QN, *, bits: int, low: int, config, op: str, out_dtype=None
):
  """As `api.matmul` of one row, or NotImplementedError where `config` does not fit."""
  (M, K), (R, N), num_groups = x_MK.shape, codes_RN.shape, scale_QN.shape[0]
  group_size = -1 if num_groups == 1 else K // num_groups
  part = config.part(K, N, group_size, bits)
  if M != 1 or str(x_MK.dtype) not in KINDS or part is None:
    raise NotImplementedError(
      f"{op}: {config} found {x_MK.dtype}{[M, K]} and {N} outputs in groups of {group_size}, "
      "expected one row in 16 bits, outputs and groups that divide"
    )
  from pallas_kernels.w4a16_gemm import triton_kernels

  kind, splits, out_dtype = KINDS[str(x_MK.dtype)], config.num_splits, out_dtype or x_MK.dtype
  magic, whole = ptx.MAGIC[kind]
  texts = dict(
    PREFETCH=ptx.prefetch(),
    X=ptx.inputs(bits),
    WORDS=ptx.words(),
    PRODUCT=ptx.product(bits, kind),
    TOTAL=ptx.total(bits, kind),
  )
  y_sN = gpu.launch(
    triton_kernels.matvec,
    *(x_MK, codes_RN, scale_QN, scale_QN if zero_QN is None else zero_QN),
    out_shape=jax.ShapeDtypeStruct((splits, N), out_dtype if splits == 1 else jnp.float32),
    grid=(-(-N // ptx.OUTPUTS), splits),
    num_warps=config.num_warps,
    num_stages=1,
    compute_capability=config.compute_capability,
    N=N,
    HAS_ZERO=zero_QN is not None,
    BITS=bits,
    MASK=(2**bits - 1) * 0x10001,
    MAGIC=magic,
    FACTOR=low - whole,
    FACTOR_PAIR=_pair(low - whole, kind),
    ROWS=R // (splits * config.num_warps),
    GROUP=R // num_groups,
    PART=part,
    WARPS=config.num_warps,
    UNROLL=min(config.unroll, part // ptx.STEP),
    **{name: text for name, (text, _) in texts.items()},
    **{f"{name}_TYPES": types for name, (_, types) in texts.items()},
  )
  return y_sN if splits == 1 else jnp.sum(y_sN, axis=0, keepdims=True).astype(out_dtype)


def _pair(number: float, kind: str) -> int:
  """Two floats of 16 bits that hold `number` exactly, as an int32."""
  packed = struct.pack("<e", number) if kind == "f16" else struct.pack("<f", number)[2:]
  return struct.unpack("<i", packed * 2)[0]
