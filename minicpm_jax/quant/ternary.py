"""Ternary weights of BitCPM4 (quantization.md 1 and 2): quantise, guard against doing it twice.

The absmean quantiser is not idempotent: of weights that are ternary already it makes a scale that
is smaller by the zero share (0.69 s). Weights that look fused are refused where latent ones are
expected, and their codes are recovered with s = max |W| of a group instead.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from minicpm_jax.config import QuantConfig
from minicpm_jax.core import types
from minicpm_jax.quant import int4, qat, qtensor, schemes, tree

# Magnitudes of one group that differ by less are one scale rounded twice (bf16 neighbours).
TOLERANCE = 2.0**-7
_TELLING = 16  # fewer inputs of a group may lie on a grid by chance
_RUN = 8  # divides every group size in use


class FusedWeightsError(ValueError):
  """Weights that are quantised already where latent ones are expected, or the reverse."""


def quantize(
  w: Float[types.AnyArray, "..."],
  group_size: int = -1,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float32,
) -> qtensor.QTensor:
  """s = max(mean |W|, 1e-8), q = clip(round(W / s), -1, 1) of a kernel [*lead, *in, *out]."""
  layout = dict(num_in=num_in, num_lead=num_lead)
  return qtensor.quantize(w, "ternary", group_size, scale_dtype=scale_dtype, **layout)


def fake(
  w: Float[types.AnyArray, "..."],
  group_size: int = -1,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float32,
) -> Float[types.AnyArray, "..."]:
  """dequantize(quantize(w)) in w's dtype, with the identity as its gradient."""
  layout = dict(num_in=num_in, num_lead=num_lead)
  qt = quantize(w, group_size, scale_dtype=scale_dtype, **layout)
  return qat.straight_through(jnp.asarray(w), qtensor.dequantize(qt, w.dtype))


def recover(
  w: Float[types.AnyArray, "..."],
  group_size: int = -1,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float32,
  name: str = "kernel",
) -> qtensor.QTensor:
  """Codes and scales of fused weights: s is the group's one magnitude; FusedWeightsError if not."""
  is_fused = fused_flag(jnp.asarray(w), group_size, num_in, num_lead)
  if not bool(is_fused) and bool(jnp.any(w != 0)):
    raise FusedWeightsError(
      f"{name}: found groups of {group_size} with several magnitudes, expected fused ternary "
      "weights (0 and +-s in every group; is the group size right?)"
    )
  size, high = _magnitudes(w, group_size, num_in, num_lead)
  codes = jnp.where(size > 0, jnp.sign(_groups(w, group_size, num_in, num_lead)), 0)
  lead, shape = w.shape[:num_lead], w.shape[num_lead:]
  return qtensor.make(
    codes.astype(jnp.int8).reshape(w.shape),
    high.astype(scale_dtype).reshape(*lead, high.shape[-3], *shape[num_in:]),
    "ternary",
    group_size=group_size,
    num_in=num_in,
    num_lead=num_lead,
  )


def check_latent(cfg: QuantConfig | None, params: types.Params) -> None:
  """Refuses parameters that are quantised already where `cfg` will quantise them.

  Ternary weights are found whatever their group size, int4 ones and those of cfg's own code book
  at cfg's. A host check: traced arrays are let through.
  """
  if cfg is None or cfg.scheme == "none" or cfg.weights != "latent":
    return
  for path, w in tree.selected(cfg, params).items():
    num_in, num_lead = tree.layout(path)
    if qtensor.is_qtensor(w):
      raise FusedWeightsError(f"{path}: found a QTensor, expected latent float weights")
    if isinstance(w, jax.core.Tracer):
      continue
    w = jnp.asarray(w).T if tree.is_table(path) else jnp.asarray(w)
    if bool(_looks_fused(w, cfg.scheme, cfg.group_size, num_in, num_lead)):
      raise FusedWeightsError(
        f"{path}: found weights that are quantised already (a fused checkpoint or a low-bit file), "
        "expected unrounded ones: quantising twice loses more. Load a fused one without quant (its "
        "config.json has no 'qat' entry), or recover its codes (quant.ternary.recover, "
        "quant.int4.recover)"
      )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))  # one compilation a shape
def _looks_fused(w: Any, scheme: str, group_size: int, num_in: int, num_lead: int) -> Any:
  """Ternary of any group size (whose runs of a few inputs have one magnitude each; a group of one
  input always has), int4, or of the scheme's own code book."""
  layout = (num_in, num_lead)
  width = math.prod(w.shape[num_lead : num_lead + num_in])
  sizes = {group_size, -1} - {1} | ({_RUN} if width % _RUN == 0 else set())
  is_ternary = functools.reduce(jnp.logical_or, (fused_flag(w, size, *layout) for size in sizes))
  is_grid = is_ternary | int4.fused_flag(w, group_size, *layout)
  book = schemes.get(scheme)
  return is_grid if book.divisor is None else is_grid | _is_on_grid(w, book, group_size, *layout)


def _is_on_grid(w: Any, book: schemes.Scheme, group_size: int, num_in: int, num_lead: int) -> Any:
  """True where every weight is a value of the code book whose scale a group's largest gives.

  Rounding to bf16 moves a value by up to 2^-8 of itself, and the largest likewise.
  """
  w_QgO = _groups(w, group_size, num_in, num_lead)
  high = jnp.max(jnp.abs(w_QgO), axis=-2, keepdims=True)
  ratio = w_QgO * (book.divisor / jnp.where(high > 0, high, 1.0))
  off = jnp.abs(ratio - book.offset - jnp.round(ratio - book.offset))
  fits = (off <= int4.TOLERANCE + 2.0**-7 * jnp.abs(ratio)) | (high == 0)
  return (w_QgO.shape[-2] >= _TELLING) & jnp.all(fits) & jnp.any(high > 0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def fused_flag(w: Any, group_size: int, num_in: int, num_lead: int) -> Any:
  """Whether no group has two distinct non-zero magnitudes (and some weight is not zero)."""
  size, high = _magnitudes(w, group_size, num_in, num_lead)
  low = jnp.min(jnp.where(size > 0, size, jnp.inf), axis=-2, keepdims=True)
  return jnp.all((high == 0) | (high - low <= TOLERANCE * high)) & jnp.any(high > 0)


def _groups(w: Any, group_size: int, num_in: int, num_lead: int) -> Any:
  width = math.prod(w.shape[num_lead : num_lead + num_in])
  num_groups = schemes.group_count(width, group_size)
  return qtensor.grouped(jnp.asarray(w).astype(jnp.float32), num_in, num_groups, num_lead)


def _magnitudes(w: Any, group_size: int, num_in: int, num_lead: int) -> tuple[Any, Any]:
  size = jnp.abs(_groups(w, group_size, num_in, num_lead))
  return size, jnp.max(size, axis=-2, keepdims=True)
