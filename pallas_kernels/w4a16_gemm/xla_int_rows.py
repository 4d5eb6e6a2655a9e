"""Packed matmul of few int8 rows on a CPU: products and sums of 16-bit integers, in two loops.

As in `xla_rows` the lanes are the outputs. An unsigned code of b bits times an int8 is at most
127 (2^b - 1), so a 16-bit lane holds the sum of 16 products of 4-bit codes, 32 of 2-bit ones: twice
the lanes of float32, and no conversion for each code. The first loop writes these sums, the second
adds them as floats (integers below 2^24: exact) with scales and zeros. 8-bit codes do not fit.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.w4a16_gemm import xla_rows

TERMS = 64  # sums of one expression of the second loop
_LEAST = 8
_LARGEST = 2**15 - 1


def block_size(num_in: int, num_groups: int, bits: int) -> int | None:
  """Inputs of one 16-bit sum: the largest that fills whole bytes and groups, None below 8."""
  size, per_byte = num_in // num_groups, 8 // bits
  most = min(xla_rows.UNROLL, _LARGEST // (127 * (2**bits - 1)))
  fitting = [n for n in range(_LEAST, most + 1) if size % n == 0 and n % per_byte == 0]
  return max(fitting) if fitting else None


def serves(x_MK, scale_QN, bits: int) -> bool:
  """True for few rows on a CPU where the groups divide into blocks."""
  is_few = 0 < x_MK.shape[0] <= xla_rows.MAX_ROWS and jax.default_backend() == "cpu"
  return is_few and block_size(x_MK.shape[1], scale_QN.shape[0], bits) is not None


def matmul_rows(x_MK, codes_RN, scale_QN, zero_QN=None, *, bits: int, low: int):
  """int8 x [M, K] times the kernel of `packed` codes, float32 [M, N]; for calls that `serves`."""
  (M, K), (Q, N) = x_MK.shape, scale_QN.shape
  block, per_byte, mask = block_size(K, Q, bits), 8 // bits, jnp.int16(2**bits - 1)
  codes_QbrN = jnp.reshape(codes_RN, (Q, -1, block // per_byte, N))
  num_blocks = codes_QbrN.shape[1]
  # Groups, or blocks of the only group, that one expression of the second loop adds.
  at_once = max(n for n in range(1, TERMS + 1) if (Q if Q > 1 else num_blocks) % n == 0)
  while Q > 1 and at_once > 1 and (at_once * num_blocks > TERMS or Q % at_once):
    at_once -= 1
  scale_QN = scale_QN.astype(jnp.float32)
  shift_QN = jnp.full((Q, 1), low, jnp.float32)
  if zero_QN is not None:
    shift_QN = low - zero_QN.astype(jnp.float32)

  def one(x_QbJ):
    sums_QbN = 0
    for r in range(block // per_byte):
      bytes_QbN = codes_QbrN[:, :, r].astype(jnp.int16)
      for j in range(per_byte):
        field_QbN = bytes_QbN >> jnp.int16(bits * j)
        field_QbN = field_QbN & mask if j < per_byte - 1 else field_QbN
        sums_QbN = sums_QbN + field_QbN * x_QbJ[:, :, r * per_byte + j, None]
    sums_QbN = jax.lax.optimization_barrier(sums_QbN)
    total_Q1 = jnp.sum(x_QbJ.astype(jnp.float32), axis=(1, 2))[:, None]
    if Q == 1:
      parts_PTN = jnp.reshape(sums_QbN, (-1, at_once, N))
      y_1N = _added(sum(parts_PTN[:, t].astype(jnp.float32) for t in range(at_once)))
      return (y_1N + shift_QN * total_Q1) * scale_QN
    parts_PTbN = jnp.reshape(sums_QbN, (-1, at_once, num_blocks, N))
    scale_PTN = jnp.reshape(scale_QN, (-1, at_once, N))
    base_PTN = jnp.reshape(shift_QN * total_Q1, (-1, at_once, shift_QN.shape[1]))
    y_PN = 0.0
    for t in range(at_once):
      group_PN = sum(parts_PTbN[:, t, b].astype(jnp.float32) for b in range(num_blocks))
      y_PN = y_PN + (group_PN + base_PTN[:, t]) * scale_PTN[:, t]
    return _added(y_PN)

  x_MQbJ = jnp.reshape(x_MK.astype(jnp.int16), (M, Q, -1, block))
  return jnp.concatenate([one(x_MQbJ[m]) for m in range(M)], axis=0)


def _added(parts_PN):
  """[1, N]; as a product, because a reduction would be fused with the loop before it."""
  if parts_PN.shape[0] == 1:
    return parts_PN
  return jnp.matmul(jnp.ones((1, parts_PN.shape[0]), jnp.float32), parts_PN)
