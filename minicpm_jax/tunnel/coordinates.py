"""Coordinate check: does the size of activations stay put when the width grows (muP, section 1)?

RMS of what every attention and MLP block adds to the residual stream, after a few steps, against
width; the slope of the log-log line is near 0 where learning transfers. Without experts only.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.models import convert, transformer
from minicpm_jax.nn import attention, layers


def activation_rms(
  model: config.ModelConfig, params: types.Params, ids_BT: np.ndarray
) -> dict[str, float]:
  """RMS by block: "layer/attn", "layer/mlp" times the residual scale, "embed", "logits"."""
  model, params = convert.unstack_layers(model, params)
  found = jax.device_get(_forward(model)(params, jnp.asarray(ids_BT)))
  return {name: float(value) for name, value in found.items()}


@functools.lru_cache(maxsize=32)
def _forward(model: config.ModelConfig) -> Callable[[Any, Any], dict[str, Any]]:
  """The compiled measurement of one model in list form."""
  net = transformer.Transformer(model)
  kinds = (attention.Attention, layers.MLP, layers.Embed)

  @jax.jit
  def forward(params: Any, ids_BT: Any) -> dict[str, Any]:
    out, found = net.apply(
      {"params": params},
      ids_BT,
      capture_intermediates=lambda module, name: isinstance(module, kinds) and name == "__call__",
      mutable=["intermediates"],
    )
    found = found["intermediates"]
    rms = {"embed": _rms(found["embed"]["__call__"][0]), "logits": _rms(out.logits)}
    for i in range(model.num_layers):
      layer = found[f"layers_{i}"]
      branch_BTD = layer["attn"]["__call__"][0][0]  # (output, cache)
      rms[f"layer{i}/attn"] = _rms(branch_BTD) * model.residual_scale
      rms[f"layer{i}/mlp"] = _rms(layer["mlp"]["__call__"][0]) * model.residual_scale
    return rms

  return forward


def _rms(x: Any) -> Any:
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def slopes(by_width: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
  """Slope of ln RMS against ln width for every coordinate."""
  widths: Sequence[int] = sorted(by_width)
  if len(widths) < 2:
    raise ValueError(f"by_width: found widths {list(widths)}, expected at least two")
  logs = np.log(np.array(widths, np.float64))
  names = by_width[widths[0]]
  return {
    name: float(np.polyfit(logs, [np.log(by_width[w][name]) for w in widths], 1)[0])
    for name in names
  }
