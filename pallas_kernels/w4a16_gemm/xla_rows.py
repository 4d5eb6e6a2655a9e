"""Packed matmul of few rows on a CPU: codes are unpacked inside the sum, in one fused loop.

A matrix-vector product is bound by the bytes of its weights. XLA on CPU writes unpacked codes to
memory before a dot, which costs what packing saved, and its own reductions (or YNNPACK's) do the
same. Here up to UNROLL inputs are added in one elementwise expression whose lanes are the outputs:
XLA emits a single loop that reads bytes, masks, converts and multiplies in registers, on all cores.
The partial sums, one a block of inputs, are added by a product with ones: a reduction would be
fused with the loop again, and more slowly. Rows follow one another: sums of all rows at once leave
the cache.
"""

import jax
import jax.numpy as jnp

UNROLL = 32  # inputs of one expression; twice as many spill registers
_LEAST = 8
MAX_ROWS = {2: 16, 4: 16, 8: 8}  # by bits: every row unpacks the codes again


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
  (M, K), (Q, N) = x_MK.shape, scale_QN.shape
  block, per_byte, mask = block_size(K, Q, bits), 8 // bits, 2**bits - 1
  x_MQbJ = jnp.reshape(x_MK.astype(jnp.float32), (M, Q, -1, block))
  codes_QbrN = jnp.reshape(codes_RN, (Q, -1, block // per_byte, N))
  scale_QN = scale_QN.astype(jnp.float32)
  shift_QN = jnp.full((1, 1), low, jnp.float32)
  if zero_QN is not None:
    shift_QN = low - zero_QN.astype(jnp.float32)

  def row(x_QbJ):
    # In a loop (over rows, steps) XLA would unpack all codes before it and read them at four bytes.
    x_QbJ, bytes_QbrN = jax.lax.optimization_barrier((x_QbJ, codes_QbrN))
    total_QbN = jnp.sum(x_QbJ, axis=2, keepdims=True) * shift_QN[:, None]
    for r in range(block // per_byte):
      bytes_QbN = bytes_QbrN[:, :, r].astype(jnp.int32)
      for j in range(per_byte):
        # A field in its place in the byte is 2^(bits j) times its code: x takes the power, exactly.
        field_QbN = bytes_QbN if bits == 8 else bytes_QbN & (mask << (bits * j))
        x_Qb1 = x_QbJ[..., r * per_byte + j, None] * 2.0 ** (-bits * j)
        total_QbN = total_QbN + field_QbN.astype(jnp.float32) * x_Qb1
    if Q > 1:
      total_QbN = total_QbN * scale_QN[:, None]
    parts_PN = jnp.reshape(total_QbN, (-1, N))
    y_N = jnp.einsum("P,PN->N", jnp.ones((parts_PN.shape[0],), jnp.float32), parts_PN)
    return y_N if Q > 1 else y_N * scale_QN[0]

  y_MN = row(x_MQbJ[0])[None] if M == 1 else jax.lax.map(row, x_MQbJ)
  return y_MN.astype(out_dtype or x_MK.dtype)
