"""The one protocol of all drafters, and the tree they hand to the verifier (inference.md 1).

A drafter is a frozen, hashable dataclass: sizes and modules, no arrays (it is a static argument of
the jitted round). Its parameters and its state are pytrees. A drafter may be wrong, never harmful:
whatever tree it returns, the tokens are those of plain sampling.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from minicpm_jax import config
from minicpm_jax.infer import constrained
from minicpm_jax.quant import qtensor

MAX_NODES = 64  # root included
CUT = -1  # token of a node that must not be accepted


@flax.struct.dataclass
class Tree:
  """P nodes a row; node 0 is the root: the last sampled token, not yet in the cache.

  Parents come before children. Siblings hold distinct tokens. A node with token `CUT` is never
  accepted, nor is what hangs on it.
  """

  tok_BP: Any  # int32
  parent_BP: Any  # int32, of the root 0
  depth_BP: Any  # int32, 0 = root
  anc_BPP: Any  # bool, [i, j]: j is i or an ancestor of i


@flax.struct.dataclass
class Committed:
  """Tokens that have become part of the context: a chunk of a prompt, or the path of a round.

  tokens_BT: at positions start_B + t. next_BT: the token after each (of the last one of a prompt:
  the sampled root). features_BTD: the target's state at each token: hidden after the final norm,
  or where the drafter has `tap_layers` the residual stream before those layers side by side.
  Only the first num_B are real (0: leave the row as it is). `row`: None for all rows, else the
  first of the B rows of the state that this belongs to (B = 1 in a prompt).
  """

  tokens_BT: Any  # int32
  next_BT: Any  # int32
  features_BTD: Any
  start_B: Any  # int32
  num_B: Any  # int32
  row: Any = None  # int32 scalar
  riders_BMD: Any = None  # hidden of the rows that rode on the last node of a round


@flax.struct.dataclass
class Riders:
  """R = P (1 + M) rows of a verification: P nodes, then M riders of node 0, of node 1, ..."""

  anc_BRR: Any  # bool, as in Tree
  depth_BR: Any  # int32
  ahead: Any  # nn.lookahead.Lookahead


class Params(NamedTuple):
  """What a drafter may read.

  span: bounds the positions of this call (slots a cache must show). root_mask_BW: under a
  constraint, bits of the tokens that may follow the root; a drafter may heed them or not. row: of
  `draft`, the state's row that root_B begins with; None: root_B is of all rows.
  """

  target: Any
  draft: Any
  span: int | None = None
  root_mask_BW: Any = None  # int32
  row: Any = None  # int32 scalar

  def root_bias(self, vocab_size: int) -> Any:
    """float32 [B, V] to be added to the logits after the root: 0, or -inf where it is forbidden."""
    shape = (self.root_mask_BW.shape[0], vocab_size)
    return constrained.apply_bitmask(jnp.zeros(shape, jnp.float32), self.root_mask_BW)


@runtime_checkable
class Drafter(Protocol):
  """See the module docstring. All methods but `check` and `init_state` are traced.

  num_nodes: P, static, root included. num_levels: depth of the deepest node, so that a round emits
  1..num_levels + 1 tokens. tap_layers: target layers whose input is wanted as feature; () = hidden
  after the final norm. reuses_prefix: False where a copied row of the state is not enough to go on
  from an earlier position (then the engine's prompt cache stays off). A drafter may also have
  `may_pass` = True: rounds in which it cuts all of its nodes in all rows then run the root alone
  (T = 1 in `commit`); and `by_row` = True: rounds may be of some rows alone
  (EngineConfig.shrinks), so `draft` heeds `Params.row` and `commit` `Committed.row`; the state
  stays whole. One with `num_riders` > 0 has so many rows of its own behind every node in the
  target's forward (`ride(params, tree) -> Riders`); `commit` gets those of the last node.
  """

  num_nodes: int
  num_levels: int
  tap_layers: tuple[int, ...]
  reuses_prefix: bool

  def check(self, model: Any, params: Params) -> None:
    """Raises ValueError where width, vocabulary or shapes do not fit the target."""

  def init_state(self, model: Any, params: Params, batch_size: int, capacity: int) -> Any:
    """Empty state. `capacity`: slots of the target's cache."""

  def prefill(self, params: Params, state: Any, new: Committed) -> Any:
    """State after a chunk of a prompt in one row. start_B 0 begins a new sequence."""

  def draft(self, params: Params, state: Any, root_B: Any, length_B: Any) -> tuple[Tree, Any]:
    """The tree after root_B (int32, at position length_B), and the state with scratch rows."""

  def commit(self, params: Params, state: Any, new: Committed) -> Any:
    """State after a round: T = num_levels + 1, num_B accepted."""

  def copy_row(self, state: Any, source: Any, target: Any) -> Any:
    """State in which row `target` continues like row `source` (prompt cache)."""


def copy_rows(state: Any, source: Any, target: Any) -> Any:
  """`copy_row` for states whose leaves all have the batch as their first axis."""
  return jax.tree.map(lambda x: x.at[target].set(x[source]), state)


def take_rows(state: Any, row: Any, num_rows: int) -> Any:
  """`num_rows` rows from `row` on (None: all) of arrays that all have the batch first."""
  if row is None:
    return state
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, num_rows), state)


