"""int4 weights of MiniCPM4's QAT releases (quantization.md 3): GPTQ's symmetric grid.

s = max |W| / 7.5, q = clip(round(W / s), -8, 7), code q + 8 on disk. Not idempotent: after fusing,
the largest weight of a group is 7 s or 8 s, so a fused checkpoint's scales are searched.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from minicpm_jax.core import types
from minicpm_jax.quant import qat, qtensor, schemes

TOLERANCE = 0.05  # of a step: what bf16 rounding of q * s leaves (8 * 2^-9 = 0.016, scale likewise)


def quantize(
  w: Float[types.AnyArray, "..."],
  group_size: int = 128,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float16,
) -> qtensor.QTensor:
  """Codes -8..7 and scales rounded to `scale_dtype` (float16 is what GPTQ files hold)."""
  layout = dict(num_in=num_in, num_lead=num_lead)
  return qtensor.quantize(w, "int4", group_size, scale_dtype=scale_dtype, **layout)


def fake(
  w: Float[types.AnyArray, "..."],
  group_size: int = 128,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float16,
) -> Float[types.AnyArray, "..."]:
  """dequantize(quantize(w)) in w's dtype, identity gradient inside and outside the clip range."""
  layout = dict(num_in=num_in, num_lead=num_lead)
  qt = quantize(w, group_size, scale_dtype=scale_dtype, **layout)
  return qat.straight_through(jnp.asarray(w), qtensor.dequantize(qt, w.dtype))


def _search(w: Any, group_size: int, num_in: int, num_lead: int) -> tuple[Any, Any, Any]:
  """(groups, best scale, its largest distance from an integer code) over max/7 and max/8."""
  width = math.prod(w.shape[num_lead : num_lead + num_in])
  num_groups = schemes.group_count(width, group_size)
  w_QgO = qtensor.grouped(jnp.asarray(w).astype(jnp.float32), num_in, num_groups, num_lead)
  high = jnp.max(jnp.abs(w_QgO), axis=-2, keepdims=True)
  best = error = None
  for steps in (7, 8):
    scale = high * (1.0 / steps)
    ratio = w_QgO / jnp.where(scale > 0, scale, 1.0)
    off = jnp.abs(ratio - jnp.round(ratio)) + (jnp.round(ratio) > 7)
    off = jnp.max(off, axis=-2, keepdims=True)
    best = scale if best is None else jnp.where(off < error, scale, best)
    error = off if error is None else jnp.minimum(off, error)
  return w_QgO, best, error


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def fused_flag(w: Any, group_size: int, num_in: int, num_lead: int) -> Any:
  """Whether every group lies on an int4 grid; groups under 16 channels prove nothing."""
  w_QgO, scale, error = _search(w, group_size, num_in, num_lead)
  is_telling = w_QgO.shape[-2] >= 16
  return is_telling & jnp.all(error <= TOLERANCE) & jnp.any(scale > 0)


def recover(
  w: Float[types.AnyArray, "..."],
  group_size: int = 128,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float32,
  name: str = "kernel",
) -> qtensor.QTensor:
  """Codes and scales of fused weights by search of s in {max/7, max/8}; refuses other weights."""
  w_QgO, scale, error = _search(w, group_size, num_in, num_lead)
  worst = float(jnp.max(error))
  if not worst <= TOLERANCE:  # nan: weights that are not finite
    raise ValueError(
      f"{name}: found a group of {group_size} whose codes are off integers by {worst:.3f}, "
      "expected fused int4 weights (multiples of max/7 or max/8 in every group)"
    )
  codes = jnp.round(w_QgO / jnp.where(scale > 0, scale, 1.0))
  lead, shape = w.shape[:num_lead], w.shape[num_lead:]
  return qtensor.make(
    codes.astype(jnp.int8).reshape(w.shape),
    scale.astype(scale_dtype).reshape(*lead, scale.shape[-3], *shape[num_in:]),
    "int4",
    group_size=group_size,
    num_in=num_in,
    num_lead=num_lead,
  )
