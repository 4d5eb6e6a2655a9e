"""EAGLE-3's features at unit size while a draft is trained.

The residual stream of a target may be large (rms 100 in this repository's small muP model). What fc
makes of it is the draft's own stream, and the next token comes in through the branches of its layer
alone: beside a stream that large the final norm hides them. Training therefore multiplies the
features by 2^k more, so that their rms is about 1. Files keep the scale that their config says, as
engines read it: there fc carries the factor, exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.models import transformer


def exponent(
  draft: config.DraftConfig,
  target: transformer.Transformer,
  params: types.Params,
  batch: dict[str, np.ndarray],
) -> int:
  """The k that brings feature_scale * 2^k * features to an rms in 0.71..1.41 on these tokens."""

  @jax.jit
  def mean_square(params, tokens_BT, positions_BT, segment_ids_BT):
    out = target.apply(
      {"params": params},
      tokens_BT,
      positions_BT,
      segment_ids_BT,
      tap_layers=draft.feature_layers,
      return_logits=False,
    )
    square_BT = jnp.mean(jnp.square(out.taps.astype(jnp.float32)), axis=-1)
    is_text_BT = (segment_ids_BT != 0).astype(jnp.float32)
    return jnp.sum(square_BT * is_text_BT) / jnp.maximum(jnp.sum(is_text_BT), 1.0)

  found = float(mean_square(params, *(batch[k] for k in ("tokens", "positions", "segment_ids"))))
  if not 0 < found < np.inf:
    raise ValueError(f"features: found a mean square of {found}, expected a number > 0")
  return round(-np.log2(np.sqrt(found) * draft.feature_scale))


def scaled(draft: config.DraftConfig, k: int) -> config.DraftConfig:
  return dataclasses.replace(draft, feature_scale=draft.feature_scale * 2.0**k)


def moved(params: types.Params, old: float, new: float) -> types.Params:
  """The same draft with feature_scale `new` instead of `old`: fc takes the factor over."""
  kernel = params["fc"]["kernel"]
  kernel = kernel * np.asarray(old / new, kernel.dtype)
  return params | {"fc": params["fc"] | {"kernel": kernel}}
