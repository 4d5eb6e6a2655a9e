"""A smaller model of the same vocabulary drafts a chain greedily (inference.md 14.1).

The draft's cache holds token t in slot t, as the target's does. Its first forward of a round feeds
two tokens, the last committed one again and the root: after a fully accepted chain the draft has
not seen its own last token. A row that waits for its prompt behind a copied beginning does not know
the last token of that, and keeps what it holds.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp

from minicpm_jax.config import validate
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer


@flax.struct.dataclass
class State:
  cache: Any  # KVCache of the draft, one length a row
  last_B: Any  # int32, the last committed token
  end_B: Any  # int32, the position behind it


@dataclasses.dataclass(frozen=True)
class ChainDrafter:
  """`model` is the draft; its params are the engine's `draft_params`."""

  model: transformer.Transformer
  num_levels: int = 4
  tap_layers: tuple[int, ...] = ()
  reuses_prefix: bool = True
  by_row: bool = True

  def __post_init__(self):
    validate.require_hints(self, "", least=1)
    base.check_tree_size(self.num_nodes, self.num_levels)

  @property
  def num_nodes(self) -> int:
    return self.num_levels + 1

  def check(self, model: transformer.Transformer, params: base.Params) -> None:
    found, expected = self.model.cfg.vocab_size, model.cfg.vocab_size
    if found != expected:
      raise ValueError(
        f"draft model: found a vocabulary of {found}, expected the target's {expected}"
      )
    base.check_params(self.model.cfg, params.draft, "draft_params")

  def init_state(self, model: Any, params: base.Params, batch_size: int, capacity: int) -> State:
    cache = cache_lib.init(self.model.cfg, batch_size, capacity, per_row=True)
    return State(cache, *(jnp.zeros((batch_size,), jnp.int32) for _ in range(2)))

  def prefill(self, params: base.Params, state: State, new: base.Committed) -> State:
    step = cache_lib.Step(num_new_B=new.num_B, row=new.row, span=params.span)
    cache = cache_lib.with_lengths(state.cache, step, new.start_B)
    state = state.replace(cache=self._forward(params, new.tokens_BT, cache, step).cache)
    return self.commit(params, state, new)

  def commit(self, params: base.Params, state: State, new: base.Committed) -> State:
    at_B1 = jnp.maximum(new.num_B[:, None] - 1, 0)
    last_B = jnp.take_along_axis(new.tokens_BT, at_B1, axis=1)[:, 0]
    whole, is_new_B = (state.last_B, state.end_B), new.num_B > 0
    old_last_B, old_end_B = base.take_rows(whole, new.row, last_B.shape[0])
    last_B = jnp.where(is_new_B, last_B, old_last_B)
    end_B = jnp.where(is_new_B, new.start_B + new.num_B, old_end_B)
    last_B, end_B = base.put_rows(whole, (last_B, end_B), new.row)
    return state.replace(last_B=last_B, end_B=end_B)

  def draft(
    self, params: base.Params, state: State, root_B: Any, length_B: Any
  ) -> tuple[base.Tree, State]:
    B = root_B.shape[0]
    step = cache_lib.Step(row=params.row, num_rows=B, span=params.span)
    last_B, end_B = base.take_rows((state.last_B, state.end_B), params.row, B)
    first_B = jnp.maximum(jnp.where(end_B == length_B, length_B - 1, length_B), 0)
    cache = cache_lib.with_lengths(state.cache, step, first_B)
    tokens, feed_BT = [root_B], jnp.stack((last_B, root_B), axis=1)
    for _ in range(self.num_levels):
      out = self._forward(params, feed_BT, cache, step)
      logits_B1V = self.model.apply({"params": params.draft}, out.hidden[:, -1:], method="unembed")
      logits_BV = logits_B1V[:, 0]
      if params.root_mask_BW is not None and len(tokens) == 1:
        logits_BV += params.root_bias(logits_BV.shape[1])
      tokens.append(jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))
      cache, feed_BT = out.cache, tokens[-1][:, None]
    return base.chain(jnp.stack(tokens, axis=1)), state.replace(cache=cache)

  def copy_row(self, state: State, source: Any, target: Any) -> State:
    rows = base.copy_rows((state.last_B, state.end_B), source, target)
    return State(cache_lib.copy_row(state.cache, source, target), *rows)

  def _forward(self, params: base.Params, tokens_BT, cache, step) -> transformer.Output:
    return self.model.apply(
      {"params": params.draft}, tokens_BT, cache=cache, step=step, return_logits=False
    )
