"""Packed matmul of few rows on a CPU: codes are unpacked inside the sum, in one fused loop.

A matrix-vector product is bound by the bytes of its weights. XLA on CPU writes unpacked codes to
memory before a dot, which costs what packing saved, and its own reductions (or YNNPACK's) do the
same. Here up to UNROLL inputs are added in one elementwise expression whose lanes are the outputs:
XLA emits a single loop that reads bytes, masks, converts and multiplies in registers, on all cores.
The partial sums, one a block of inputs, are added by a product with ones: a reduction would be
fused with the loop again, and more slowly.
"""

import jax
import jax.numpy as jnp

UNROLL = 32  # inputs of one expression; twice as many spill registers
_LEAST = 8
APART = 4  # rows that have a loop each; more share one, which compiles once and is a third slower
MAX_ROWS = {2: 12, 4: 12, 8: 8}  # by bits: every row unpacks the codes again


def block_size(num_in: int, num_groups: int, bits: int) -> int | None:
  """Inputs of one expression: the largest that fills whole bytes and groups, None below 8."""
  size, per_byte = num_in // num_groups, 8 // bits
  fitting = [n for n in range(_LEAST, UNROLL + 1) if size % n == 0 and n % per_byte == 0]
  return max(fitting) if fitting else None


def serves(x_MK, scale_QN, bits: int) -> bool:
  """True for few rows on a CPU where the groups divide into blocks."""
  is_few = 0 < x_MK.shape[0] <= MAX_ROWS[bits] and jax.default_backend() == "cpu"
  return is_few and block_size(x_MK.shape[1], scale_QN.shape[0], bits) is not None


def matmul_rows(x_MK, codes_RN, scale_QN, zero_QN=None, *, bits: int, low: int, out_dtype=None):
  """As `xla.matmul_xla`, for calls that `serves`."""
  # In a loop over rows or steps XLA would unpack all codes before it, and read them at four bytes.
  x_MK, codes_RN = jax.lax.optimization_barrier((x_MK, codes_RN))
  (M, K), (Q, N) = x_MK.shape, scale_QN.shape
  block, per_byte, mask = block_size(K, Q, bits), 8 // bits, 2**bits - 1
  x_MQbJ = jnp.reshape(x_MK.astype(jnp.float32), (M, Q, -1, block))
  codes_QbrN = jnp.reshape(codes_RN, (Q, -1, block // per_byte, N))
  scale_QN = scale_QN.astype(jnp.float32)
  shift_QN = jnp.full((1, 1), low, jnp.float32)
  if zero_QN is not None:
    shift_QN = low - zero_QN.astype(jnp.float32)

  def rows(x_mQbJ):
    total_mQbN = jnp.sum(x_mQbJ, axis=3, keepdims=True) * shift_QN[None, :, None]
    for r in range(block // per_byte):
      bytes_1QbN = codes_QbrN[None, :, :, r].astype(jnp.int32)
      for j in range(per_byte):
        # A field in its place in the byte is 2^(bits j) times its code: x takes the power, exactly.
        field_1QbN = bytes_1QbN if bits == 8 else bytes_1QbN & (mask << (bits * j))
        x_mQb1 = x_mQbJ[..., r * per_byte + j, None] * 2.0 ** (-bits * j)
        total_mQbN = total_mQbN + field_1QbN.astype(jnp.float32) * x_mQb1
    if Q > 1:
      total_mQbN = total_mQbN * scale_QN[None, :, None]
    parts_mPN = jnp.reshape(total_mQbN, (x_mQbJ.shape[0], -1, N))
    y_mN = jnp.einsum("P,mPN->mN", jnp.ones((parts_mPN.shape[1],), jnp.float32), parts_mPN)
    return y_mN if Q > 1 else y_mN * scale_QN

  size = 1 if M <= APART else M
  parts = [rows(x_MQbJ[m : m + size]) for m in range(0, M, size)]
  return jnp.concatenate(parts, axis=0).astype(out_dtype or x_MK.dtype)
