"""EAGLE drafters: a dynamic tree out of one draft layer (inference.md sections 3, 7, 9, 10).

The committed part of the context is in the draft's cache with true target features; a round first
expands the tree level by level from the last committed row's output, with the nodes' keys in
scratch arrays of their own, and then commits the accepted path. Row t holds (embedding of token
t + 1, feature of token t), so the cache is as long as the target's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.config import validate
from minicpm_jax.core import huge_pages, trees, types
from minicpm_jax.infer import frspec
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer
from minicpm_jax.nn import layers
from minicpm_jax.quant import qtensor
from pallas_kernels.vocab_topk import api as vocab_topk

MAX_ROWS = 256  # of a prompt that attend together: bounds the scores of a chunk


@flax.struct.dataclass
class EagleState:
  """cache: committed rows. feature_BD: output of the last one, level 1 of the next tree."""

  cache: Any
  feature_BD: Any


@dataclasses.dataclass(frozen=True)
class EagleDrafter:
  """EAGLE-1/2, MiniCPM4's EAGLE and EAGLE-3 on the protocol of `base`; `make` builds one.

  num_levels, top_k, num_nodes: CPM.cu's spec-num-iter, spec-topk-per-iter and spec-tree-size.
  Draft parameters: {"model", "head_DR", "ids_R"}; a head of None is the target's, ids of None are
  the identity.
  """

  cfg: config.DraftConfig
  num_levels: int = 2
  top_k: int = 10
  num_nodes: int = 12
  by_row: bool = True

  def __post_init__(self):
    validate.require_hints(self, "", least=1)

  @property
  def tap_layers(self) -> tuple[int, ...]:
    return self.cfg.feature_layers

  @property
  def reuses_prefix(self) -> bool:
    return self.cfg.window_size == 0  # a ring has lost what an earlier position needs

  def check(self, model: Any, params: base.Params) -> None:
    draft_lib.check_fits(self.cfg, model.cfg)
    most = tree_lib.num_candidates(self.top_k, self.num_levels) + 1
    if not 2 <= self.num_nodes <= min(most, base.MAX_NODES):
      raise ValueError(
        f"num_nodes: found {self.num_nodes}, expected 2..{min(most, base.MAX_NODES)} "
        f"({self.num_levels} levels of top_k {self.top_k})"
      )
    if not isinstance(params.draft, Mapping) or "model" not in params.draft:
      raise ValueError("draft_params: expected those that `make` gave with the drafter")
    wanted, found = (
      trees.flatten_paths(x, qtensor.is_qtensor)
      for x in (draft_lib.abstract_params(self.cfg)[0], params.draft["model"])
    )
    for name in sorted(set(wanted) | set(found)):
      a, b = (list(x[name].shape) if name in x else "none" for x in (found, wanted))
      if a != b:
        raise ValueError(f"draft params: {name}: found {a}, expected {b}")
    size = self._head_size(params)
    if self.top_k > size:
      raise ValueError(f"top_k: found {self.top_k}, expected at most the head's {size} rows")
    if params.draft["ids_R"] is not None:
      ids = np.asarray(params.draft["ids_R"])
      frspec.check_index(ids, model.cfg.vocab_size, "draft ids")
      if ids.size != size:
        raise ValueError(f"draft ids: found {ids.size}, expected {size}, the rows of the head")
    elif size != model.cfg.vocab_size:
      raise ValueError(f"draft ids: found none, expected one for each of the head's {size} rows")

  def _head_size(self, params: base.Params) -> int:
    if self.cfg.kind == "eagle3" or params.draft["head_DR"] is None:
      return self.cfg.head_size
    return params.draft["head_DR"].shape[1]

  def init_state(
    self, model: Any, params: base.Params, batch_size: int, capacity: int
  ) -> EagleState:
    cache = draft_lib.init_cache(self.cfg, batch_size, capacity)
    shape = (batch_size, self.cfg.layer.model_dim)
    return EagleState(cache, jnp.zeros(shape, cache.k[0].dtype))

  # --- Committed rows ---------------------------------------------------------------------------

  def prefill(self, params: base.Params, state: EagleState, new: base.Committed) -> EagleState:
    return self.commit(params, state, new)

  def commit(self, params: base.Params, state: EagleState, new: base.Committed) -> EagleState:
    T = new.tokens_BT.shape[1]
    for first in range(0, T, MAX_ROWS):
      state = self._commit_rows(params, state, new, first, min(first + MAX_ROWS, T))
    return state

  def _commit_rows(self, params, state: EagleState, new: base.Committed, first, end) -> EagleState:
    at = slice(first, end)
    steps_1T = jnp.arange(first, end, dtype=jnp.int32)[None, :]
    hidden_BTD, cache = draft_lib.extend(
      self.cfg,
      params.draft["model"],
      state.cache,
      self._embed(params, new.next_BT[:, at]),
      new.features_BTD[:, at],
      new.start_B[:, None] + steps_1T,
      steps_1T < new.num_B[:, None],
      self._rope_length(state),
      row=new.row,
      span=params.span,
    )
    last_B11 = jnp.clip(new.num_B - first, 1, end - first)[:, None, None] - 1
    feature_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
    is_new_B1 = (new.num_B > first)[:, None]
    old_BD = base.take_rows(state.feature_BD, new.row, feature_BD.shape[0])
    feature_BD = jnp.where(is_new_B1, feature_BD.astype(old_BD.dtype), old_BD)
    return EagleState(cache, base.put_rows(state.feature_BD, feature_BD, new.row))

  def copy_row(self, state: EagleState, source: Any, target: Any) -> EagleState:
    return base.copy_rows(state, source, target)

  # --- The tree ---------------------------------------------------------------------------------

  def draft(
    self, params: base.Params, state: EagleState, root_B: Any, length_B: Any
  ) -> tuple[base.Tree, EagleState]:
    found = self.candidates(params, state, root_B, length_B)
    return tree_lib.build(root_B, *found, self.num_nodes), state

  def candidates(
    self, params: base.Params, state: EagleState, root_B: Any, length_B: Any
  ) -> tuple[Any, Any, Any]:
    """What `tree.build` picks the tree from, the same for any number of nodes."""
    k, B = self.top_k, root_B.shape[0]
    feature_B1D = base.take_rows(state.feature_BD, params.row, B)[:, None]
    held = draft_lib.rows_of(state.cache, params.row, B, params.span)
    bias_BV = None if params.root_mask_BW is None else params.root_bias(self.cfg.layer.vocab_size)
    zero_B1 = jnp.zeros((B, 1), jnp.float32)
    scores_B1K, tokens_B1K = self._children(params, feature_B1D, zero_B1, bias_BV)
    beam = Beam(
      tokens_BK=tokens_B1K[:, 0],
      scores_BK=scores_B1K[:, 0],
      feature_BKD=jnp.broadcast_to(feature_B1D, (B, k, feature_B1D.shape[-1])),
      sees_BKS=jnp.zeros((B, k, 0), bool),
    )
    scores, tokens = [beam.scores_BK], [beam.tokens_BK]
    flat = [jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None], (B, k))]
    scratch = None
    for level in range(1, self.num_levels):
      position_BK = jnp.broadcast_to((length_B + level - 1)[:, None], (B, k))
      more = (length_B, scratch, self._rope_length(state))
      hidden_BKD, scratch = self._expand(params, held, beam, position_BK, *more)
      scores_BKK, tokens_BKK = self._children(params, hidden_BKD, beam.scores_BK)
      scores.append(jnp.reshape(scores_BKK, (B, k * k)))
      tokens.append(jnp.reshape(tokens_BKK, (B, k * k)))
      best_BK, at_BK = jax.lax.optimization_barrier(vocab_topk.top_k(scores[-1], k))
      flat.append(at_BK.astype(jnp.int32) + k + (level - 1) * k * k)
      beam = _next_beam(beam, hidden_BKD, best_BK, at_BK, tokens[-1])
    return jnp.concatenate(scores, axis=1), jnp.concatenate(tokens, axis=1), jnp.stack(flat, axis=1)

  def _expand(
    self, params, held: draft_lib.DraftCache, beam: "Beam", position_BK, length_B, scratch, longest
  ):
    """Draft outputs of the beam's nodes, and the scratch keys with theirs behind."""
    cfg = self.cfg
    model = draft_lib.DraftModel(cfg)
    old_BR = jnp.where(held.positions_BR < length_B[:, None], held.positions_BR, -1)
    past = [(draft_lib.cached(held), draft_lib.seen(position_BK, old_BR, cfg.window_size))]
    if scratch is not None:
      past.append((scratch, beam.sees_BKS))
    hidden_BKD, new = model.apply(
      {"params": params.draft["model"]},
      self._embed(params, beam.tokens_BK),
      beam.feature_BKD,
      draft_lib.position_tables(cfg, position_BK, longest),
      tuple(past),
    )
    if scratch is None:
      return hidden_BKD, new
    return hidden_BKD, jax.tree.map(lambda a, b: jnp.concatenate((a, b), axis=1), scratch, new)

  def _children(
    self, params: base.Params, hidden_BTD: Any, scores_BT: Any, bias_BV: Any = None
  ) -> tuple[Any, Any]:
    """Cumulative float32 scores and full token ids [B, T, k] of the best children.

    Children that the bias forbids, and those of logits that are not finite, have score -inf: they
    become cut nodes.
    """
    cfg, model = self.cfg, draft_lib.DraftModel(self.cfg)
    head_DR, ids_R = params.draft["head_DR"], params.draft["ids_R"]
    table_VD, V = None, cfg.layer.vocab_size
    if head_DR is None and cfg.kind != "eagle3":
      head_DR = transformer.low_bit_head(cfg.layer, params.target)
      if head_DR is None and cfg.layer.tie_embeddings:
        table_VD = params.target["embed"]["embedding"][:V]
      elif head_DR is None:
        head_DR = transformer.head_weight(cfg.layer, params.target)[:, :V]
    variables = {"params": params.draft["model"]}
    logits_BTR = model.apply(variables, hidden_BTD, head_DR, table_VD=table_VD, method="logits")
    if ids_R is None:  # codes are taken whole: a part of them would be copied in every step
      logits_BTR = logits_BTR[..., :V]
    if bias_BV is not None:
      logits_BTR += (bias_BV if ids_R is None else bias_BV[:, ids_R])[:, None, :]
    # The barrier keeps XLA's top-k: merged into what follows it becomes a sort of whole rows.
    B, T, R = logits_BTR.shape
    best, at = jax.lax.optimization_barrier(
      vocab_topk.top_k(jnp.reshape(logits_BTR, (B * T, R)), self.top_k)
    )
    best_BTK, at_BTK = (jnp.reshape(x, (B, T, self.top_k)) for x in (best, at))
    total_BT1 = _logsumexp(logits_BTR, best_BTK[:, :, :1])
    best_BTK -= total_BT1
    best_BTK = jnp.where(jnp.isfinite(best_BTK), best_BTK, -jnp.inf)  # a broken draft has NaN
    at_BTK = at_BTK.astype(jnp.int32)
    tokens_BTK = at_BTK if ids_R is None else jnp.asarray(ids_R, jnp.int32)[at_BTK]
    return scores_BT[:, :, None] + best_BTK, tokens_BTK

  def _embed(self, params: base.Params, tokens_BT: Any) -> Any:
    table_VD = params.target["embed"]["embedding"]
    dtype = draft_dtype(self.cfg.layer.dtype, table_VD)
    return layers.embedded(table_VD, tokens_BT, dtype) * self.cfg.layer.scale_emb

  def _rope_length(self, state: EagleState) -> int:
    """LongRoPE with two lists picks one for the whole cache."""
    return max(state.cache.positions_BR.shape[1], self.cfg.window_size)


