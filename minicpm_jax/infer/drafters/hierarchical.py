"""Hierarchical speculation: a drafter's trees, made into a chain by a small model, are verified by
the target (SpecMQuant; inference.md 14.2).

For targets whose verification is dear (W4A16): the small model absorbs the trees, the target sees
one chain of min_length or more tokens. The small model chooses greedily. Between rounds its cache
and the inner drafter's are as long as the target's: `draft` runs ahead in them and `commit` writes
the accepted part again, so nothing is ever copied or rolled back.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minicpm_jax.config import validate
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer


@flax.struct.dataclass
class State:
  cache: Any  # KVCache of the small model, one length a row
  inner: Any  # the inner drafter's state
  num_trees_B: Any  # int32, trees that the small model verified since the row's prompt
  num_drafted_B: Any  # int32, tokens that it accepted from them


@dataclasses.dataclass(frozen=True)
class HierarchicalDrafter:
  """`model` is the small model, `inner` a drafter for it.

  The engine's `draft_params` are (small model's params, inner drafter's params). min_length: the
  chain grows until it has so many tokens (SpecMQuant's setting is 6).
  """

  model: transformer.Transformer
  inner: base.Drafter
  min_length: int = 6
  tap_layers: tuple[int, ...] = ()

  def __post_init__(self):
    validate.require_hints(self, "", least=1)
    base.check_tree_size(self.num_nodes, self.num_levels)

  @property
  def num_levels(self) -> int:
    """The last tree starts at min_length - 1 tokens and adds at most inner.num_levels + 1."""
    return self.min_length + self.inner.num_levels

  @property
  def num_nodes(self) -> int:
    return self.num_levels + 1

  @property
  def reuses_prefix(self) -> bool:
    return self.inner.reuses_prefix

  @property
  def by_row(self) -> bool:
    return getattr(self.inner, "by_row", False)

  def check(self, model: transformer.Transformer, params: base.Params) -> None:
    found, expected = self.model.cfg.vocab_size, model.cfg.vocab_size
    if found != expected:
      raise ValueError(
        f"small model: found a vocabulary of {found}, expected the target's {expected}"
      )
    if base.num_riders(self.inner):
      raise ValueError("inner drafter: found one with mask tokens (BiTA), expected one without")
    if not isinstance(params.draft, tuple) or len(params.draft) != 2:
      raise ValueError("draft_params: expected (the small model's, the inner drafter's)")
    base.check_params(self.model.cfg, params.draft[0], "draft_params[0]")
    self.inner.check(self.model, self._inner(params))

  def init_state(self, model: Any, params: base.Params, batch_size: int, capacity: int) -> State:
    capacity = self._with_room(capacity)
    return State(
      cache=cache_lib.init(self.model.cfg, batch_size, capacity, per_row=True),
      inner=self.inner.init_state(self.model, self._inner(params), batch_size, capacity),
      num_trees_B=jnp.zeros((batch_size,), jnp.int32),
      num_drafted_B=jnp.zeros((batch_size,), jnp.int32),
    )

  def prefill(self, params: base.Params, state: State, new: base.Committed) -> State:
    out = self._committed(params, state, new)
    inner = self.inner.prefill(self._inner(params), state.inner, self._seen(out, new))
    zero = jnp.zeros((), jnp.int32)
    counts = (x.at[new.row].set(zero) for x in (state.num_trees_B, state.num_drafted_B))
    return State(out.cache, inner, *counts)

  def commit(self, params: base.Params, state: State, new: base.Committed) -> State:
    out = self._committed(params, state, new)
    inner = self.inner.commit(self._inner(params), state.inner, self._seen(out, new))
    return state.replace(cache=out.cache, inner=inner)

  def _committed(
    self, params: base.Params, state: State, new: base.Committed
  ) -> transformer.Output:
    """The small model's forward of tokens that have become part of the context."""
    step = cache_lib.Step(
      num_new_B=new.num_B, row=new.row, num_rows=new.num_B.shape[0], span=params.span
    )
    cache = cache_lib.with_lengths(state.cache, step, new.start_B)
    return self._forward(params, new.tokens_BT, cache, step)

  def draft(
    self, params: base.Params, state: State, root_B: Any, length_B: Any
  ) -> tuple[base.Tree, State]:
    B, A = root_B.shape[0], self.inner.num_levels + 1
    rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    steps_1A = jnp.arange(A, dtype=jnp.int32)[None, :]

    def is_open(carry):
      _, _, _, num_B = carry
      return jnp.any(num_B < self.min_length)

    def one_tree(carry):
      state, root_B, chain_BL, num_B = carry
      state, acc_B, new_BA = self._inner_round(params, state, root_B, num_B < self.min_length)
      at_BA = jnp.where(steps_1A < acc_B[:, None], num_B[:, None] + steps_1A, chain_BL.shape[1])
      chain_BL = chain_BL.at[rows_B1, at_BA].set(new_BA, mode="drop")
      last_B = jnp.take_along_axis(new_BA, jnp.maximum(acc_B - 1, 0)[:, None], axis=1)[:, 0]
      return state, jnp.where(acc_B > 0, last_B, root_B), chain_BL, num_B + acc_B

    rows = cache_lib.Step(row=params.row, num_rows=B)
    state = state.replace(cache=cache_lib.with_lengths(state.cache, rows, length_B))
    chain_BL = jnp.full((B, self.num_levels), base.CUT, jnp.int32)
    carry = (state, root_B, chain_BL, jnp.zeros((B,), jnp.int32))
    state, _, chain_BL, _ = jax.lax.while_loop(is_open, one_tree, carry)
    return base.chain(jnp.concatenate((root_B[:, None], chain_BL), axis=1)), state

  def _inner_round(self, params: base.Params, state: State, root_B: Any, is_open_B: Any):
    """(state, accepted tokens a row, tokens): one tree that the small model verifies greedily."""
    rows = cache_lib.Step(row=params.row, num_rows=root_B.shape[0], span=self._inner(params).span)
    length_B = cache_lib.lengths(state.cache, rows)
    tree, inner = self.inner.draft(self._inner(params), state.inner, root_B, length_B)
    step = rows.replace(anc_BTT=tree.anc_BPP, depth_BT=tree.depth_BP)
    tokens_BP = jnp.maximum(tree.tok_BP, 0)
    out = self._forward(params, tokens_BP, state.cache, step, return_logits=True)
    y_BP = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
    acc_B, path_BA, new_BA = tree_lib.match(tree, y_BP, self.inner.num_levels)
    acc_B = jnp.where(is_open_B, acc_B, 0)
    features = out.taps if self.inner.tap_layers else out.hidden
    committed = base.Committed(
      tokens_BT=jnp.take_along_axis(tokens_BP, path_BA, axis=1),
      next_BT=new_BA,
      features_BTD=jnp.take_along_axis(features, path_BA[:, :, None], axis=1),
      start_B=length_B,
      num_B=acc_B,
      row=params.row,
    )

    def counted(total_B, more_B):
      so_far_B = base.take_rows(total_B, params.row, more_B.shape[0])
      return base.put_rows(total_B, so_far_B + more_B, params.row)

    state = State(
      cache=cache_lib.commit(self.model.cfg, out.cache, path_BA, acc_B, rows),
      inner=self.inner.commit(self._inner(params), inner, committed),
      num_trees_B=counted(state.num_trees_B, is_open_B),
      num_drafted_B=counted(state.num_drafted_B, acc_B),
    )
    return state, acc_B, new_BA

  def copy_row(self, state: State, source: Any, target: Any) -> State:
    return State(
      cache=cache_lib.copy_row(state.cache, source, target),
      inner=self.inner.copy_row(state.inner, source, target),
      num_trees_B=base.copy_rows(state.num_trees_B, source, target),
      num_drafted_B=base.copy_rows(state.num_drafted_B, source, target),
    )

  def _inner(self, params: base.Params) -> base.Params:
    """For the inner drafter; trees behind a chain reach further than the target's context."""
    small, inner = params.draft
    span = None if params.span is None else self._with_room(params.span)
    return base.Params(small, inner, span, row=params.row)

  def _with_room(self, num_slots: int) -> int:
    """Slots for trees behind a chain behind `num_slots`, whole blocks of a sparse small model."""
    sparse = self.model.cfg.sparse
    unit = 1 if sparse is None else sparse.block_size
    return -(-(num_slots + self.num_levels + self.inner.num_nodes) // unit) * unit

  def _seen(self, out: transformer.Output, new: base.Committed) -> base.Committed:
    """The committed tokens with the small model's features."""
    return new.replace(features_BTD=out.taps if self.inner.tap_layers else out.hidden)

  def _forward(
    self, params: base.Params, tokens_BT, cache, step, *, return_logits: bool = False
  ) -> transformer.Output:
    return self.model.apply(
      {"params": params.draft[0]},
      tokens_BT,
      cache=cache,
      step=step,
      tap_layers=self.inner.tap_layers,
      return_logits=return_logits,
    )
