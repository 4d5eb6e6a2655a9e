"""Packed codes as arrays: the layout that the low-bit matmuls share, and what a call must satisfy.

codes uint8 [R, N] hold the inputs k of a kernel [K, N], f = 8 / bits a byte, R = ceil(K / f): byte
r has inputs r*f .. r*f+f-1, the first in its lowest bits, each as unsigned code - low.

  value[k, n] = scale[k // g, n] * (unsigned[k, n] + low - zero[k // g, n])
"""

import jax
import jax.numpy as jnp


def check(op: str, bits: int, x_MK, codes_RN, scale_QN, zero_QN, group_size: int) -> None:
  """Raises ValueError naming the array, what was found and what was expected."""
  if x_MK.ndim != 2 or not jnp.issubdtype(x_MK.dtype, jnp.floating):
    raise ValueError(f"{op}: x: found {_name(x_MK)}, expected floats [M, K]")
  K, per_byte = x_MK.shape[1], 8 // bits
  rows = -(-K // per_byte)
  if codes_RN.dtype != jnp.uint8 or codes_RN.ndim != 2 or codes_RN.shape[0] != rows:
    raise ValueError(
      f"{op}: codes: found {_name(codes_RN)}, expected uint8[{rows}, N], {per_byte} codes a byte "
      f"for {K} inputs"
    )
  if group_size != -1 and (group_size <= 0 or K % group_size):
    raise ValueError(f"{op}: group_size: found {group_size}, expected -1 or a divisor of {K}")
  want = (1 if group_size == -1 else K // group_size, codes_RN.shape[1])
  if scale_QN.shape != want or not jnp.issubdtype(scale_QN.dtype, jnp.floating):
    raise ValueError(f"{op}: scale: found {_name(scale_QN)}, expected floats {list(want)}")
  if zero_QN is not None and (zero_QN.shape != want or zero_QN.dtype != jnp.int8):
    raise ValueError(f"{op}: zero: found {_name(zero_QN)}, expected int8{list(want)}")


def out_dtype(op: str, x_MK, dtype):
  """Type of the result, x's where `dtype` is None."""
  if dtype is None:
    return x_MK.dtype
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{op}: out_dtype: found {jnp.dtype(dtype).name}, expected floats")
  return jnp.dtype(dtype)


def _name(x) -> str:
  return f"{x.dtype}{list(x.shape)}"


def fields(codes_RN: jax.Array, bits: int) -> list[jax.Array]:
  """The f unsigned codes of every byte, lowest bits first: f arrays uint8 [R, N]."""
  mask = jnp.uint8(2**bits - 1)
  return [(codes_RN >> jnp.uint8(bits * j)) & mask for j in range(8 // bits)]


def unpack(codes_RN: jax.Array, bits: int, num_in: int) -> jax.Array:
  """Unsigned codes uint8 [K, N]."""
  parts_RfN = jnp.stack(fields(codes_RN, bits), axis=1)
  return jnp.reshape(parts_RfN, (-1, codes_RN.shape[1]))[:num_in]