@flax.struct.dataclass
class Beam:
  """The k nodes that a level grows from."""

  tokens_BK: Any
  scores_BK: Any
  feature_BKD: Any  # draft output at the node's parent
  sees_BKS: Any  # bool: which scratch rows are the node's ancestors


def draft_dtype(name: str, table_VD: Any) -> Any:
  """Of a draft's weights: that of the target's table, or where it is codes the compute dtype."""
  return types.dtype_of(name) if qtensor.is_qtensor(table_VD) else table_VD.dtype


def _logsumexp(x_BTR: Any, max_BT1: Any) -> Any:
  """`jax.nn.logsumexp` of the last axis, [B, T, 1], where its maximum is known."""
  shift_BT1 = jnp.where(jnp.isfinite(max_BT1), max_BT1, 0.0)
  return jnp.log(jnp.sum(jnp.exp(x_BTR - shift_BT1), axis=-1, keepdims=True)) + shift_BT1


def _next_beam(beam: Beam, hidden_BKD, best_BK, at_BK, tokens_BC) -> Beam:
  k = best_BK.shape[1]
  parent_BK1 = (at_BK // k)[:, :, None]
  own = jnp.broadcast_to(jnp.eye(k, dtype=bool)[None], (*best_BK.shape, k))
  sees = jnp.concatenate((beam.sees_BKS, own), axis=2)
  return Beam(
    tokens_BK=jnp.take_along_axis(tokens_BC, at_BK, axis=1),
    scores_BK=best_BK,
    feature_BKD=jnp.take_along_axis(hidden_BKD, parent_BK1, axis=1),
    # The barrier keeps XLA from choosing rows of rows again for every score of the next level.
    sees_BKS=jax.lax.optimization_barrier(jnp.take_along_axis(sees, parent_BK1, axis=1)),
  )


def make(
  draft: draft_lib.Draft,
  model: transformer.Transformer,
  params: Any,
  *,
  fr_ids: Any = None,
  num_levels: int = 2,
  top_k: int = 10,
  num_nodes: int = 12,
) -> tuple[EagleDrafter, dict[str, Any]]:
  """(drafter, draft_params) for `Engine(model, params, drafter=..., draft_params=...)`.

  `model`, `params`: the target as the engine runs it; the draft takes its dtype. fr_ids: token ids
  that the draft may propose (FR-Spec); their rows of the target's head are gathered here.
  """
  draft_lib.check_fits(draft.cfg, model.cfg)
  name = model.cfg.dtype
  layer = dataclasses.replace(
    draft.cfg.layer,
    dtype=name,
    param_dtype=model.cfg.param_dtype,
    tie_embeddings=model.cfg.tie_embeddings,
    scan_layers=False,
  )
  cfg = dataclasses.replace(draft.cfg, layer=layer)
  weights = trees.cast(draft.params, draft_dtype(name, params["embed"]["embedding"]))
  head_DR, ids_R = None, draft.ids
  if fr_ids is not None:
    if cfg.kind == "eagle3":
      raise ValueError("fr_ids: found a list, expected none for eagle3 (its head has its own ids)")
    ids_R = np.asarray(fr_ids, np.int32)
    frspec.check_index(ids_R, model.cfg.vocab_size)  # codes have the padding's columns too
    head_DV = transformer.low_bit_head(model.cfg, params)
    if head_DV is None:
      head_DV = transformer.head_weight(model.cfg, params)[:, : model.cfg.vocab_size]
    head_DR = frspec.fr_head(head_DV, ids_R)
  drafter = EagleDrafter(cfg, num_levels=num_levels, top_k=top_k, num_nodes=num_nodes)
  ids_R = None if ids_R is None else jnp.asarray(ids_R, jnp.int32)
  weights, head_DR = huge_pages.place((weights, head_DR))
  return drafter, {"model": weights, "head_DR": head_DR, "ids_R": ids_R}