def put_rows(state: Any, part: Any, row: Any) -> Any:
  """`state` with rows that `take_rows` gave."""
  if row is None:
    return part
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, axis=0), state, part
  )


def num_riders(drafter: Any) -> int:
  """Rows that ride on every node of the drafter's trees."""
  return getattr(drafter, "num_riders", 0)


def num_rows(drafter: Any) -> int:
  """Rows of one verification: cache slots that must be free behind a context."""
  return drafter.num_nodes * (1 + num_riders(drafter))


def check_params(cfg: config.ModelConfig, params: Any, what: str) -> None:
  """ValueError where the embedding is not that of `cfg`: parameters of another model, or none."""
  embed = params.get("embed", {}) if isinstance(params, Mapping) else {}
  table = meta.unbox(embed.get("embedding"))  # `model.init` gives boxes
  found = list(table.full_shape if qtensor.is_qtensor(table) else getattr(table, "shape", ()))
  expected = [cfg.padded_vocab_size, cfg.model_dim]
  if found != expected:
    raise ValueError(f"{what}: found an embedding of {found or 'none'}, expected {expected}")


def check_tree_size(num_nodes: int, num_levels: int) -> None:
  if not 1 <= num_nodes <= MAX_NODES:
    raise ValueError(f"num_nodes: found {num_nodes} tree nodes, expected 1..{MAX_NODES}")
  if not 0 <= num_levels < num_nodes:
    raise ValueError(f"num_levels: found {num_levels}, expected 0..{num_nodes - 1}")


def check_window(sparse: config.SparseAttentionConfig | None, num_levels: int) -> None:
  """Nodes always see their path, so a plain step must: it has to lie in the local window, whose
  least depth is that of a query in the first slot of its block (infllm_v2.md 14)."""
  if sparse is None:
    return
  most = sparse.window_size - (sparse.block_size if sparse.selection == "split" else 0)
  if num_levels > max(0, most):
    raise ValueError(
      f"num_levels: found {num_levels}, expected at most {max(0, most)}: paths within the local "
      f"window of sparse.window_size {sparse.window_size} ({sparse.selection})"
    )


def chain(tok_BP: Any) -> Tree:
  """The tree of one chain per row: root, then each token the child of the one before."""
  B, P = tok_BP.shape
  steps = np.arange(P, dtype=np.int32)

  def rows(x: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(x)[None], (B, *x.shape))

  return Tree(
    tok_BP=tok_BP,
    parent_BP=rows(np.maximum(steps - 1, 0)),
    depth_BP=rows(steps),
    anc_BPP=rows(np.tril(np.ones((P, P), bool))),
  )


@dataclasses.dataclass(frozen=True)
class NoDrafter:
  """Plain decoding: a tree of the root alone."""

  num_nodes: int = 1
  num_levels: int = 0
  tap_layers: tuple[int, ...] = ()
  reuses_prefix: bool = True
  by_row: bool = True

  def check(self, model: Any, params: Params) -> None:
    pass

  def init_state(self, model: Any, params: Params, batch_size: int, capacity: int) -> Any:
    return ()

  def prefill(self, params: Params, state: Any, new: Committed) -> Any:
    return state

  def draft(self, params: Params, state: Any, root_B: Any, length_B: Any) -> tuple[Tree, Any]:
    return chain(root_B[:, None]), state

  def commit(self, params: Params, state: Any, new: Committed) -> Any:
    return state

  def copy_row(self, state: Any, source: Any, target: Any) -> Any:
    return state
