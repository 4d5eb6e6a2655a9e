"""Prompt lookup: what followed the last time the same few tokens were said (inference.md 7).

No parameters. Of all earlier places the one with the longest common end wins, the latest among
equals; the text behind it is proposed, and repeated where it runs into the present. More chains
start from places that go on with another token.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.infer.drafters import base


@flax.struct.dataclass
class State:
  ids_BS: Any  # int32, committed tokens by position; garbage behind the length


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGramDrafter:
  """`num_chains` chains of `num_levels` tokens after a match of `min_match`..`max_match` tokens."""

  num_levels: int = 7
  num_chains: int = 1
  max_match: int = 4
  min_match: int = 2
  tap_layers: tuple[int, ...] = ()
  reuses_prefix: bool = True
  may_pass: bool = True
  by_row: bool = True

  def __post_init__(self):
    validate.require_hints(self, "", least=1)
    base.check_tree_size(self.num_nodes, self.num_levels)
    if not 1 <= self.min_match <= self.max_match:
      raise ValueError(f"min_match: found {self.min_match}, expected 1..{self.max_match}")

  @property
  def num_nodes(self) -> int:
    return 1 + self.num_chains * self.num_levels

  def check(self, model: Any, params: base.Params) -> None:
    pass

  def init_state(self, model: Any, params: base.Params, batch_size: int, capacity: int) -> State:
    return State(ids_BS=jnp.zeros((batch_size, capacity), jnp.int32))

  def prefill(self, params: base.Params, state: State, new: base.Committed) -> State:
    return self.commit(params, state, new)

  def commit(self, params: base.Params, state: State, new: base.Committed) -> State:
    B, T = new.tokens_BT.shape
    rows = jnp.arange(B, dtype=jnp.int32) + (0 if new.row is None else new.row)
    at_BT = new.start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    is_new_BT = jnp.arange(T)[None, :] < new.num_B[:, None]
    at_BT = jnp.where(is_new_BT, at_BT, state.ids_BS.shape[1])
    return State(ids_BS=state.ids_BS.at[rows[:, None], at_BT].set(new.tokens_BT, mode="drop"))

  def draft(
    self, params: base.Params, state: State, root_B: Any, length_B: Any
  ) -> tuple[base.Tree, State]:
    B, C, L = root_B.shape[0], self.num_chains, self.num_levels
    ids_BS = base.take_rows(state.ids_BS, params.row, B)
    tok_BCL = jax.vmap(self._lookup)(ids_BS, root_B, length_B)
    tok_BP = jnp.concatenate((root_B[:, None], jnp.reshape(tok_BCL, (B, -1))), axis=1)
    parent_P = np.arange(-1, C * L)
    parent_P[1::L] = 0
    parent_P[0] = 0
    depth_P = np.concatenate(([0], np.tile(np.arange(1, L + 1), C)))
    anc_PP = np.eye(self.num_nodes, dtype=bool)
    for node in range(1, self.num_nodes):
      anc_PP[node] |= anc_PP[parent_P[node]]
    rows = lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (B, *x.shape))  # noqa: E731
    tree = base.Tree(
      tok_BP=tok_BP,
      parent_BP=rows(parent_P.astype(np.int32)),
      depth_BP=rows(depth_P.astype(np.int32)),
      anc_BPP=rows(anc_PP),
    )
    return tree, state

  def _lookup(self, ids_S, root, length):
    """Tokens [C, L] of one row, CUT where nothing matches."""
    S = ids_S.shape[0]
    ids_S = ids_S.at[length].set(root)  # the present ends with the root
    at_S = jnp.arange(S, dtype=jnp.int32)
    is_same_S, match_S = jnp.ones((S,), bool), jnp.zeros((S,), jnp.int32)
    for back in range(self.max_match):
      is_same_S &= (jnp.roll(ids_S, back) == ids_S[jnp.maximum(length - back, 0)]) & (at_S >= back)
      match_S += is_same_S
    score_S = jnp.where((at_S < length) & (match_S >= self.min_match), match_S * S + at_S, -1)
    next_S = jnp.roll(ids_S, -1)
    chains = []
    for _ in range(self.num_chains):
      best = jnp.argmax(score_S)
      steps_L = jnp.arange(self.num_levels, dtype=jnp.int32) % jnp.maximum(length - best, 1)
      tokens_L = ids_S[best + 1 + steps_L]
      chains.append(jnp.where(score_S[best] >= 0, tokens_L, base.CUT))
      score_S = jnp.where(next_S == next_S[best], -1, score_S)
    return jnp.stack(chains)

  def copy_row(self, state: State, source: Any, target: Any) -> State:
    return base.copy_rows(state, source, target)
