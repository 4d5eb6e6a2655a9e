"""Packed matmul as written: the whole kernel in float32, then one product."""

import jax
import jax.numpy as jnp

from pallas_kernels.w4a16_gemm import packed


def dequantize_ref(codes_RN, scale_QN, zero_QN, *, num_in: int, bits: int, low: int):
  """float32 kernel [K, N]."""
  codes_KN = packed.unpack(codes_RN, bits, num_in).astype(jnp.float32) + low
  size = num_in // scale_QN.shape[0]
  if zero_QN is not None:
    codes_KN = codes_KN - jnp.repeat(zero_QN.astype(jnp.float32), size, axis=0)
  return codes_KN * jnp.repeat(scale_QN.astype(jnp.float32), size, axis=0)


def matmul_ref(
  x_MK, codes_RN, scale_QN, zero_QN=None, *, bits: int = 4, low: int = -8, out_dtype=None
):
  """As `api.matmul`: x times the float32 kernel in float32, cast."""
  w_KN = dequantize_ref(codes_RN, scale_QN, zero_QN, num_in=x_MK.shape[1], bits=bits, low=low)
  y_MN = jnp.matmul(x_MK.astype(jnp.float32), w_KN, precision=jax.lax.Precision.HIGHEST)
  return y_MN.astype(out_dtype or x_MK.dtype)
