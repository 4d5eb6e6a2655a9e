"""Proposals that are right as often as a pattern says, on a target that says t + 1 after t.

Speed under speculation depends on how much is accepted, not on why: with such a target (the weights
of `_bench_gpu`) a drafter can be right at will, and the engine's own verification decides.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minicpm_jax.infer.drafters import base, eagle


@flax.struct.dataclass
class ForcedState:
  """pattern_K: tokens that round i emits, K in turn; `inner`: the drafter's own state."""

  inner: Any
  round_B: Any  # int32
  pattern_K: Any  # int32


@dataclasses.dataclass(frozen=True)
class Forced:
  """`inner` with all its work, its tree's deepest path replaced; None: a flat tree, all wrong."""

  inner: eagle.EagleDrafter | None = None
  num_flat: int = 12  # nodes without `inner`

  tap_layers = ()
  reuses_prefix = False

  @property
  def num_nodes(self) -> int:
    return self.num_flat if self.inner is None else self.inner.num_nodes

  @property
  def num_levels(self) -> int:
    return 1 if self.inner is None else self.inner.num_levels

  def check(self, model: Any, params: base.Params) -> None:
    if self.inner is not None:
      self.inner.check(model, params)

  def init_state(self, model: Any, params: base.Params, batch_size: int, capacity: int) -> Any:
    inner = ()
    if self.inner is not None:
      inner = self.inner.init_state(model, params, batch_size, capacity)
    return ForcedState(inner, jnp.zeros((batch_size,), jnp.int32), jnp.ones((2,), jnp.int32))

  def prefill(self, params: base.Params, state: ForcedState, new: base.Committed) -> ForcedState:
    if self.inner is None:
      return state
    return state.replace(inner=self.inner.prefill(params, state.inner, new))

  def draft(
    self, params: base.Params, state: ForcedState, root_B: Any, length_B: Any
  ) -> tuple[base.Tree, ForcedState]:
    if self.inner is None:
      return _flat(root_B, self.num_flat), state
    tree, inner = self.inner.draft(params, state.inner, root_B, length_B)
    want_B = state.pattern_K[state.round_B % state.pattern_K.shape[0]]
    return forced(tree, want_B, self.inner.cfg.layer.vocab_size), state.replace(inner=inner)

  def commit(self, params: base.Params, state: ForcedState, new: base.Committed) -> ForcedState:
    state = state.replace(round_B=state.round_B + 1)
    if self.inner is None:
      return state
    return state.replace(inner=self.inner.commit(params, state.inner, new))

  def copy_row(self, state: ForcedState, source: Any, target: Any) -> ForcedState:
    raise NotImplementedError("Forced: found a prompt cache, expected none (reuses_prefix)")


def forced(tree: base.Tree, want_B: Any, vocab_size: int) -> base.Tree:
  """The tree of which verification accepts `want_B` tokens (at most its deepest node allows).

  The path to the deepest node holds what the target will say; whatever else would be accepted is
  cut.
  """
  true_BP = (tree.tok_BP[:, :1] + tree.depth_BP) % vocab_size
  end_B11 = jnp.argmax(tree.depth_BP, axis=1)[:, None, None]
  is_path_BP = jnp.take_along_axis(tree.anc_BPP, end_B11, axis=1)[:, 0]
  is_right_BP = is_path_BP & (tree.depth_BP < want_B[:, None])
  wrong_BP = jnp.where(tree.tok_BP == true_BP, base.CUT, tree.tok_BP)
  return tree.replace(tok_BP=jnp.where(is_right_BP, true_BP, wrong_BP))


def _flat(root_B: Any, num_nodes: int) -> base.Tree:
  """The root and its children, none of which is right."""
  B, P = root_B.shape[0], num_nodes
  rows = lambda x: jnp.broadcast_to(x[None], (B, *x.shape))  # noqa: E731
  node_P = jnp.arange(P, dtype=jnp.int32)
  anc_PP = jnp.eye(P, dtype=bool).at[:, 0].set(True)
  tok_BP = jnp.where(node_P[None, :] == 0, root_B[:, None], base.CUT)
  return base.Tree(
    tok_BP=tok_BP,
    parent_BP=rows(jnp.zeros((P,), jnp.int32)),
    depth_BP=rows(jnp.minimum(node_P, 1)),
    anc_BPP=rows(anc_PP),
  )


def with_pattern(state: Any, pattern: tuple[int, ...]) -> Any:
  """A drafter's state with the pattern; other drafters have none."""
  if not isinstance(state, ForcedState):
    return state
  return state.replace(pattern_K=jnp.asarray(pattern, jnp.int32))


def with_context(state: Any, length: int, noise: Any) -> Any:
  """A drafter's state as if it had read `length` tokens; `noise(array)`: random ones like it."""
  if isinstance(state, ForcedState):
    return state.replace(inner=with_context(state.inner, length, noise))
  if not isinstance(state, eagle.EagleState):
    return state
  cache, R = state.cache, state.cache.positions_BR.shape[1]
  slot_R = jnp.arange(R, dtype=jnp.int32)
  last_R = slot_R + (length - 1 - slot_R) // R * R  # the newest position of every slot
  positions_BR = jnp.where(slot_R < length, last_R, -1)[None]
  positions_BR = jnp.broadcast_to(positions_BR, cache.positions_BR.shape)
  cache = cache.replace(k=jax.tree.map(noise, cache.k), v=jax.tree.map(noise, cache.v))
  return state.replace(
    cache=cache.replace(positions_BR=positions_BR), feature_BD=noise(state.feature_BD)
  )
