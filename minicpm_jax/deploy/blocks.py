"""One block of the model at a time, with the inputs of its projections: what calibration needs.

Blocks of every kind: grouped-query or latent attention, one MLP or experts. Behind prefix tokens
(`quant.prefix`) a block attends to their stored keys and values as well.
"""

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
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer
from minicpm_jax.nn import functional, kv, layers, moe, rope, sparse_grid
from minicpm_jax.quant import calib, prefix, qtensor, tree

_GQA = (("attn/q", "attn/k", "attn/v"), ("attn/o",))
_MLA = (("attn/q_a", "attn/kv_a"), ("attn/q_b",), ("attn/kv_b",), ("attn/o",))
_LATENT_NORM = "attn/kv_a_norm"  # its output is what kv_b multiplies
KeyValues = tuple[Array, Array]  # of the prefix in one layer: [P, K, H], [P, K, V]


def stages(cfg: ModelConfig) -> tuple[tuple[str, ...], ...]:
  """Projections by the input they share, in the order of quantisation (true sequential)."""
  mlp = "mlp" if cfg.moe is None else "moe"
  attn = _GQA if cfg.mla is None else _MLA
  return (*attn, (f"{mlp}/gate", f"{mlp}/up"), (f"{mlp}/down",))


def context(
  cfg: ModelConfig, segment_ids_BT: Int[Array, "B T"], prefix_length: int = 0
) -> transformer.Context:
  """What `Transformer` gives its blocks; attention is sparse only from dense_len on."""
  P, (B, T), grid = prefix_length, segment_ids_BT.shape, None
  positions_BT = calib.positions(segment_ids_BT) + P
  tables = rope.tables(cfg.rope, cfg.rotary_dim, cfg.max_position, positions_BT)
  if cfg.sparse is not None and not sparse_grid.is_always_dense(cfg.sparse, P + T):
    if P > 0:
      raise NotImplementedError(
        f"prefix: found {P} + {T} tokens, expected less than sparse.dense_len "
        f"{cfg.sparse.dense_len} (dense attention)"
      )
    grid = sparse_grid.make_grid(cfg.sparse, T, T, B, segment_ids_BS=segment_ids_BT)
  ids_BS = jnp.pad(segment_ids_BT, ((0, 0), (P, 0)), constant_values=1)
  return transformer.Context(tables, segment_ids_BT, ids_BS, grid)


def layer_prefix(cfg: ModelConfig, found: prefix.Prefix | None, i: int) -> KeyValues | None:
  """Keys and values of the prefix in layer i."""
  if found is None:
    return None
  prefix.check(found, cfg.num_layers, cache_lib.widths(cfg))
  return jnp.asarray(found.k[i]), jnp.asarray(found.v[i])


def _layer_cache(before: KeyValues | None, shape: tuple[int, int]) -> kv.LayerCache | None:
  """A cache of one layer that holds the prefix in every row, with room for `shape` new tokens."""
  if before is None:
    return None
  (B, T), P = shape, before[0].shape[0]

  def filled(x_PKH: Array) -> Array:
    x_BPKH = jnp.broadcast_to(x_PKH[None], (B, *x_PKH.shape))
    return jnp.pad(x_BPKH, ((0, 0), (0, T), (0, 0), (0, 0)))

  return kv.LayerCache(filled(before[0]), filled(before[1]), jnp.int32(P))


