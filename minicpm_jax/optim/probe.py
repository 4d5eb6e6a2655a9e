"""Diagnostics of the decay stage (training.md 4.4, MiniCPM section 4.4).

With g_t the gradient on one fixed batch and v_t = x_{t+1} - x_t the step between two probes:
  grad_norm |g_{t+1}|,  grad_cosine cos(g_{t+1}, g_t),
  slope D1 = g_{t+1} . v_t / |v_t|,  second D2 = (g_{t+1} - g_t) . v_t / |v_t|^2,
  curvature K = |D2| / (1 + D1^2)^(3/2),  max_step = largest |x_{t+1} - x_t| over matrices.
The batch is fixed because minibatch noise swamps the cosine at small scale; sums are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from minicpm_jax.core import trees, types
from minicpm_jax.optim import mup

Scalar = Float[types.Array, ""]


def _dot(a: Any, b: Any) -> Scalar:
  parts = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
  return sum(jax.tree.leaves(parts), jnp.float32(0))


def diagnostics(params: Any, grads: Any, last_params: Any, last_grads: Any) -> dict[str, Scalar]:
  """The numbers of the module docstring; 0 in place of 0/0 where nothing moved."""
  step = jax.tree.map(
    lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), params, last_params
  )
  change = jax.tree.map(
    lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), grads, last_grads
  )
  norm, last_norm = jnp.sqrt(_dot(grads, grads)), jnp.sqrt(_dot(last_grads, last_grads))
  moved = jnp.sqrt(_dot(step, step))
  slope = _ratio(_dot(grads, step), moved)
  second = _ratio(_dot(change, step), moved**2)
  sizes = trees.flatten_paths(jax.tree.map(lambda x: jnp.max(jnp.abs(x)), step))
  matrices = [size for path, size in sizes.items() if mup.role_of(path) == "matrix"]
  return {
    "grad_norm": norm,
    "grad_cosine": _ratio(_dot(grads, last_grads), norm * last_norm),
    "slope": slope,
    "second": second,
    "curvature": jnp.abs(second) / (1.0 + slope**2) ** 1.5,
    "max_step": jnp.max(jnp.stack(matrices)) if matrices else jnp.float32(0),
  }


def _ratio(a: Scalar, b: Scalar) -> Scalar:
  return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


class Probe:
  """Calls `grad_fn(params) -> grads` (a fixed batch inside) and compares with the last call.

  Keeps a copy of the parameters and gradients of the last call (2x the parameter memory), because
  the train step donates its own.
  """

  def __init__(self, grad_fn: Callable[[Any], Any]):
    self._grad = jax.jit(grad_fn)
    self._compare = jax.jit(diagnostics)
    self._last: tuple[Any, Any] | None = None

  def __call__(self, params: Any) -> dict[str, float]:
    """Diagnostics since the last call; the first call only remembers and returns {}."""
    grads = self._grad(params)
    last, self._last = self._last, (jax.tree.map(jnp.copy, params), grads)
    if last is None:
      return {}
    values = jax.device_get(self._compare(params, grads, *last))
    return {name: float(value) for name, value in values.items()}
