"""Block-scaled FP8 product as the equation: products of K blocks, each times its two scales."""

import jax
import jax.numpy as jnp

BLOCK = 128


def matmul_ref(xq_MK, xs_MQ, wq_KN, ws_QP, out_dtype=jnp.float32):
  """As `api.matmul`, everything in float32."""
  N = wq_KN.shape[1]
  y_MN = jnp.zeros((xq_MK.shape[0], N), jnp.float32)
  for q in range(ws_QP.shape[0]):
    block = slice(q * BLOCK, (q + 1) * BLOCK)
    x_Mk, w_kN = xq_MK[:, block].astype(jnp.float32), wq_KN[block].astype(jnp.float32)
    part_MN = jnp.matmul(x_Mk, w_kN, precision=jax.lax.Precision.HIGHEST)
    y_MN += part_MN * xs_MQ[:, q, None] * jnp.repeat(ws_QP[q], BLOCK)[None, :N]
  return y_MN.astype(out_dtype)
