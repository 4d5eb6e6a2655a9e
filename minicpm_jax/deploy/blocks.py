"""One block of the model at a time, with the inputs of its projections: what calibration needs."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.models import transformer
from minicpm_jax.nn import layers, rope, sparse_grid
from minicpm_jax.quant import calib

# Projections by the input they share, in the order in which they are quantised (true sequential).
STAGES = (("attn/q", "attn/k", "attn/v"), ("attn/o",), ("mlp/gate", "mlp/up"), ("mlp/down",))


def check_model(cfg: ModelConfig) -> None:
  """Calibration is built for dense blocks with grouped-query attention, in float parameters."""
  if cfg.moe is not None:
    raise ValueError("model.moe: found experts, expected a dense model (not built for experts)")
  if cfg.mla is not None:
    raise ValueError("model.mla: found latent attention, expected grouped-query attention")


def context(cfg: ModelConfig, segment_ids_BT: Int[Array, "B T"]) -> transformer.Context:
  """What `Transformer` gives its blocks; attention is sparse only from dense_len on."""
  positions_BT = calib.positions(segment_ids_BT)
  (B, T), grid = segment_ids_BT.shape, None
  tables = rope.tables(cfg.rope, cfg.rotary_dim, cfg.max_position, positions_BT)
  if cfg.sparse is not None and not sparse_grid.is_always_dense(cfg.sparse, T):
    grid = sparse_grid.make_grid(cfg.sparse, T, T, B, segment_ids_BS=segment_ids_BT)
  return transformer.Context(tables, segment_ids_BT, segment_ids_BT, grid)


def run(
  cfg: ModelConfig,
  layer: types.Params,
  x_BTD: Float[Array, "B T D"],
  segment_ids_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], dict[str, tuple[Array, Array]]]:
  """(the block's output, {"attn/q": (input, output) of that projection, ...})."""
  seen: dict[str, tuple[Array, Array]] = {}

  def watch(call: Callable[..., Any], args: Any, kwargs: Any, where: Any) -> Any:
    out = call(*args, **kwargs)
    if isinstance(where.module, layers.Linear) and where.method_name == "__call__":
      seen["/".join(where.module.path)] = (args[0], out)
    return out

  block = transformer.Block(cfg, cfg.residual_scale)
  with nn.intercept_methods(watch):
    (out_BTD, _), _ = block.apply({"params": layer}, (x_BTD, None), context(cfg, segment_ids_BT))
  return out_BTD, seen


@functools.partial(jax.jit, static_argnames="cfg")
def output(cfg: ModelConfig, layer: Any, x_BTD: Array, segment_ids_BT: Array) -> Array:
  return run(cfg, layer, x_BTD, segment_ids_BT)[0]


@functools.partial(jax.jit, static_argnames=("cfg", "name"))
def projection_input(
  cfg: ModelConfig, name: str, layer: Any, x_BTD: Array, segment_ids_BT: Array
) -> Float[Array, "B T I"]:
  """Input of one projection; what comes after it in the block is not computed."""
  return calib.flat(run(cfg, layer, x_BTD, segment_ids_BT)[1][name][0])


@functools.partial(jax.jit, static_argnames=("cfg", "name"), donate_argnums=5)
def add_hessian(
  cfg: ModelConfig,
  name: str,
  layer: Any,
  x_BTD: Array,
  segment_ids_BT: Array,
  hessian_II: Float[Array, "I I"],
  keep_BT: Bool[Array, "B T"],
) -> Float[Array, "I I"]:
  """H + X^T X of one projection's input over the kept tokens."""
  x = run(cfg, layer, x_BTD, segment_ids_BT)[1][name][0]
  return calib.hessian_update(hessian_II, x, keep_BT)


@functools.partial(jax.jit, static_argnames="cfg")
def attention_branch(cfg: ModelConfig, layer: Any, x_BTD: Array, segment_ids_BT: Array) -> Array:
  """Output of the attention branch (before the residual multiplier)."""
  return run(cfg, layer, x_BTD, segment_ids_BT)[1]["attn/o"][1]


@functools.partial(jax.jit, static_argnames="cfg")
def mlp_branch(cfg: ModelConfig, mlp: Any, x_BTD: Array) -> Array:
  """Output of the MLP for normalised inputs."""
  return layers.MLP(cfg).apply({"params": mlp}, x_BTD)


def embed(
  model: transformer.Transformer, params: types.Params, tokens_BT: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T D"]:
  """Input of the first block."""
  return model.apply({"params": params}, jnp.asarray(tokens_BT), method="embed")


def layer_params(cfg: ModelConfig, params: types.Params, i: int) -> types.Params:
  """Subtree of layer i, whichever form the model has."""
  if not cfg.scan_layers:
    return params[f"layers_{i}"]
  return jax.tree.map(lambda x: x[i], params["layers"])


def with_layers(cfg: ModelConfig, params: types.Params, done: list[types.Params]) -> types.Params:
  """`params` with its layers replaced, stacked again where the model stacks them."""
  rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers")}
  if cfg.scan_layers:
    return {**rest, "layers": jax.tree.map(lambda *x: jnp.stack(x), *done)}
  return {**rest, **{f"layers_{i}": layer for i, layer in enumerate(done)}}
