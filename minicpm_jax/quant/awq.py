"""AWQ smoothing, the "S-" of S-GPTQ and S-P-GPTQ (quantization.md 6).

Inputs with large activations get larger weights (and a smaller error) by a factor t a channel that
the previous operation divides out again, so the function stays. t = mean |x|^ratio, normalised; the
ratio with the least output error under plain group quantisation is kept. The clipping search of the
AWQ code is not part of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minicpm_jax.core import types
from minicpm_jax.quant import gptq, tree

NUM_RATIOS = 20
_READERS = {
  "attn_norm": ("attn/q", "attn/k", "attn/v", "attn/q_a", "attn/kv_a"),
  "attn/q_a_norm": ("attn/q_b",),
  "attn/kv_a_norm": ("attn/kv_b",),
  "mlp_norm": ("mlp/gate", "mlp/up", "moe/router", "moe/gate", "moe/up"),
}


class Smoothing(NamedTuple):
  """What a search found; losses[i] belongs to ratio i / len(losses)."""

  factor_I: Float[Array, " I"]
  ratio: float
  losses: tuple[float, ...]


@jax.jit
def factor(mean_abs_I: Float[Array, " I"], ratio: Any) -> Float[Array, " I"]:
  """t = max(a^ratio, 1e-4) / sqrt(max t min t); ratio 0 gives ones."""
  t_I = jnp.maximum(mean_abs_I.astype(jnp.float32) ** ratio, 1e-4)
  return t_I / jnp.sqrt(jnp.max(t_I) * jnp.min(t_I))


def rounded(
  w_IO: Float[Array, "I O"], t_I: Float[Array, " I"], cfg: gptq.GPTQConfig
) -> Float[Array, "I O"]:
  """Q(w t) / t: the kernel as plain group quantisation of the smoothed weights leaves it."""
  solution = gptq.round_to_nearest(w_IO.astype(jnp.float32) * t_I[:, None], cfg)
  return gptq.dequantize(solution) / t_I[:, None]


def search(
  mean_abs_I: Float[Array, " I"],
  loss: Callable[[Float[Array, " I"]], Any],
  num_ratios: int = NUM_RATIOS,
) -> Smoothing:
  """The factor of least loss(t) over ratios 0, 1/n, ..., (n - 1)/n; the first of equal ones."""
  factors = [factor(mean_abs_I, i / num_ratios) for i in range(num_ratios)]
  losses = [float(x) for x in np.asarray(jnp.stack([loss(t) for t in factors]))]
  if not np.all(np.isfinite(losses)):
    raise ValueError(f"awq: found losses {losses}, expected finite numbers")
  best = int(np.argmin(losses))
  return Smoothing(factors[best], best / num_ratios, tuple(losses))


def readers(layer: types.Params, norm: str) -> tuple[str, ...]:
  """Kernels ("attn/q") that multiply the output of a block's norm."""
  if norm not in _READERS:
    raise ValueError(f"norm: found {norm!r}, expected one of {sorted(_READERS)}")
  names = (name.split("/") for name in _READERS[norm])
  return tuple(f"{part}/{name}" for part, name in names if name in layer.get(part, {}))


def fold_norm(
  layer: types.Params, norm: str, kernels: Sequence[str], t_I: Float[Array, " I"]
) -> types.Params:
  """`layer` with norm scale / t and rows of the kernels * t ("attn/q" names); others untouched.

  The kernels must be all that read the norm, float and not joined: the function stays.
  """
  tree.check_floats(layer)
  if set(kernels) != set(readers(layer, norm)):
    raise ValueError(
      f"{norm}: kernels: found {list(kernels)}, expected all its readers: "
      f"{list(readers(layer, norm))}"
    )
  layer = _copy(layer)
  node = functools.reduce(lambda tree, name: tree[name], norm.split("/"), layer)
  node["scale"] = (node["scale"].astype(jnp.float32) / t_I).astype(node["scale"].dtype)
  for name in kernels:
    _multiply_rows(layer, name, t_I)
  return layer


def fold_v_o(layer: types.Params, t_I: Float[Array, " I"]) -> types.Params:
  """Outputs of v / t, inputs of o * t, one factor a channel of a head: attention is linear in v.

  Of multi-head attention only: query heads that share values would need the same factors.
  """
  tree.check_floats(layer)
  layer = _copy(layer)
  v, o = (layer["attn"][name]["kernel"] for name in ("v", "o"))
  if v.shape[1:] != o.shape[:2]:
    raise ValueError(f"attn/v, attn/o: found {v.shape[1:]} and {o.shape[:2]}, expected equal heads")
  t_NH = jnp.reshape(t_I, v.shape[1:])
  layer["attn"]["v"]["kernel"] = (v.astype(jnp.float32) / t_NH[None]).astype(v.dtype)
  layer["attn"]["o"]["kernel"] = (o.astype(jnp.float32) * t_NH[..., None]).astype(o.dtype)
  return layer


def fold_up_down(layer: types.Params, t_F: Float[Array, "*E F"]) -> types.Params:
  """Outputs of up / t, inputs of down * t: the gate's activation is linear in up.

  t: one factor a channel, of experts [E, F].
  """
  tree.check_floats(layer)
  layer = _copy(layer)
  mlp = layer["mlp" if "mlp" in layer else "moe"]
  for name, factor in (("up", 1 / t_F[..., None, :]), ("down", t_F[..., :, None])):
    w = mlp[name]["kernel"]
    mlp[name]["kernel"] = (w.astype(jnp.float32) * factor).astype(w.dtype)
  return layer


def _multiply_rows(layer: types.Params, name: str, t_I: Array) -> None:
  part, kernel = name.split("/")
  w = layer[part][kernel]["kernel"]
  lead = 1 if part == "moe" and kernel != "router" else 0  # experts
  t = jnp.reshape(t_I, (1,) * lead + (-1,) + (1,) * (w.ndim - lead - 1))
  layer[part][kernel]["kernel"] = (w.astype(jnp.float32) * t).astype(w.dtype)


def _copy(tree: types.Params) -> types.Params:
  """New dicts, same leaves."""
  return {k: _copy(v) if isinstance(v, dict) else v for k, v in tree.items()}
