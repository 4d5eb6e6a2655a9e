"""AdamW with muP factors as one optax transformation (training.md sections 1 and 12).

One elementwise expression a leaf (clip, moments, decay, muP factor, -lr), which XLA fuses; the
global norm is the only extra pass. The learning rate is an argument of `update`, so a schedule or
a sweep never recompiles, and the step counter of the train state is the only source of the step.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from minicpm_jax import config
from minicpm_jax.core import trees, types
from minicpm_jax.optim import mup


class AdamState(NamedTuple):
  """`count` updates done; moments with the structure of the parameters (nu always float32)."""

  count: Int[types.Array, ""]
  mu: Any
  nu: Any


def make_optimizer(
  cfg: config.OptimConfig, model_cfg: config.ModelConfig, params: Any
) -> optax.GradientTransformationExtraArgs:
  """The optimiser of `cfg`; `params` (arrays or shape structs) only lends its paths.

  `tx.update(grads, state, params, lr=lr)` returns float32 updates for `optax.apply_updates`:

    g = grads * min(1, clip_norm / |grads|)      (norm over all trained leaves)
    m, v = Adam moments; u = m^ / (sqrt(v^) + eps)
    -lr * s * (u + wd * p)            decay_coupling "lr"           (s: `mup.lr_scale`)
    -lr * s * u - wd * p              decay_coupling "independent"

  with wd = 0 on norms. Leaves matching `cfg.frozen` get no moments, no update and no share in the
  norm; a pattern that matches nothing is an error.
  """
  for path in trees.flatten_paths(params):
    mup.role_of(path)  # an unknown leaf is refused here, not in the middle of a trace
  tx = _adamw(cfg, model_cfg)
  if not cfg.frozen:
    return tx
  labels = frozen_labels(cfg.frozen, params)
  return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def frozen_labels(patterns: tuple[str, ...], params: Any) -> Any:
  """Tree of "frozen" (some pattern is found in the path) and "trained"."""
  paths = list(trees.flatten_paths(params))
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"optim.frozen: {pattern!r} is no regular expression ({error})") from None
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f"optim.frozen: {pattern!r} matches no parameter; paths are {paths}")

  def label(path: str, _: Any) -> str:
    return "frozen" if any(re.search(p, path) for p in patterns) else "trained"

  labels = trees.map_with_path(label, params)
  if "trained" not in jax.tree.leaves(labels):
    raise ValueError(f"optim.frozen: {patterns} freezes every parameter, expected some to train")
  return labels


def _adamw(
  cfg: config.OptimConfig, model_cfg: config.ModelConfig
) -> optax.GradientTransformationExtraArgs:
  mu_dtype = types.dtype_of(cfg.moment_dtype)

  def init(params: Any) -> AdamState:
    mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params)
    nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    return AdamState(jnp.zeros((), jnp.int32), mu, nu)

  def update(
    grads: Any,
    state: AdamState,
    params: Any,
    *,
    lr: float | np.floating | Float[types.Array, ""],
    **_: Any,
  ) -> tuple[Any, AdamState]:
    count = optax.safe_increment(state.count)
    t = count.astype(jnp.float32)
    m_correction, v_correction = 1.0 / (1.0 - cfg.b1**t), 1.0 / (1.0 - cfg.b2**t)
    clip = _clip_factor(grads, cfg.clip_norm)

    def leaf(path: str, g: Any, m: Any, v: Any, p: Any) -> tuple[Any, Any, Any]:
      role = mup.role_of(path)
      g = g.astype(jnp.float32) * clip
      m = cfg.b1 * m.astype(jnp.float32) + (1.0 - cfg.b1) * g
      v = cfg.b2 * v + (1.0 - cfg.b2) * (g * g)
      u = m * m_correction / (jnp.sqrt(v * v_correction) + cfg.eps)
      decay = cfg.weight_decay if role in mup.DECAYED else 0.0
      rate = lr * (mup.lr_scale(model_cfg, role) if cfg.mup else 1.0)
      if cfg.decay_coupling == "lr":
        u = -rate * (u + decay * p.astype(jnp.float32) if decay else u)
      else:
        u = -rate * u - (decay * p.astype(jnp.float32) if decay else 0.0)
      return u, m.astype(mu_dtype), v

    out = trees.map_with_path(leaf, grads, state.mu, state.nu, params)
    updates, mu, nu = jax.tree.transpose(jax.tree.structure(grads), None, out)
    return updates, AdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _clip_factor(grads: Any, clip_norm: float) -> float | Float[types.Array, ""]:
  if clip_norm == 0:
    return 1.0
  return clip_norm / jnp.maximum(optax.tree.norm(grads), clip_norm)


def state_shardings(
  tx: optax.GradientTransformation, params: Any, param_shardings: Any, replicated: Any
) -> Any:
  """Shardings of `tx.init(params)`: moments like their parameters, counters `replicated`.

  By path, because `optax.tree_map_params` does not see through frozen groups.
  """
  of_param = trees.flatten_paths(param_shardings)

  def one(path: str, _: Any) -> Any:
    parts = path.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((of_param[tail] for tail in tails if tail in of_param), replicated)

  return trees.map_with_path(one, jax.eval_shape(tx.init, params))
