"""Block-scaled FP8 product in XLA: both operands dequantised in float32, one product.

The same sum but for its order and rounding, for devices without FP8 tensor cores. The float32
copies live while they are used: 4 bytes a value of x and w.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_gemm import ref


def dequantize_rows(q_MK, scale_MQ):
  """float32 values of 1 x 128 tiles."""
  scale_MK = jnp.repeat(scale_MQ, ref.BLOCK, axis=1)[:, : q_MK.shape[1]]
  return q_MK.astype(jnp.float32) * scale_MK


def dequantize_blocks(q_KN, scale_QP):
  """float32 values of 128 x 128 blocks."""
  K, N = q_KN.shape
  scale_KP = jnp.repeat(scale_QP, ref.BLOCK, axis=0)[:K]
  return q_KN.astype(jnp.float32) * jnp.repeat(scale_KP, ref.BLOCK, axis=1)[:, :N]


def matmul_xla(xq_MK, xs_MQ, wq_KN, ws_QP, out_dtype=jnp.float32):
  """As `api.matmul`."""
  y_MN = jnp.matmul(
    dequantize_rows(xq_MK, xs_MQ),
    dequantize_blocks(wq_KN, ws_QP),
    precision=jax.lax.Precision.HIGHEST,
  )
  return y_MN.astype(out_dtype)
