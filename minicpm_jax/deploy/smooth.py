"""The smoothing search of one block, "S-" (quantization.md 6): what is multiplied, by which loss.

  attn_norm -> {q, k, v}            the attention's output
  outputs of v -> o                 o's own output; of multi-head attention only
  mlp_norm -> {gate, up}            the MLP's output
  rows of up -> down                down's own output

In latent attention attn_norm feeds {q_a, kv_a}, and the latent norms q_b and kv_b, all by the
attention's output. Experts share mlp_norm with the router, which is multiplied exactly and not
rounded; each has up -> down over its own tokens. Where query heads share values (GQA) the shapes of
v and o do not match and their pair is left out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.deploy import blocks
from minicpm_jax.quant import awq, calib, gptq

# Eager, the few operations of each would be a dozen programs a shape to compile.
_rounded = jax.jit(awq.rounded, static_argnames="cfg")
_fold_norm = jax.jit(awq.fold_norm, static_argnums=(1, 2))
_fold_v_o = jax.jit(awq.fold_v_o)
_fold_up_down = jax.jit(awq.fold_up_down)


@functools.partial(jax.jit, static_argnums=0)
def _update(update: Callable[..., Any], total: Any, x_BTI: Array, factor_BT: Array) -> Any:
  """`calib.abs_update` or `hessian_update` with tokens that count as much as their factor."""
  return update(total, x_BTI * factor_BT[..., None], factor_BT > 0)


@jax.jit
def _square_error(found_BTD: Array, want_BTD: Array, factor_BT: Array) -> Float[Array, ""]:
  off = (found_BTD - want_BTD).astype(jnp.float32) * factor_BT[..., None]
  return jnp.sum(jnp.where(factor_BT[..., None] > 0, off, 0) ** 2)


@dataclasses.dataclass(frozen=True)
class Text:
  """Inputs of the block, batch by batch, and the tokens whose outputs count."""

  hidden: list[Any]  # [B, T, D]
  segments: list[Any]  # [B, T]
  keep: list[Any]  # bool [B, T]
  first: list[Any] | None = None  # bool [B, T], among `keep`: tokens that are bounded
  before: Any = None  # keys and values of the prefix in this layer


def pairs(cfg: ModelConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """(norm, kernels that read it and are rounded), in the order of the search."""
  attn = (("attn_norm", ("attn/q", "attn/k", "attn/v")),)
  if cfg.mla is not None:
    attn = (
      ("attn_norm", ("attn/q_a", "attn/kv_a")),
      ("attn/q_a_norm", ("attn/q_b",)),
      ("attn/kv_a_norm", ("attn/kv_b",)),
    )
  mlp = "mlp" if cfg.moe is None else "moe"
  return (*attn, ("mlp_norm", (f"{mlp}/gate", f"{mlp}/up")))


def smooth(
  model_cfg: ModelConfig, layer: types.Params, text: Text, cfg: gptq.GPTQConfig, num_ratios: int
) -> tuple[types.Params, dict[str, Any]]:
  """The layer with the best factors folded in, and the ratio by the first kernel of every pair (of
  "moe/down": one an expert; 0 of an expert without a token)."""
  if not sum(int(keep.sum()) for keep in text.keep):
    raise ValueError(
      f"smoothing: found no token that counts in the first {len(text.keep)} batches, expected some "
      "(longer texts, or more of them: awq_tokens)"
    )
  found: dict[str, Any] = {}
  run = _Search(model_cfg, text, cfg, num_ratios)
  for norm, names in pairs(model_cfg):
    best = run.behind_norm(layer, names)
    layer = _fold_norm(layer, norm, awq.readers(layer, norm), best.factor_I)
    found[names[0]] = best.ratio
    if "attn/v" in names and model_cfg.num_heads == model_cfg.num_kv_heads:
      best = run.own(layer, "attn/o")
      layer = _fold_v_o(layer, best.factor_I)
      found["attn/o"] = best.ratio
  if model_cfg.moe is None:
    best = run.own(layer, "mlp/down")
    return _fold_up_down(layer, best.factor_I), found | {"mlp/down": best.ratio}
  experts = [run.own(layer, "moe/down", e) for e in range(model_cfg.moe.num_experts)]
  layer = _fold_up_down(layer, jnp.stack([one.factor_I for one in experts]))
  return layer, found | {"moe/down": [one.ratio for one in experts]}


@dataclasses.dataclass(frozen=True)
class _Search:
  """Statistics and losses over the tokens of `text`."""

  model_cfg: ModelConfig
  text: Text
  cfg: gptq.GPTQConfig
  num_ratios: int

  def _each(self, fn: Callable[..., Any]) -> list[Any]:
    """fn(hidden, segments, prefix) of every batch."""
    return [
      fn(x, s, self.text.before) for x, s in zip(self.text.hidden, self.text.segments, strict=True)
    ]

  def _factors(self, batches: list[Array], own: list[Array] | None = None) -> list[Array]:
    """What each token counts: 1, a bounded first token less, 0 where it is left out.

    own: bool [B, T], tokens of an expert.
    """
    firsts = [None] * len(batches) if self.text.first is None else self.text.first
    found = []
    for i, (x, keep, first) in enumerate(zip(batches, self.text.keep, firsts, strict=True)):
      bound = 1.0 if first is None else calib.bound_factor(x, keep, first)
      found.append(jnp.where(keep if own is None else keep & own[i], bound, 0.0))
    return found

  def _mean_abs(self, batches: list[Array], factors: list[Array]) -> Float[Array, " I"]:
    total = (jnp.zeros(batches[0].shape[-1]), jnp.zeros(()))
    for x, f in zip(batches, factors, strict=True):
      total = _update(calib.abs_update, total, x, f)
    return total[0] / jnp.maximum(total[1], 1)

  def _best(self, mean_abs_I: Array, loss: Callable[[Array], Any]) -> awq.Smoothing:
    return awq.search(mean_abs_I, loss, num_ratios=self.num_ratios)

  def behind_norm(self, layer: types.Params, names: tuple[str, ...]) -> awq.Smoothing:
    """The best factor of the kernels `names`, all readers of one norm, by the branch's output."""
    part, inner = names[0].split("/")
    name = "moe" if part == "moe" else names[0]
    normed = self._each(lambda *args: blocks.projection_input(self.model_cfg, name, layer, *args))

    def branch(changed: types.Params) -> list[Array]:
      if part == "attn":
        return self._each(lambda *args: blocks.attention_branch(self.model_cfg, changed, *args))
      return [blocks.mlp_branch(self.model_cfg, changed[part], x) for x in normed]

    wanted = branch(layer)
    factors = self._factors(wanted)

    def loss(t_I: Array) -> Float[Array, ""]:
      changed = layer
      for kernel in names:
        changed = blocks.with_kernel(
          changed, kernel, _rounded_rows(blocks.kernel(layer, kernel), t_I, self.cfg)
        )
      total = 0.0
      for found, want, f in zip(branch(changed), wanted, factors, strict=True):
        total += _square_error(found, want, f)
      return total

    return self._best(self._mean_abs(normed, self._factors(normed)), loss)

  def own(self, layer: types.Params, name: str, e: int | None = None) -> awq.Smoothing:
    """The best factor in front of down or o, by its own output; of expert e over its tokens."""
    if e is None:
      inputs, own = (
        self._each(lambda *args: blocks.projection_input(self.model_cfg, name, layer, *args)),
        None,
      )
      w_IO = blocks.kernel(layer, name)
    else:
      both = self._each(lambda *args: blocks.expert_down(self.model_cfg, layer, *args, e))
      inputs, own = [x for x, _ in both], [mask for _, mask in both]
      w_IO = blocks.kernel(layer, name)[e]
    factors, total = self._factors(inputs, own), calib.hessian_init(w_IO.shape[0])
    for x, f in zip(inputs, factors, strict=True):
      total = _update(calib.hessian_update, total, x, f)

    def loss(t_I: Array) -> Float[Array, ""]:
      return gptq.relative_error(_rounded(w_IO, t_I, cfg=self.cfg), w_IO, total)

    return self._best(self._mean_abs(inputs, factors), loss)


def _rounded_rows(w: Float[Array, "*E I O"], t_I: Array, cfg: gptq.GPTQConfig) -> Array:
  if w.ndim == 2:
    return _rounded(w, t_I, cfg=cfg)
  return jnp.stack([_rounded(one, t_I, cfg=cfg) for one in w])