def run(
  cfg: ModelConfig,
  layer: types.Params,
  x_BTD: Float[Array, "B T D"],
  segment_ids_BT: Int[Array, "B T"],
  before: KeyValues | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, tuple[Array, Array]]]:
  """(the block's output, {"attn/q": (input, output) of that projection, ...}).

  The input of kv_b is there without an output (None); of experts, "moe" has those of the layer.
  """
  seen: dict[str, tuple[Array, Any]] = {}

  def watch(call: Callable[..., Any], args: Any, kwargs: Any, where: Any) -> Any:
    out = call(*args, **kwargs)
    if where.method_name != "__call__":
      return out
    name = "/".join(where.module.path)
    if isinstance(where.module, layers.Linear):
      seen[name] = (args[0], out)
    elif name == _LATENT_NORM:
      seen["attn/kv_b"] = (out, None)
    elif isinstance(where.module, moe.MoE):
      seen["moe"] = (args[0], out[0])
    return out

  block = transformer.Block(cfg, cfg.residual_scale)
  cache = _layer_cache(before, segment_ids_BT.shape)
  ctx = context(cfg, segment_ids_BT, 0 if before is None else before[0].shape[0])
  with nn.intercept_methods(watch):
    (out_BTD, _), _ = block.apply({"params": layer}, (x_BTD, cache), ctx)
  return out_BTD, seen


@functools.partial(jax.jit, static_argnames="cfg")
def output(
  cfg: ModelConfig, layer: Any, x_BTD: Array, segment_ids_BT: Array, before: Any = None
) -> Array:
  return run(cfg, layer, x_BTD, segment_ids_BT, before)[0]


@functools.partial(jax.jit, static_argnames=("cfg", "name"))
def projection_input(
  cfg: ModelConfig, name: str, layer: Any, x_BTD: Array, segment_ids_BT: Array, before: Any = None
) -> Float[Array, "B T I"]:
  """Input of one projection, or of the experts ("moe"); what comes after it is not computed."""
  return calib.flat(run(cfg, layer, x_BTD, segment_ids_BT, before)[1][name][0])


def _expert_input(cfg: ModelConfig, name: str, experts: types.Params, x_BTD: Array, e: Any):
  """Input of expert e's projection `name`, of every token."""
  if name != "moe/down":
    return x_BTD
  gate, up = (x_BTD @ experts[part]["kernel"][e].astype(x_BTD.dtype) for part in ("gate", "up"))
  return functional.gated(gate, up, cfg.act, cfg.act_threshold)


@functools.partial(jax.jit, static_argnames=("cfg", "name"), donate_argnums=5)
def add_hessian(
  cfg: ModelConfig,
  name: str,
  layer: Any,
  x_BTD: Array,
  segment_ids_BT: Array,
  hessian_II: Float[Array, "*E I I"],
  keep_BT: Bool[Array, "B T"],
  before: Any = None,
  first_BT: Any = None,
) -> Float[Array, "*E I I"]:
  """H + X^T X of one projection's input over the kept tokens; of an expert, over its tokens.

  Tokens of `first_BT` are bounded (`calib.bounded`).
  """
  seen = run(cfg, layer, x_BTD, segment_ids_BT, before)[1]

  def update(h_II: Array, x: Array, own_BT: Array) -> Array:
    x = x if first_BT is None else calib.bounded(x, keep_BT, first_BT)
    return calib.hessian_update(h_II, x, own_BT)

  if not name.startswith("moe/"):
    return update(hessian_II, seen[name][0], keep_BT)
  x_BTD, experts = seen["moe"][0], layer["moe"]
  index_BTX = moe.route(x_BTD, experts["router"]["kernel"], cfg.moe.experts_per_token)[2]

  def one(args: tuple[Array, Array]) -> Array:
    e, h_II = args
    own_BT = keep_BT & jnp.any(index_BTX == e, axis=-1)
    return update(h_II, _expert_input(cfg, name, experts, x_BTD, e), own_BT)

  return jax.lax.map(one, (jnp.arange(cfg.moe.num_experts), hessian_II))


@functools.partial(jax.jit, static_argnames="cfg")
def attention_branch(
  cfg: ModelConfig, layer: Any, x_BTD: Array, segment_ids_BT: Array, before: Any = None
) -> Array:
  """Output of the attention branch (before the residual multiplier)."""
  return run(cfg, layer, x_BTD, segment_ids_BT, before)[1]["attn/o"][1]


