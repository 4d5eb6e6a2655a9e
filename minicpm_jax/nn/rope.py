"""Rotary position embedding: plain, linear, dynamic NTK, LongRoPE (models.md 3.3-3.6).

Half rotation (channel i with i + H/2); tables and the rotation are float32. The scaling of one
forward depends on its length n = largest position + 1: static when a cache is used (the caller
picks a bucket, so that cached keys never change their rotation), traced otherwise.
"""

import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minicpm_jax.config import RopeConfig

# models.md 3.6: base_i = lo + (hi - lo) / (1 + exp(-(i - c) / s)) for i < n.
_CURVES = {
  "minicpm3_4b": (16, 1.0, 17.0, 7.5, 1.34),
  "minicpm4_0p5b": (32, 0.85382362, 50.0, 15.5, 2.667),
  "minicpm4_8b": (64, 0.915773467047734, 31.105949332194008, 31.5, 5.334),
  "minicpm4p1_8b": (64, 0.8288299491615256, 63.17796446556374, 31.5, 5.334),
}
Length = int | Int[Array, ""] | Int[Array, "B"]  # of a sequence, in tokens; or one a row
Family = Literal["minicpm3_4b", "minicpm4_0p5b", "minicpm4_8b", "minicpm4p1_8b"]


@flax.struct.dataclass
class RopeTables:
  """cos and sin of every token's angles, [B or 1, T, 1, H/2] float32, shared by all layers."""

  cos: Float[Array, "B T 1 half"]
  sin: Float[Array, "B T 1 half"]


def longrope_factors(family: Family, *, extension: float | int = 1) -> tuple[float, ...]:
  """LongRoPE factor list of a released family, optionally stretched `extension` times.

  The base list is a logistic curve in the channel index. The published 128k lists (MiniCPM4:
  extension 4, MiniCPM4.1: 2) are that list times YaRN's by-parts ratio, rounded to four decimals,
  with the window of the 4096-token pre-training length (models.md 3.6).
  """
  if family not in _CURVES:
    raise ValueError(f"family: found {family!r}, expected one of {sorted(_CURVES)}")
  if not 1 <= extension < math.inf:
    raise ValueError(f"extension: found {extension}, expected a number >= 1")
  n, lo, hi, center, spread = _CURVES[family]
  index = np.arange(n, dtype=np.float64)
  base = lo + (hi - lo) / (1.0 + np.exp(-(index - center) / spread))
  if extension == 1:
    return tuple(base.tolist())
  low, high = (
    2 * n * math.log(4096 / (2 * math.pi * turns)) / (2 * math.log(10000.0)) for turns in (32, 1)
  )
  low, high = math.floor(low), math.ceil(high)
  ramp = np.clip((index - low) / (high - low), 0.0, 1.0)
  ratio = np.round(1.0 / (1.0 - (1.0 - 1.0 / extension) * ramp), 4)
  return tuple((base * ratio).tolist())


def attention_factor(rope: RopeConfig, max_position: int) -> float:
  """LongRoPE's m, multiplied into cos and sin: sqrt(1 + ln(M/O)/ln(O)), 1 when M <= O."""
  if rope.kind != "longrope":
    return 1.0
  original = rope.original_max_position
  ratio = max_position / original if rope.factor is None else rope.factor
  return 1.0 if ratio <= 1.0 else math.sqrt(1.0 + math.log(ratio) / math.log(original))


def frequencies(
  rope: RopeConfig, rotary_dim: int, max_position: int, length: Length | None
) -> tuple[Float[Array, "*B half"] | None, Float[Array, "*B half"]]:
  """(position multiplier or None, inverse frequencies) of a forward of `length` positions.

  One length a row gives one row of each.

  The angle is (p * multiplier) * inverse frequency, in this order: the released code divides the
  position by LongRoPE's factor first, and float32 angles differ visibly at long positions.
  `length` is read by dynamic and longrope only.
  """
  exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
  inv_freq = rope.theta**-exponents
  if rope.kind == "linear":
    inv_freq = inv_freq / rope.factor
  if rope.kind == "dynamic":
    # theta' = theta * stretch ** (d / (d - 2)), hence theta'^(-2i/d) carries stretch^(-2i/(d-2)).
    excess = jnp.asarray(length, jnp.float32)[..., None] / max_position
    stretch = jnp.maximum(rope.factor * excess - (rope.factor - 1.0), 1.0)
    power = jnp.asarray(-exponents * rotary_dim / (rotary_dim - 2), jnp.float32)
    shape = (1,) * (stretch.ndim - 1) + (-1,)
    inv_freq = jnp.asarray(inv_freq, jnp.float32)
    return None, jnp.reshape(inv_freq, shape) * stretch ** jnp.reshape(power, shape)
  multiplier = None
  if rope.kind == "longrope":
    short, long = (
      jnp.asarray(1.0 / np.asarray(f), jnp.float32) for f in (rope.short_factor, rope.long_factor)
    )
    multiplier = short
    if rope.short_factor != rope.long_factor:
      is_long = jnp.asarray(length)[..., None] > rope.original_max_position
      shape = (1,) * (is_long.ndim - 1) + (-1,)
      multiplier = jnp.where(is_long, jnp.reshape(long, shape), jnp.reshape(short, shape))
  return multiplier, jnp.asarray(inv_freq, jnp.float32)


def tables(
  rope: RopeConfig,
  rotary_dim: int,
  max_position: int,
  positions_BT: Int[Array, "B T"],
  length: Length | None = None,
) -> RopeTables:
  """cos/sin tables of the given positions; `length` None = largest position + 1."""
  needs_length = rope.kind == "dynamic" or (
    rope.kind == "longrope" and rope.short_factor != rope.long_factor
  )
  if needs_length and length is None:
    length = jnp.max(positions_BT) + 1
  multiplier, inv_freq = frequencies(rope, rotary_dim, max_position, length)
  position_BT11 = positions_BT.astype(jnp.float32)[:, :, None, None]
  if multiplier is not None:
    position_BT11 = position_BT11 * jnp.reshape(multiplier, (-1, 1, 1, multiplier.shape[-1]))
  angles = position_BT11 * jnp.reshape(inv_freq, (-1, 1, 1, inv_freq.shape[-1]))
  m = attention_factor(rope, max_position)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  return RopeTables(cos, sin) if m == 1.0 else RopeTables(cos * m, sin * m)


def apply_rope(x_BTNH: Float[Array, "B T N H"], rope: RopeTables) -> Float[Array, "B T N H"]:
  """Turns the pairs (i, i + H/2): (a, b) -> (a cos - b sin, b cos + a sin), in float32."""
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = (a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin)
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def packed_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """0, 1, 2, ... restarting wherever the segment id changes."""
  slots_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None, :]
  is_start_BT = segment_ids_BT != jnp.pad(
    segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1
  )
  start_BT = jax.lax.cummax(jnp.where(is_start_BT, slots_1T, 0), axis=1)
  return slots_1T - start_BT
