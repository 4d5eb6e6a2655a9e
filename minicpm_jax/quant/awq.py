"""AWQ smoothing, the "S-" of S-GPTQ and S-P-GPTQ (quantization.md 6).

Inputs with large activations get larger weights (and a smaller error) by a factor t a channel that
the previous operation divides out again, so the function stays. t = mean |x|^ratio, normalised; the
ratio with the least output error under plain group quantisation is kept. The clipping search of the
AWQ code is not part of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minicpm_jax.core import types
from minicpm_jax.quant import gptq

NUM_RATIOS = 20


class Smoothing(NamedTuple):
  """What a search found; losses[i] belongs to ratio i / len(losses)."""

  factor_I: Float[Array, "I"]
  ratio: float
  losses: tuple[float, ...]


def factor(mean_abs_I: Float[Array, "I"], ratio: Any) -> Float[Array, "I"]:
  """t = max(a^ratio, 1e-4) / sqrt(max t min t); ratio 0 gives ones."""
  t_I = jnp.maximum(mean_abs_I.astype(jnp.float32) ** ratio, 1e-4)
  return t_I / jnp.sqrt(jnp.max(t_I) * jnp.min(t_I))


def rounded(
  w_IO: Float[Array, "I O"], t_I: Float[Array, "I"], cfg: gptq.GPTQConfig
) -> Float[Array, "I O"]:
  """Q(w t) / t: the kernel as plain group quantisation of the smoothed weights leaves it."""
  solution = gptq.round_to_nearest(w_IO.astype(jnp.float32) * t_I[:, None], cfg)
  return gptq.dequantize(solution) / t_I[:, None]


def search(
  mean_abs_I: Float[Array, "I"],
  loss: Callable[[Float[Array, "I"]], Any],
  num_ratios: int = NUM_RATIOS,
) -> Smoothing:
  """The factor of least loss(t) over ratios 0, 1/n, ..., (n - 1)/n; the first of equal ones."""
  factors = [factor(mean_abs_I, i / num_ratios) for i in range(num_ratios)]
  losses = [float(x) for x in np.asarray(jnp.stack([loss(t) for t in factors]))]
  if not np.all(np.isfinite(losses)):
    raise ValueError(f"awq: found losses {losses}, expected finite numbers")
  best = int(np.argmin(losses))
  return Smoothing(factors[best], best / num_ratios, tuple(losses))


def fold_norm(
  layer: types.Params, norm: str, kernels: Sequence[str], t_I: Float[Array, "I"]
) -> types.Params:
  """`layer` with norm scale / t and rows of the kernels * t ("attn/q" names); others untouched."""
  layer = _copy(layer)
  scale = layer[norm]["scale"]
  layer[norm]["scale"] = (scale.astype(jnp.float32) / t_I).astype(scale.dtype)
  for name in kernels:
    _multiply_rows(layer, name, t_I)
  return layer


def fold_up_down(layer: types.Params, t_F: Float[Array, "F"]) -> types.Params:
  """Outputs of up / t, inputs of down * t: the gate's activation is linear in up."""
  layer = _copy(layer)
  up_DF = layer["mlp"]["up"]["kernel"]
  layer["mlp"]["up"]["kernel"] = (up_DF.astype(jnp.float32) / t_F[None]).astype(up_DF.dtype)
  _multiply_rows(layer, "mlp/down", t_F)
  return layer


def _multiply_rows(layer: types.Params, name: str, t_I: Array) -> None:
  part, kernel = name.split("/")
  w = layer[part][kernel]["kernel"]
  t = jnp.reshape(t_I, (-1,) + (1,) * (w.ndim - 1))
  layer[part][kernel]["kernel"] = (w.astype(jnp.float32) * t).astype(w.dtype)


def _copy(tree: types.Params) -> types.Params:
  """New dicts, same leaves."""
  return {k: _copy(v) if isinstance(v, dict) else v for k, v in tree.items()}
