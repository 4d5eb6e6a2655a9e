"""BiTA: the target drafts for itself with mask tokens (inference.md 15).

One forward a round holds the root, the tree of candidates and M mask tokens behind every node. The
masks of the node where the accepted path ends say the next tree: `width` candidates from mask 1,
one less from mask 2 under the first of them, and so on. A round without candidates (the first after
a prompt) emits one token. Keys of mask tokens are never committed.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.config import validate
from minicpm_jax.core import types
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import bita, transformer

_MOST = 1e3  # of a mask token's embedding or a prompt's key or value


@flax.struct.dataclass
class State:
  tok_BC: Any  # int32 candidates, nodes 1, 2, ... of the next tree; CUT where there are none


@dataclasses.dataclass(frozen=True)
class BitaDrafter:
  """`model` is the target as the engine runs it; draft parameters are those of models/bita.py."""

  model: transformer.Transformer
  cfg: config.BitaConfig
  width: int = 5
  tap_layers: tuple[int, ...] = ()
  reuses_prefix: bool = True
  by_row: bool = True

  def __post_init__(self):
    validate.require_hints(self, "", least=1)
    most = base.MAX_NODES
    if not self.cfg.num_masks <= self.width or base.num_rows(self) > most:
      raise ValueError(
        f"width: found {self.width} with {self.cfg.num_masks} masks ({base.num_rows(self)} rows), "
        f"expected at least {self.cfg.num_masks} and at most {most} rows"
      )

  @property
  def num_riders(self) -> int:
    return self.cfg.num_masks

  @property
  def num_levels(self) -> int:
    return self.cfg.num_masks

  @property
  def num_nodes(self) -> int:
    return 1 + sum(self._widths())

  def _widths(self) -> list[int]:
    """Candidates of each level: one less than of the level above, all under its first."""
    return [self.width - level for level in range(self.cfg.num_masks)]

  def check(self, model: transformer.Transformer, params: base.Params) -> None:
    bita.check_fits(self.cfg, model.cfg)
    bita.check_params(self.cfg, params.draft)
    if self.model.cfg != model.cfg:
      raise ValueError(
        "model: found another config than the engine's target has, expected the same"
      )
    if self.width > model.cfg.vocab_size:
      raise ValueError(f"width: found {self.width}, expected at most {model.cfg.vocab_size} tokens")

  def init_state(self, model: Any, params: base.Params, batch_size: int, capacity: int) -> State:
    return State(jnp.full((batch_size, self.num_nodes - 1), base.CUT, jnp.int32))

  def prefill(self, params: base.Params, state: State, new: base.Committed) -> State:
    """A prompt has no mask tokens: the first round drafts nothing."""
    return State(state.tok_BC.at[new.row].set(base.CUT))

  def draft(
    self, params: base.Params, state: State, root_B: Any, length_B: Any
  ) -> tuple[base.Tree, State]:
    parent, depth, first = [0], [0], 0
    for level, width in enumerate(self._widths(), 1):
      start = len(parent)
      parent += [first] * width
      depth += [level] * width
      first = start
    parent_P, depth_P = np.asarray(parent, np.int32), np.asarray(depth, np.int32)
    anc_PP = tree_lib.ancestors(jnp.asarray(parent_P), self.num_levels)
    rows = lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (root_B.shape[0], *x.shape))  # noqa: E731
    tok_BC = base.take_rows(state.tok_BC, params.row, root_B.shape[0])
    tok_BP = jnp.concatenate((root_B[:, None], tok_BC), axis=1)
    return base.Tree(tok_BP, rows(parent_P), rows(depth_P), rows(anc_PP)), state

  def ride(self, params: base.Params, tree: base.Tree) -> base.Riders:
    """Mask i of a node sees what the node sees, the node, and masks 1..i of the same node."""
    M = self.num_riders
    B, P = tree.tok_BP.shape
    own_RR = np.kron(np.eye(P, dtype=bool), np.tril(np.ones((M, M), bool)))
    masks_BRR = jnp.broadcast_to(jnp.asarray(own_RR)[None], (B, P * M, P * M))
    nodes = jnp.concatenate((tree.anc_BPP, jnp.zeros((B, P, P * M), bool)), axis=2)
    masks = jnp.concatenate((jnp.repeat(tree.anc_BPP, M, axis=1), masks_BRR), axis=2)
    number_R = jnp.tile(jnp.arange(1, M + 1, dtype=jnp.int32), P)
    mask_R = jnp.concatenate((jnp.zeros((P,), jnp.int32), number_R))
    depth_BR = jnp.concatenate((tree.depth_BP, jnp.repeat(tree.depth_BP, M, axis=1)), axis=1)
    return base.Riders(
      anc_BRR=jnp.concatenate((nodes, masks), axis=1),
      depth_BR=depth_BR + mask_R[None],
      ahead=bita.ahead(
        jax.tree.map(_harmless, params.draft), jnp.broadcast_to(mask_R[None], (B, P + P * M))
      ),
    )

  def commit(self, params: base.Params, state: State, new: base.Committed) -> State:
    variables = {"params": params.target}
    logits_BMV = self.model.apply(variables, new.riders_BMD, method="unembed")
    _, best_BMW = jax.lax.top_k(logits_BMV, self.width)
    tok = [best_BMW[:, level, :width] for level, width in enumerate(self._widths())]
    tok_BC = jnp.concatenate(tok, axis=1).astype(jnp.int32)
    old_BC = base.take_rows(state.tok_BC, new.row, tok_BC.shape[0])
    tok_BC = jnp.where((new.num_B > 0)[:, None], tok_BC, old_BC)
    return State(base.put_rows(state.tok_BC, tok_BC, new.row))

  def copy_row(self, state: State, source: Any, target: Any) -> State:
    return base.copy_rows(state, source, target)


def _harmless(x: Any) -> Any:
  """Learned numbers that leave the target's rows finite: a key that no row sees times 0 is NaN if
  it is not. Nothing learned comes near the bound."""
  return jnp.where(jnp.abs(x) < _MOST, x, 0)  # NaN is not below it


def make(
  draft: bita.Bita, model: transformer.Transformer, params: Any, *, width: int = 5
) -> tuple[BitaDrafter, Any]:
  """(drafter, draft_params) for `Engine(model, params, drafter=..., draft_params=...)`."""
  bita.check_fits(draft.cfg, model.cfg)
  dtype = types.dtype_of(model.cfg.dtype)
  weights = jax.tree.map(lambda x: jnp.asarray(x, dtype), draft.params)
  return BitaDrafter(model, draft.cfg, width), weights
