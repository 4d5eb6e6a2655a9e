"""Training objective of BiTA: mask tokens learn what the frozen target says further ahead.

In every row of tokens up to `num_groups` consecutive places are chosen; behind each stands a group
of M mask tokens that sees the document up to there, itself and the soft prompts (inference.md 15).
Mask i of the group behind token e is measured against token e + 1 + i:

  L = mean over all masks of -log p(token e + 1 + i),   weighted by that token's loss mask

The text should be the target's own (`distill_draft --regenerate`). The target runs once without
gradients and leaves its keys; only the masks' rows are differentiated. Parameters are
{"draft": ..., "target": ...}; the first alone is trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from minicpm_jax import config
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.core import rng, trees, types
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer
from minicpm_jax.optim import build
from minicpm_jax.train import step as step_lib

Batch = dict[str, Any]  # of [B, T] arrays, as data.iterator makes them


# --- Where the groups stand ----------------------------------------------------------------------


@dataclasses.dataclass
class Groups:
  """All mask tokens of a batch; R = groups * masks, group by group. Columns are of [B, T] rows."""

  end_BR: Any  # int32, column of the last token that the mask's group sees
  column_BR: Any  # int32, end + number of the mask: the column whose target it says, may be >= T
  number_R: Any  # int32, 1..M


def place(batch: Batch, cfg: config.DistillConfig) -> Groups:
  """Consecutive places from a random one on (`row_seed`: the same after a resume), or without
  seeds evenly spread ones (evaluation)."""
  B, T = batch["tokens"].shape
  M, G = cfg.draft.num_masks, min(cfg.num_groups, T - 1)
  if "row_seed" in batch:

    def first(row_seed: Any) -> Array:
      return jax.random.randint(rng.key(cfg.seed, "bita_groups", row_seed), (), 0, T - G)

    first_B = jax.vmap(first)(jnp.asarray(batch["row_seed"])[:, 0])
    ends_BG = first_B[:, None] + jnp.arange(G, dtype=jnp.int32)[None, :]
  else:
    ends_G = np.arange(G, dtype=np.int32) * (T - 1) // G
    ends_BG = jnp.broadcast_to(jnp.asarray(ends_G)[None], (B, G))
  number_R = jnp.tile(jnp.arange(1, M + 1, dtype=jnp.int32), G)
  end_BR = jnp.repeat(ends_BG, M, axis=1).astype(jnp.int32)
  return Groups(end_BR, end_BR + number_R[None], number_R)


def weights(batch: Batch, groups: Groups) -> Array:
  """float32 [B, R]: the loss mask where a mask's target lies in the group's document, else 0."""
  T = batch["tokens"].shape[1]
  at_BR = jnp.minimum(groups.column_BR, T - 1)
  segment_BR = _at(batch["segment_ids"], groups.end_BR)
  is_inside_BR = (groups.column_BR < T) & (_at(batch["segment_ids"], at_BR) == segment_BR)
  return _at(batch["loss_mask"], at_BR) * (is_inside_BR & (segment_BR != 0))


def _at(x_BT: Any, columns_BR: Array) -> Array:
  return jnp.take_along_axis(jnp.asarray(x_BT), columns_BR, axis=1)


# --- Forward -------------------------------------------------------------------------------------


def mask_logits(
  target: transformer.Transformer, params: types.Params, batch: Batch, groups: Groups
) -> tuple[Array, Array]:
  """(float32 logits [B, R, V] of the masks, the target's hidden states [B, T, D])."""
  cfg, (B, T) = target.cfg, batch["tokens"].shape
  if cfg.sparse is not None and cfg.sparse.dense_len <= T:
    raise ValueError(
      f"data.seq_len: found {T}, expected less than the target's dense_len {cfg.sparse.dense_len} "
      "(mask tokens are trained on dense attention)"
    )
  model = transformer.Transformer(dataclasses.replace(cfg, sparse=None))
  frozen = {"params": jax.lax.stop_gradient(params["target"])}
  R = groups.end_BR.shape[1]
  # As a plain forward of this text turns it; the default, the cache's size, counts the masks too.
  length = jnp.max(jnp.asarray(batch["positions"])) + 1
  out = model.apply(
    frozen,
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
    cache_lib.init(model.cfg, B, T + R),
    rope_length=length,
    return_logits=False,
  )
  hidden_BTD, cache = jax.lax.stop_gradient((out.hidden, out.cache))
  segments_BT = jnp.asarray(batch["segment_ids"])
  slots_11T = jnp.arange(T, dtype=jnp.int32)[None, None, :]
  end_BR1 = groups.end_BR[:, :, None]
  sees_BRT = (slots_11T <= end_BR1) & (
    segments_BT[:, None, :] == _at(segments_BT, groups.end_BR)[:, :, None]
  )
  M = int(params["draft"]["masks"]["embedding"].shape[0])
  own_RR = np.kron(np.eye(R // M, dtype=bool), np.tril(np.ones((M, M), bool)))
  position_BR = _at(batch["positions"], groups.end_BR) + groups.number_R[None]
  step = cache_lib.Step(
    anc_BTT=jnp.broadcast_to(jnp.asarray(own_RR)[None], (B, R, R)),
    depth_BT=position_BR - T,
    sees_BTS=sees_BRT,
  )
  numbers_BR = jnp.broadcast_to(groups.number_R[None], (B, R))
  out = model.apply(
    frozen,
    jnp.zeros((B, R), jnp.int32),
    cache=cache.replace(segment_ids_BS=None, length=jnp.full((B,), T, jnp.int32)),
    step=step,
    rope_length=length,
    ahead=bita_lib.ahead(params["draft"], numbers_BR),
  )
  return out.logits, hidden_BTD


# --- Loss, acceptance, optimiser: as in align/draft.py -------------------------------------------


def make_totals_fn(cfg: config.DistillConfig) -> step_lib.TotalsFn:
  """Weight of all masks of the batch."""

  def totals_fn(batch: Batch) -> dict[str, jax.Array]:
    return {"loss": jnp.maximum(jnp.sum(weights(batch, place(batch, cfg))), 1.0)}

  return totals_fn


def make_loss_fn(
  cfg: config.DistillConfig,
  target: transformer.Transformer,
  ids_R: Int[np.ndarray, " R"] | None = None,
) -> step_lib.LossFn:
  """`loss_fn(params, batch, ctx)`; the batch has `row_seed` (`draft.with_row_seeds`).

  Metrics: loss, and acc_i, the share of the i-th masks whose best token is the text's.
  """
  bita_lib.check_fits(cfg.draft, target.cfg)
  if ids_R is not None:
    raise ValueError("ids_R: found a list, expected None: mask tokens use the target's head")

  def loss_fn(params: types.Params, batch: Batch, ctx: step_lib.LossContext):
    groups = place(batch, cfg)
    logits_BRV, _ = mask_logits(target, params, batch, groups)
    weights_BR = weights(batch, groups)
    wanted_BR = _at(batch["targets"], jnp.minimum(groups.column_BR, batch["tokens"].shape[1] - 1))
    ce_BR = optax.softmax_cross_entropy_with_integer_labels(logits_BRV, wanted_BR)
    is_hit_BR = jnp.argmax(logits_BRV, axis=-1) == wanted_BR
    total = jnp.sum(weights_BR * ce_BR)
    metrics = {"loss": metrics_lib.Metric(total, jnp.sum(weights_BR))}
    for i in range(1, cfg.draft.num_masks + 1):
      mine_BR = weights_BR * (groups.number_R == i)[None]
      metrics[f"acc_{i}"] = metrics_lib.Metric(jnp.sum(mine_BR * is_hit_BR), jnp.sum(mine_BR))
    return total / ctx.totals["loss"], metrics

  return loss_fn


def make_acceptance_fn(
  cfg: config.DistillConfig,
  target: transformer.Transformer,
  ids_R: Int[np.ndarray, " R"] | None = None,
) -> Callable[[types.Params, Batch], step_lib.Metrics]:
  """(params, batch) -> acc_1 .. acc_depth on held-out text, as `draft.make_acceptance_fn` says.

  acc_k: of the groups whose first k - 1 masks said the target's choices (and the text's tokens),
  the share whose k-th says the target's choice too.
  """
  del ids_R

  def acceptance(params: types.Params, batch: Batch) -> step_lib.Metrics:
    groups = place(batch, cfg)
    logits_BRV, hidden_BTD = mask_logits(target, params, batch, groups)
    B, T = batch["tokens"].shape
    at_BR = jnp.minimum(groups.column_BR, T - 1)
    D = hidden_BTD.shape[-1]
    rows_BRD = jnp.take_along_axis(
      hidden_BTD, jnp.broadcast_to(at_BR[:, :, None], (*at_BR.shape, D)), axis=1
    )
    variables = {"params": params["target"]}
    best_BR = jnp.argmax(target.apply(variables, rows_BRD, method="unembed"), axis=-1)
    said_BR = jnp.argmax(logits_BRV, axis=-1)
    by_group = lambda x: jnp.reshape(x, (B, -1, cfg.draft.num_masks))  # noqa: E731
    is_hit_BGM = by_group(said_BR == best_BR)
    is_text_BGM = by_group(said_BR == _at(batch["targets"], at_BR))
    weights_BGM = by_group(weights(batch, groups))
    found, alive_BG = {}, jnp.ones(is_hit_BGM.shape[:2], jnp.float32)
    for k in range(cfg.eval_depth):
      weight_BG = alive_BG * weights_BGM[:, :, k]
      sums = (jnp.sum(weight_BG * is_hit_BGM[:, :, k]), jnp.sum(weight_BG))
      found[f"acc_{k + 1}"] = metrics_lib.Metric(*sums)
      alive_BG = weight_BG * is_hit_BGM[:, :, k] * is_text_BGM[:, :, k]
    return found

  return acceptance


def make_optimizer(
  cfg: config.DistillConfig, params: types.Params
) -> optax.GradientTransformationExtraArgs:
  """AdamW of `cfg.optim` on params["draft"]; the target is frozen."""
  if cfg.optim.mup:
    raise ValueError("optim.mup: found True, expected False: masks and prompts have no width rule")
  d = cfg.draft
  shape = config.ModelConfig(  # only muP would look at it
    vocab_size=d.vocab_size,
    model_dim=d.model_dim,
    mlp_dim=d.model_dim,
    num_layers=d.num_layers,
    num_heads=d.num_kv_heads,
    num_kv_heads=d.num_kv_heads,
    head_dim=d.head_dim,
    max_position=1,
  )
  tx = build.make_optimizer(cfg.optim, shape, params["draft"])
  if cfg.grad_clip_value:
    tx = optax.chain(optax.clip(cfg.grad_clip_value), tx)
  labels = trees.map_with_path(
    lambda path, _: "draft" if path.startswith("draft/") else "frozen", params
  )
  return optax.partition({"draft": tx, "frozen": optax.set_to_zero()}, labels)
