"""Calibration statistics of a layer's inputs, streamed batch by batch (quantization.md 4-6).

H = sum of x x^T over the tokens that count. P-GPTQ (MiniCPM4 4.1.2) leaves out the first positions
of every document, where inputs of down projections are 10 times larger: a mask of this sum, nothing
else. On a mesh the batch may be sharded; H is whole on every device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.core import mesh


def positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """0, 1, ... inside every run of equal segment ids."""
  slots_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
  before_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  start_BT = jnp.where(segment_ids_BT != before_BT, slots_1T, 0)
  return slots_1T - jax.lax.cummax(start_BT, axis=1)


@functools.partial(jax.jit, static_argnames="skip")
def keep_mask(segment_ids_BT: Int[Array, "B T"], skip: int = 0) -> Bool[Array, "B T"]:
  """Tokens that count: not padding (segment 0), not among a document's first `skip` positions."""
  if skip < 0:
    raise ValueError(f"skip: found {skip}, expected a number of positions >= 0")
  return (segment_ids_BT != 0) & (positions(segment_ids_BT) >= skip)


def flat(x_BTK: Float[Array, "B T *K"]) -> Float[Array, "B T I"]:
  """Input axes of a projection joined in memory order ([N, H] of o)."""
  return x_BTK.reshape(*x_BTK.shape[:2], math.prod(x_BTK.shape[2:]))


def bounded(
  x_BTK: Float[Array, "B T *K"], keep_BT: Bool[Array, "B T"], first_BT: Bool[Array, "B T"]
) -> Float[Array, "B T I"]:
  """Tokens of `first_BT` scaled down to the median norm of the other kept tokens, where larger.

  The middle way between counting and leaving out: a first token 2,000 times larger than the others
  would be the whole of H, and without it nothing holds what the model makes of that token.
  """
  x_BTI = flat(x_BTK)
  return x_BTI * bound_factor(x_BTI, keep_BT, first_BT)[..., None].astype(x_BTI.dtype)


def bound_factor(
  x_BTI: Float[Array, "B T I"], keep_BT: Bool[Array, "B T"], first_BT: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
  """What `bounded` multiplies every token by: 1, or less at a first position of larger norm."""
  norm_BT = jnp.linalg.norm(x_BTI.astype(jnp.float32), axis=-1)
  median = jnp.nanmedian(jnp.where(keep_BT & ~first_BT, norm_BT, jnp.nan))
  return jnp.where(first_BT & (norm_BT > median), median / norm_BT, 1.0)


@functools.partial(jax.jit, donate_argnums=0)
def hessian_update(
  hessian_II: Float[Array, "I I"],
  x_BTK: Float[Array, "B T *K"],
  keep_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "I I"]:
  """H + X^T X over the kept tokens, in H's dtype (products of float32 at full precision)."""
  x_BTI = flat(x_BTK).astype(hessian_II.dtype)
  if keep_BT is not None:
    x_BTI = jnp.where(keep_BT[..., None], x_BTI, 0)  # also where a dropped token is not finite
  x_MI = x_BTI.reshape(-1, x_BTI.shape[-1])
  return mesh.constrain(hessian_II + jnp.matmul(x_MI.T, x_MI, precision="highest"), None, None)


def hessian_init(num_in: int) -> Float[Array, "I I"]:
  return jnp.zeros((num_in, num_in), jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def abs_update(
  total: tuple[Float[Array, " I"], Float[Array, ""]],
  x_BTK: Float[Array, "B T *K"],
  keep_BT: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, " I"], Float[Array, ""]]:
  """(sum of |x| of every channel, number of tokens), for the smoothing search."""
  x_BTI = jnp.abs(flat(x_BTK).astype(jnp.float32))
  if keep_BT is None:
    keep_BT = jnp.ones(x_BTI.shape[:2], bool)
  x_BTI = jnp.where(keep_BT[..., None], x_BTI, 0)
  return total[0] + jnp.sum(x_BTI, axis=(0, 1)), total[1] + jnp.sum(keep_BT, dtype=jnp.float32)