@functools.partial(jax.jit, static_argnames="cfg")
def mlp_branch(cfg: ModelConfig, mlp: Any, x_BTD: Array) -> Array:
  """Output of the MLP, or of the experts, for normalised inputs."""
  if cfg.moe is not None:
    return moe.MoE(cfg).apply({"params": mlp}, x_BTD)[0]
  return layers.MLP(cfg).apply({"params": mlp}, x_BTD)


@functools.partial(jax.jit, static_argnames="cfg")
def expert_down(
  cfg: ModelConfig, layer: Any, x_BTD: Array, segment_ids_BT: Array, before: Any, e: Any
) -> tuple[Float[Array, "B T F"], Bool[Array, "B T"]]:
  """(input of expert e's down projection of every token, the tokens that the router gives it)."""
  x_BTD, experts = run(cfg, layer, x_BTD, segment_ids_BT, before)[1]["moe"][0], layer["moe"]
  index_BTX = moe.route(x_BTD, experts["router"]["kernel"], cfg.moe.experts_per_token)[2]
  return _expert_input(cfg, "moe/down", experts, x_BTD, e), jnp.any(index_BTX == e, axis=-1)


def embed(
  model: transformer.Transformer, params: types.Params, tokens_BT: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T D"]:
  """Input of the first block; ids beyond the vocabulary (another tokenizer's?) are refused."""
  ids_BT, high = np.asarray(tokens_BT), model.cfg.vocab_size - 1
  is_ids = ids_BT.ndim == 2 and np.issubdtype(ids_BT.dtype, np.integer)
  if not is_ids or ids_BT.min(initial=0) < 0 or ids_BT.max(initial=0) > high:
    ids = f"{ids_BT.min()}..{ids_BT.max()}" if ids_BT.size else "none"
    raise ValueError(
      f"tokens: found {ids_BT.dtype}{list(ids_BT.shape)} of {ids}, expected ids 0..{high} [B, T]"
    )
  return model.apply({"params": params}, jnp.asarray(ids_BT), method="embed")


def num_in(name: str) -> int:
  """How many axes of the kernel "attn/o", "mlp/down", ... are inputs."""
  return tree.layout(f"{name}/kernel")[0]


def kernel(layer: types.Params, name: str) -> Float[Array, "*E I O"]:
  """The kernel as [in, out], that of experts as [experts, in, out], float32."""
  part, leaf = name.split("/")
  w = layer[part][leaf]["kernel"].astype(jnp.float32)
  if part == "moe":
    return w
  return w.reshape(int(np.prod(w.shape[: num_in(name)])), -1)


def with_kernel(layer: types.Params, name: str, new: Any) -> types.Params:
  """`layer` with another kernel; floats get the shape and dtype of the one they replace."""
  part, leaf = name.split("/")
  old = layer[part][leaf]["kernel"]
  if not qtensor.is_qtensor(new):
    new = new.reshape(old.shape).astype(old.dtype)
  return {**layer, part: {**layer[part], leaf: {"kernel": new}}}


def layer_params(cfg: ModelConfig, params: types.Params, i: int) -> types.Params:
  """Subtree of layer i, whichever form the model has."""
  if not cfg.scan_layers:
    return params[f"layers_{i}"]
  leaves = jax.tree.leaves(params["layers"])
  at = _at if all(isinstance(x, jax.Array) for x in leaves) else _at.__wrapped__
  return at(params["layers"], i)


@jax.jit  # one program, not one a shape
def _at(stacked: Any, i: Any) -> Any:
  return jax.tree.map(lambda x: x[i], stacked)


@jax.jit
def _stacked(layers: list[Any]) -> Any:
  return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def with_layers(cfg: ModelConfig, params: types.Params, done: list[types.Params]) -> types.Params:
  """`params` with its layers replaced, stacked again where the model stacks them."""
  rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers")}
  if cfg.scan_layers:
    return {**rest, "layers": _stacked(done)}
  return {**rest, **{f"layers_{i}": layer for i, layer in enumerate(done)}}
