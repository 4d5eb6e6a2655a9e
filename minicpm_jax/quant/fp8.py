"""Block-wise FP8 matmul for training (MiniCPM4 section 2.3.2, quantization.md 9).

  forward   Y  = sum_kb sx[m, kb] sw[kb, nb] (Xq Wq)   X in tiles 1 x 128 along K, W in 128 x 128
  dgrad     dX = sum_nb sd[m, nb] sw[kb, nb] (Dq Wq^T) dY in tiles 1 x 128 along N, the same Wq
  wgrad     dW = X^T dY                                bf16 inputs, float32 sums, nothing quantised

s = amax / 448 (E4M3), 1 where that is 0; q = cast(clip(x / s)): a cast above 464 would give NaN.
Products are those of `pallas_kernels.fp8_gemm` with float32 sums; edges are padded with zeros.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minicpm_jax.config import FP8Config
from minicpm_jax.core import mesh, types
from minicpm_jax.quant import schemes
from pallas_kernels.fp8_gemm import api, xla

BLOCK = api.BLOCK
FORMATS = {"e4m3": (jnp.float8_e4m3fn, 448.0), "e5m2": (jnp.float8_e5m2, 57344.0)}


def scale_of(amax: Float[types.AnyArray, "*s"], cfg: FP8Config) -> Float[types.AnyArray, "*s"]:
  """float32 scale that maps amax to the largest number of the format; 1 where amax is 0, and amax
  itself where it is not finite.

  Also 1 where the scale would be below float32's normal numbers (amax under 5e-36 for E4M3), which
  XLA flushes to 0: zeros of the tile would become 0 / 0.
  """
  scale = schemes.quotient(amax.astype(jnp.float32), FORMATS[cfg.format][1])
  is_zero = scale < jnp.finfo(jnp.float32).tiny
  if cfg.power_of_two_scales:  # the next one; exp2 and log2 are a few ulp off
    part, power = jnp.frexp(jnp.where(is_zero, 1.0, scale))
    power = power.astype(jnp.int32) - (part == 0.5)
    next_one = jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
    scale = jnp.where(jnp.isfinite(scale), next_one, scale)
  return jnp.where(is_zero, 1.0, scale)


def _cast(x: Array, scale: Array, cfg: FP8Config) -> Array:
  dtype, limit = FORMATS[cfg.format]
  return jnp.clip(x.astype(jnp.float32) / scale, -limit, limit).astype(dtype)


def _padded(n: int) -> int:
  return -(-n // BLOCK) * BLOCK


def quantize_rows(
  x_MK: Float[types.AnyArray, "M K"], cfg: FP8Config
) -> tuple[Float[types.AnyArray, "M K"], Float[types.AnyArray, "M Q"]]:
  """FP8 values and scales of 1 x 128 tiles (Q = ceil(K / 128); tensor: one scale everywhere)."""
  x_MK = jnp.asarray(x_MK)
  M, K = x_MK.shape
  num = _padded(K) // BLOCK
  tiles = jnp.pad(x_MK, ((0, 0), (0, num * BLOCK - K))).reshape(M, num, BLOCK)
  amax = jnp.max(jnp.abs(tiles.astype(jnp.float32)), axis=-1)
  if cfg.granularity == "tensor":
    amax = jnp.broadcast_to(jnp.max(amax, initial=0.0), amax.shape)
  scale_MQ = scale_of(amax, cfg)
  return _cast(tiles, scale_MQ[:, :, None], cfg).reshape(M, num * BLOCK)[:, :K], scale_MQ


def quantize_blocks(
  w_KN: Float[types.AnyArray, "*lead K N"], cfg: FP8Config
) -> tuple[Float[types.AnyArray, "*lead K N"], Float[types.AnyArray, "*lead P Q"]]:
  """FP8 values and scales of 128 x 128 blocks of the last two axes."""
  w_KN = jnp.asarray(w_KN)
  *lead, K, N = w_KN.shape
  rows, cols = _padded(K) // BLOCK, _padded(N) // BLOCK
  pad = [(0, 0)] * len(lead) + [(0, rows * BLOCK - K), (0, cols * BLOCK - N)]
  blocks = jnp.pad(w_KN, pad).reshape(*lead, rows, BLOCK, cols, BLOCK)
  amax = jnp.max(jnp.abs(blocks.astype(jnp.float32)), axis=(-3, -1))
  if cfg.granularity == "tensor":
    amax = jnp.broadcast_to(jnp.max(amax, axis=(-2, -1), keepdims=True), amax.shape)
  scale = scale_of(amax, cfg)
  codes = _cast(blocks, jnp.expand_dims(scale, (-3, -1)), cfg)
  return codes.reshape(*lead, rows * BLOCK, cols * BLOCK)[..., :K, :N], scale


dequantize_rows, dequantize_blocks = xla.dequantize_rows, xla.dequantize_blocks


def matmul(
  xq_MK: Float[types.AnyArray, "M K"],
  xs_MQ: Float[types.AnyArray, "M Q"],
  wq_KN: Float[types.AnyArray, "K N"],
  ws_QP: Float[types.AnyArray, "Q P"],
  dtype: Any = jnp.float32,
) -> Float[types.AnyArray, "M N"]:
  """Product of rows in 1 x 128 tiles and a matrix in 128 x 128 blocks, float32 sums."""
  op = functools.partial(api.matmul, out_dtype=dtype)
  return mesh.by_rows(op, (xq_MK, xs_MQ), (wq_KN, ws_QP))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear(
  x_MK: Float[types.AnyArray, "M K"],
  latent_KN: Float[types.AnyArray, "K N"],
  wq_KN: Float[types.AnyArray, "K N"],
  ws_PQ: Float[types.AnyArray, "P Q"],
  cfg: FP8Config,
) -> Float[types.AnyArray, "M N"]:
  """FP8 product of x with weights that were quantised once this step; gradients as the module says.

  `latent_KN` only receives the weight gradient: its values are not read.
  """
  return _forward(x_MK, latent_KN, wq_KN, ws_PQ, cfg)[0]


def _forward(x_MK: Any, latent_KN: Any, wq_KN: Any, ws_PQ: Any, cfg: FP8Config) -> Any:
  y_MN = matmul(*quantize_rows(x_MK, cfg), wq_KN, ws_PQ, x_MK.dtype)
  kept = x_MK.astype(types.dtype_of(cfg.wgrad_dtype))
  return y_MN, (kept, wq_KN, ws_PQ, jnp.zeros((), x_MK.dtype), jnp.zeros((), latent_KN.dtype))


def _backward(cfg: FP8Config, saved: Any, dy_MN: Any) -> Any:
  x_MK, wq_KN, ws_PQ, like_x, like_w = saved
  dx_MK = matmul(*quantize_rows(dy_MN, cfg), wq_KN.T, ws_PQ.T, like_x.dtype)
  dy_low = dy_MN.astype(x_MK.dtype)
  dw_KN = jnp.matmul(x_MK.T, dy_low, preferred_element_type=jnp.float32).astype(like_w.dtype)
  return dx_MK, dw_KN, None, None


linear.defvjp(_forward, _backward)
