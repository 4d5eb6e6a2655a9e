"""Packed matmul in XLA: a scan over groups, so that g rows of floats live at a time, not K.

Codes enter the product as they are (exact in bf16), sums are float32, and the scale of a group
comes after its product. One scale a channel: the scan goes in steps of CHUNK inputs, and the scale
comes after all of them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.w4a16_gemm import packed, ref

CHUNK = 512  # inputs a step where one group spans all of them


def matmul_xla(x_MK, codes_RN, scale_QN, zero_QN=None, *, bits: int = 4, low: int = -8):
  """As `api.matmul`. Groups that do not fill whole bytes are served by the reference."""
  (M, K), N, num_groups = x_MK.shape, codes_RN.shape[1], scale_QN.shape[0]
  per_byte, is_grouped = 8 // bits, num_groups > 1
  if is_grouped and (K // num_groups) % per_byte:
    return ref.matmul_ref(x_MK, codes_RN, scale_QN, zero_QN, bits=bits, low=low)
  size = K // num_groups if is_grouped else min(CHUNK, codes_RN.shape[0] * per_byte)
  steps = -(-K // size)
  rows = size // per_byte
  x_MK = jnp.pad(x_MK, ((0, 0), (0, steps * size - K)))
  codes_RN = jnp.pad(codes_RN, ((0, steps * rows - codes_RN.shape[0]), (0, 0)))
  # Inputs of a step in the order of `fields`: first all lowest bits, then the next.
  x_sMg = jnp.transpose(x_MK.reshape(M, steps, rows, per_byte), (1, 0, 3, 2))
  x_sMg = x_sMg.reshape(steps, M, size)
  zero_QN = jnp.zeros(scale_QN.shape, jnp.int8) if zero_QN is None else zero_QN
  shift_QN = low - zero_QN.astype(jnp.int32)
  scale_QN = scale_QN.astype(jnp.float32)
  precision = jax.lax.Precision.HIGHEST if x_MK.dtype == jnp.float32 else None

  def product(x_Mg, codes_rN, shift_N):
    codes_gN = jnp.concatenate(packed.fields(codes_rN, bits), axis=0).astype(jnp.int32)
    w_gN = (codes_gN + shift_N[None, :]).astype(x_Mg.dtype)
    return jnp.matmul(x_Mg, w_gN, precision=precision, preferred_element_type=jnp.float32)

  def step(acc_MN, now):
    x_Mg, codes_rN, *group = now
    if not is_grouped:
      return acc_MN + product(x_Mg, codes_rN, shift_QN[0]), None
    shift_N, scale_N = group
    return acc_MN + product(x_Mg, codes_rN, shift_N) * scale_N[None, :], None

  xs = (x_sMg, codes_RN.reshape(steps, rows, N), *((shift_QN, scale_QN) if is_grouped else ()))
  y_MN, _ = jax.lax.scan(step, jnp.zeros((M, N), jnp.float32), xs)
  if not is_grouped:
    y_MN = y_MN * scale_QN
  return y_MN.astype(x_MK.dtype)
