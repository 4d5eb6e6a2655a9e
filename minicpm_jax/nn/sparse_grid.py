"""Where queries stand: documents, blocks and the switch to dense, made once for all layers.

A row has one grid of windows and blocks. Position 0 is slot 0 of the row, or its first token where
a cache holds prompts padded on the left (`base_B`). Packed documents share the grid when they start
at multiples of `cfg.alignment`. Also how the stages are laid over a mesh (infllm_v2.md section 12).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.core import mesh
from pallas_kernels.sparse_topk import rule as rules

Scalar = Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, "B"] | int | np.integer
Ids = Int[Array | np.ndarray, "B S"]
NOWHERE = rules.NOWHERE  # start of what is padding


def rule_of(cfg: SparseAttentionConfig) -> rules.Rule:
  return rules.Rule(
    kernel_size=cfg.kernel_size,
    kernel_stride=cfg.kernel_stride,
    block_size=cfg.block_size,
    init_blocks=cfg.init_blocks,
    local_blocks=cfg.window_size // cfg.block_size,
    topk=cfg.topk,
    selection=cfg.selection,
    lse=cfg.lse,
  )


def is_always_dense(cfg: SparseAttentionConfig, num_slots: int) -> bool:
  """True where no sequence of at most `num_slots` tokens reaches dense_len (section 8)."""
  return num_slots < cfg.dense_len


@flax.struct.dataclass
class Grid:
  """Where the queries of one forward stand on the grid of each row; the same for all layers."""

  start_BT: Any  # int32, position of the first token of the query's document, or NOWHERE
  offset_B: Any = None  # int32, position of the first query; None = static_offset
  is_dense_BT: Any = None  # bool, documents below dense_len; None = there is none
  is_off_BT: Any = None  # bool, documents off the grid; None = there is none
  base_B: Any = None  # int32, slot of position 0; None = slot 0
  static_offset: int | None = flax.struct.field(pytree_node=False, default=None)
  is_cached: bool = flax.struct.field(pytree_node=False, default=False)  # decoding: no gradient
  all_dense: bool | None = flax.struct.field(pytree_node=False, default=None)  # None: data tells

  @property
  def offset(self) -> Any:
    return self.offset_B if self.static_offset is None else self.static_offset

  @property
  def pos_BT(self) -> Any:
    steps = jnp.arange(self.start_BT.shape[1], dtype=jnp.int32)[None, :]
    if self.static_offset is not None:
      return jnp.broadcast_to(self.static_offset + steps, self.start_BT.shape)
    return self.offset_B[:, None] + steps


def document_bounds(
  segment_ids_BS: Ids, length_B: Int[Array, " B"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
  """(first slot, one past the last) of the run of equal ids that holds each slot.

  Slots at or beyond the length belong to no document; neither does segment 0: (NOWHERE, 0).
  """
  B, S = segment_ids_BS.shape
  slots_1S = jnp.arange(S, dtype=jnp.int32)[None, :]
  ids_BS = jnp.where(slots_1S < length_B[:, None], segment_ids_BS, 0)
  is_new_BS = jnp.concatenate((jnp.ones((B, 1), bool), ids_BS[:, 1:] != ids_BS[:, :-1]), axis=1)
  first_BS = jax.lax.cummax(jnp.where(is_new_BS, slots_1S, 0), axis=1)
  is_last_BS = jnp.concatenate((is_new_BS[:, 1:], jnp.ones((B, 1), bool)), axis=1)
  ends_BS = jnp.where(is_last_BS, slots_1S + 1, S)
  last_BS = jax.lax.cummin(ends_BS, axis=1, reverse=True)
  is_real_BS = ids_BS != 0
  return jnp.where(is_real_BS, first_BS, rules.NOWHERE), jnp.where(is_real_BS, last_BS, 0)


def documents(segment_ids_BS: Ids) -> Int[Array, "B S"]:
  """A number of its own for every run of equal ids, 0 = padding: an id may come twice in a row."""
  length_B = jnp.full(segment_ids_BS.shape[:1], segment_ids_BS.shape[1], jnp.int32)
  first_BS, _ = document_bounds(segment_ids_BS, length_B)
  return jnp.where(first_BS < rules.NOWHERE, first_BS + 1, 0)


def make_grid(
  cfg: SparseAttentionConfig,
  num_queries: int,
  num_slots: int,
  batch_size: int,
  *,
  q_offset: Scalar = 0,
  kv_length: Scalar | None = None,
  segment_ids_BS: Ids | None = None,
  has_base: bool = False,
  switch: Literal["sequence", "batch"] = "sequence",
) -> Grid:
  """Grid of a forward. `has_base`: position 0 is the first token of each row (left padding)."""
  B, T = batch_size, num_queries
  is_static = isinstance(q_offset, int)
  offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
  length = q_offset + T if kv_length is None else kv_length
  length_B = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (B,))
  slot_BT = offset_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
  base_B = None
  if segment_ids_BS is None:
    start_BT = jnp.where(slot_BT < length_B[:, None], 0, rules.NOWHERE)
    doc_length_BT = jnp.broadcast_to(length_B[:, None], (B, T))
    is_off_BT = None
  else:
    first_BS, last_BS = document_bounds(jnp.asarray(segment_ids_BS), length_B)
    at_BT = jnp.clip(slot_BT, 0, num_slots - 1)
    start_BT = jnp.take_along_axis(first_BS, at_BT, axis=1)
    doc_length_BT = jnp.take_along_axis(last_BS, at_BT, axis=1) - start_BT
    if has_base:
      base_B = jnp.min(first_BS, axis=1)
      base_B = jnp.where(base_B == rules.NOWHERE, 0, base_B)
      offset_B, is_static = offset_B - base_B, False
      start_BT = jnp.where(start_BT == rules.NOWHERE, start_BT, start_BT - base_B[:, None])
    is_off_BT = (start_BT < rules.NOWHERE) & (start_BT % cfg.alignment != 0)
  is_dense_BT = None
  if cfg.dense_len > 0:
    is_dense_BT = (doc_length_BT < cfg.dense_len) & (start_BT < rules.NOWHERE)
    if switch == "batch":
      is_any_long = jnp.any((doc_length_BT >= cfg.dense_len) & (start_BT < rules.NOWHERE))
      is_dense_BT = is_dense_BT & ~is_any_long
  return Grid(
    start_BT=start_BT.astype(jnp.int32),
    offset_B=None if is_static else offset_B,
    is_dense_BT=is_dense_BT,
    is_off_BT=is_off_BT,
    base_B=base_B,
    static_offset=q_offset if is_static else None,
  )


# --- Meshes --------------------------------------------------------------------------------------

QUERIES = ("act_batch", "act_seq", "act_heads", None)
KEYS = ("act_batch", None, "act_kv_heads", None)  # whole along the sequence: all-gathered over cp
LISTS = ("act_batch", "act_kv_heads", "act_seq", None)
COUNTS = LISTS[:3]
_OWN = (("act_batch",), ("act_batch", "act_seq", None, "act_kv_heads", None))
# The number of committed tokens and the leaves of sparse_topk's Nodes.
NODES = (("act_batch",), ("act_batch", "act_seq"), *_OWN, *_OWN)


def check_mesh(num_kv_heads: int) -> None:
  """Refuses tensor parallelism that would split a group of query heads (section 12)."""
  parts = jax.sharding.get_abstract_mesh().shape.get("tp", 1) if mesh.is_sharded() else 1
  if num_kv_heads % parts:
    raise mesh.ShardingError(
      f"mesh.tp: found {parts}, expected a divisor of num_kv_heads {num_kv_heads}: sparse "
      "attention selects blocks per key head from a sum over its query heads, so a group cannot be "
      "split over devices. Use fsdp, dp or cp for the rest."
    )


def on_mesh(
  function: Callable,
  grid: Grid,
  args: Sequence[Any],
  names: Sequence[mesh.Names],
  out_names: Sequence[mesh.Names],
) -> Any:
  """function(*args, grid), on every device with its rows, queries and key heads.

  `args` begins with queries and then keys. The tuple of results has the logical axes `out_names`.
  """
  num_heads, num_kv_heads = args[0].shape[2], args[1].shape[2]
  check_mesh(num_kv_heads)
  if not mesh.is_sharded():
    return function(*args, grid)
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  B, T = grid.start_BT.shape
  dims = {"act_batch": B, "act_seq": T, "act_heads": num_heads, "act_kv_heads": num_kv_heads}

  def spec(names: mesh.Names) -> Any:
    shape = [dims.get(name or "", 1) for name in names]
    return mesh.partition_spec(names, sizes=sizes, shape=shape, is_hint=True)

  # Offsets become data: a device that holds later queries adds what comes before them.
  offset_B = jnp.broadcast_to(jnp.asarray(grid.offset, jnp.int32), (B,))
  whole = Grid(start_BT=grid.start_BT, offset_B=offset_B, base_B=grid.base_B)
  grid_specs = Grid(
    start_BT=spec(("act_batch", "act_seq")),
    offset_B=spec(("act_batch",)),
    base_B=None if grid.base_B is None else spec(("act_batch",)),
  )

  def local(grid: Grid, *args: Any) -> Any:
    num_own = grid.start_BT.shape[1]
    if num_own != T:
      grid = grid.replace(offset_B=grid.offset_B + jax.lax.axis_index("cp") * num_own)
    return function(*args, grid)

  mapped = jax.shard_map(
    local,
    in_specs=(grid_specs, *map(spec, names)),
    out_specs=tuple(map(spec, out_names)),
    check_vma=False,
  )
  return mapped(whole, *args)
