"""The smoothing search of one block, "S-" (quantization.md 6): the pairs of a dense GQA block.

attn_norm -> {q, k, v} by the attention's output, mlp_norm -> {gate, up} by the MLP's output, rows
of up -> down by down's own output. v -> o is left out: its shapes match in multi-head blocks only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.deploy import blocks
from minicpm_jax.quant import awq, calib, gptq

_rounded = jax.jit(awq.rounded, static_argnames="cfg")


@dataclasses.dataclass(frozen=True)
class Text:
  """Inputs of the block, batch by batch, and the tokens whose outputs count."""

  hidden: list[Any]  # [B, T, D]
  segments: list[Any]  # [B, T]
  keep: list[Any]  # bool [B, T]
  before: Any = None  # keys and values of the prefix in this layer


def smooth(
  model_cfg: ModelConfig, layer: types.Params, text: Text, cfg: gptq.GPTQConfig, num_ratios: int
) -> tuple[types.Params, dict[str, float]]:
  """The layer with the best factors folded in, and the ratio of every stage's first name."""
  ratios = {}
  search = functools.partial(awq.search, num_ratios=num_ratios)

  def inputs(name: str) -> list[Array]:
    pairs = zip(text.hidden, text.segments, strict=True)
    args = (model_cfg, name, layer)
    return [blocks.projection_input(*args, x, s, text.before) for x, s in pairs]

  def mean_abs(batches: list[Array]) -> Float[Array, "I"]:
    total = (jnp.zeros(batches[0].shape[-1]), jnp.zeros(()))
    for x, k in zip(batches, text.keep, strict=True):
      total = calib.abs_update(total, x, k)
    return total[0] / jnp.maximum(total[1], 1)

  def square(found: list[Array], wanted: list[Array]) -> Float[Array, ""]:
    parts = zip(found, wanted, text.keep, strict=True)
    return sum(
      jnp.sum(jnp.where(k[..., None], a - b, 0).astype(jnp.float32) ** 2) for a, b, k in parts
    )

  def replaced(names: tuple[str, ...], t_I: Array) -> types.Params:
    changed = layer
    for name in names:
      changed = _put(changed, name, _rounded(_kernel(layer, name), t_I, cfg=cfg))
    return changed

  def attention(changed: types.Params) -> list[Array]:
    pairs = zip(text.hidden, text.segments, strict=True)
    return [blocks.attention_branch(model_cfg, changed, x, s, text.before) for x, s in pairs]

  names, wanted = ("attn/q", "attn/k", "attn/v"), attention(layer)
  found = search(
    mean_abs(inputs("attn/q")), lambda t: square(attention(replaced(names, t)), wanted)
  )
  layer, ratios[names[0]] = awq.fold_norm(layer, "attn_norm", names, found.factor_I), found.ratio

  names, normed = ("mlp/gate", "mlp/up"), inputs("mlp/gate")
  wanted = [blocks.mlp_branch(model_cfg, layer["mlp"], x) for x in normed]
  found = search(
    mean_abs(normed),
    lambda t: square(
      [blocks.mlp_branch(model_cfg, replaced(names, t)["mlp"], x) for x in normed], wanted
    ),
  )
  layer, ratios[names[0]] = awq.fold_norm(layer, "mlp_norm", names, found.factor_I), found.ratio

  inner, w_FD = inputs("mlp/down"), _kernel(layer, "mlp/down")
  total = calib.hessian_init(w_FD.shape[0])
  for x, k in zip(inner, text.keep, strict=True):
    total = calib.hessian_update(total, x, k)
  found = search(
    mean_abs(inner), lambda t: gptq.relative_error(_rounded(w_FD, t, cfg=cfg), w_FD, total)
  )
  ratios["mlp/down"] = found.ratio
  return awq.fold_up_down(layer, found.factor_I), ratios


def _kernel(layer: types.Params, name: str) -> Float[Array, "I O"]:
  part, kernel = name.split("/")
  w = layer[part][kernel]["kernel"].astype(jnp.float32)
  return w.reshape(w.shape[0], -1)  # every projection here has one input axis


def _put(layer: types.Params, name: str, w_IO: Float[Array, "I O"]) -> types.Params:
  part, kernel = name.split("/")
  old = layer[part][kernel]["kernel"]
  new = w_IO.reshape(old.shape).astype(old.dtype)
  return {**layer, part: {**layer[part], kernel: {"kernel": new}}}
