"""Packed matmul in XLA: the kernel unpacked into x's type, then one product with float32 sums.

One float copy of the kernel lives while it is used. A scan over groups, which would keep one group
of it alone, took 1.5 to 3 times as long on a CPU at every shape tried (576 to 4096, 1 to 64 rows).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.w4a16_gemm import packed, ref, xla_rows


def matmul_xla(
  x_MK, codes_RN, scale_QN, zero_QN=None, *, bits: int = 4, low: int = -8, out_dtype=None
):
  """As `api.matmul`. One scale a channel: codes enter the product exactly, the scale comes after
  it. Groups: values computed in float32, then cast to x's type. Few rows on a CPU: `xla_rows`."""
  out_dtype = out_dtype or x_MK.dtype
  if xla_rows.serves(x_MK, scale_QN, bits):
    code = dict(bits=bits, low=low, out_dtype=out_dtype)
    return xla_rows.matmul_rows(x_MK, codes_RN, scale_QN, zero_QN, **code)
  K, is_grouped = x_MK.shape[1], scale_QN.shape[0] > 1
  precision = jax.lax.Precision.HIGHEST if x_MK.dtype == jnp.float32 else None
  if is_grouped and jax.default_backend() == "cpu" and K // scale_QN.shape[0] % (8 // bits) == 0:
    return _by_fields(x_MK, codes_RN, scale_QN, zero_QN, bits, low, precision).astype(out_dtype)
  if is_grouped:
    w_KN = ref.dequantize_ref(codes_RN, scale_QN, zero_QN, num_in=K, bits=bits, low=low)
  else:
    shift_1N = low if zero_QN is None else low - zero_QN.astype(jnp.float32)
    w_KN = packed.unpack(codes_RN, bits, K).astype(jnp.float32) + shift_1N
  w_KN, sums = w_KN.astype(x_MK.dtype), jnp.float32
  if jax.default_backend() == "gpu":
    w_KN = jax.lax.optimization_barrier(w_KN)  # unpacked once, not in every tile of the product
    sums = out_dtype if is_grouped else sums  # cuBLAS adds in float32 whatever it writes
  y_MN = jnp.matmul(x_MK, w_KN, precision=precision, preferred_element_type=sums)
  if not is_grouped:
    y_MN = y_MN * scale_QN.astype(jnp.float32)
  return y_MN.astype(out_dtype)


def _by_fields(x_MK, codes_RN, scale_QN, zero_QN, bits, low, precision):
  """A product for every place in a byte: its inputs of x, its codes as a kernel of their own.

  To put the codes of all places between one another takes a CPU longer than to unpack them.
  """
  Q, N = scale_QN.shape
  scale_Q1N = scale_QN.astype(jnp.float32)[:, None]
  shift_Q1N = low if zero_QN is None else low - zero_QN.astype(jnp.float32)[:, None]
  y_MN, fields = 0.0, packed.fields(codes_RN, bits)
  for j, field_RN in enumerate(fields):
    w_QrN = (jnp.reshape(field_RN, (Q, -1, N)).astype(jnp.float32) + shift_Q1N) * scale_Q1N
    w_RN = jnp.reshape(w_QrN, (-1, N)).astype(x_MK.dtype)
    x_MR = x_MK[:, j :: len(fields)]
    y_MN += jnp.matmul(x_MR, w_RN, precision=precision, preferred_element_type=jnp.float32)
  return y_MN
