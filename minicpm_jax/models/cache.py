"""Key/value cache of a whole model: a frozen pytree that goes into a forward and comes out of it.

Slots are filled in order. A forward of T tokens writes slots [length, length + T) and must fit into
the capacity. Going back after rejected speculative tokens is `cache.replace(length=...)`: later
slots are never seen. Two forms: one length for all rows, where prompts of unequal length are padded
on the left (segment id 0), and one length a row (`per_row`), where slot = position and there is no
padding; the engine uses the second and says with a `Step` what a forward does to it.
A model with sparse attention that may reach `dense_len` also holds compressed keys (4% more).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.nn import kv, sparse_cache, sparse_grid
from minicpm_jax.quant import prefix as prefix_lib


@flax.struct.dataclass
class KVCache:
  """k, v: [L, B, S, K, H] (scan) or one [B, S, K, H] a layer (unrolled), keys already rotated.

  MLA stores one head of latent + rope channels as k, and v of width 0.
  """

  k: Any
  v: Any
  segment_ids_BS: Any  # int32, 0 = empty or padding; None = one length a row
  length: Any  # int32 slots used: a scalar, or [B] with one length a row
  k_nope: Any = None  # like k, keys before RoPE (sparse.use_nope)
  fine: Any = None  # like k with windows for slots: compressed keys (nn/sparse_cache.py)
  coarse: Any = None

  @property
  def capacity(self) -> int:
    return jax.tree.leaves(self.k)[0].shape[-3]

  @property
  def batch_size(self) -> int:
    return jax.tree.leaves(self.k)[0].shape[-4]

  @property
  def is_per_row(self) -> bool:
    return self.segment_ids_BS is None


@flax.struct.dataclass
class Step:
  """What a forward does with a cache that has one length a row.

  Default: T tokens in a chain, all of which count. `num_new_B`: tokens that count (padding comes
  last; 0 leaves a row as it is). `anc_BTT` makes it a tree of at most 64 nodes: node i sees the
  committed slots and node j iff anc[i, j]; positions are length + depth; nothing is committed,
  see `commit`. `row`: the forward works on `num_rows` rows from that one on. `total_B`: sequence
  length that decides between dense and sparse attention (chunks of one prompt: the whole prompt;
  default: that after this forward, node by node). `sees_BTS`: of a tree on dense attention, which
  committed slots each node sees (training of mask tokens). `span`: a static bound of length + T;
  slots beyond it are not read. `is_long`: every sequence that counts is known to reach
  sparse.dense_len.
  """

  num_new_B: Any = None  # int32
  anc_BTT: Any = None  # bool, ancestor or self
  depth_BT: Any = None  # int32, 0 = root
  row: Any = None  # int32 scalar
  num_rows: int = flax.struct.field(pytree_node=False, default=1)
  total_B: Any = None  # int32
  sees_BTS: Any = None  # bool
  span: int | None = flax.struct.field(pytree_node=False, default=None)
  is_long: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def is_tree(self) -> bool:
    return self.anc_BTT is not None


def widths(cfg: ModelConfig) -> tuple[int, int, int]:
  """(heads, key width, value width) that a token stores in each layer."""
  if cfg.mla is not None:
    return 1, cfg.mla.kv_lora_rank + cfg.mla.qk_rope_head_dim, 0
  return cfg.num_kv_heads, cfg.head_dim, cfg.head_dim


def init(
  cfg: ModelConfig, batch_size: int, capacity: int, dtype: Any = None, *, per_row: bool = False
) -> KVCache:
  """An empty cache of `capacity` slots; `dtype` None = the compute dtype."""
  for name, size in (("batch_size", batch_size), ("capacity", capacity)):
    if size < 1:
      raise ValueError(f"cache {name}: found {size}, expected at least 1")
  dtype = types.dtype_of(cfg.dtype) if dtype is None else dtype
  num_heads, k_width, v_width = widths(cfg)

  def zeros(width: int, num_slots: int = capacity) -> Any:
    shape = (batch_size, num_slots, num_heads, width)
    if cfg.scan_layers:
      return jnp.zeros((cfg.num_layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))

  more = {}
  if cfg.sparse is not None and not sparse_grid.is_always_dense(cfg.sparse, capacity):
    for level in sparse_cache.LEVELS:
      more[level] = zeros(k_width, sparse_cache.num_entries(cfg.sparse, level, capacity))
    if cfg.sparse.use_nope:
      more["k_nope"] = zeros(k_width)
  return KVCache(
    k=zeros(k_width),
    v=zeros(v_width),
    segment_ids_BS=None if per_row else jnp.zeros((batch_size, capacity), jnp.int32),
    length=jnp.zeros((batch_size,) if per_row else (), jnp.int32),
    **more,
  )


def with_prefix(
  cfg: ModelConfig,
  prefix: prefix_lib.Prefix,
  batch_size: int,
  capacity: int,
  *,
  per_row: bool = False,
) -> KVCache:
  """A cache whose rows begin with the prefix's stored keys and values; `capacity` counts them.

  Real tokens follow at positions prefix.length, ...; the prefix is never computed again.
  """
  prefix_lib.check(prefix, cfg.num_layers, widths(cfg))
  P = prefix.length
  if capacity < P:
    raise ValueError(f"capacity: found {capacity} slots, expected at least the prefix's {P}")
  cache = init(cfg, batch_size, capacity, per_row=per_row)
  if cache.fine is not None:
    raise NotImplementedError(
      f"capacity: found {capacity}, expected less than sparse.dense_len {cfg.sparse.dense_len} "
      "behind a prefix (compressed keys of it are not stored)"
    )

  def filled(x: Any, rows: Any) -> Any:
    """x [*L, B, S, K, H] with rows [*L, P, K, H] in front of every row of the batch."""
    rows = jnp.broadcast_to(jnp.expand_dims(rows, -4), (*x.shape[:-3], P, *x.shape[-2:]))
    return x.at[..., :P, :, :].set(rows.astype(x.dtype))

  arrays = {}
  for name in ("k", "v"):
    stored, x = jnp.asarray(getattr(prefix, name)), getattr(cache, name)
    arrays[name] = filled(x, stored) if cfg.scan_layers else tuple(map(filled, x, stored))
  ids_BS = None if per_row else cache.segment_ids_BS.at[:, :P].set(1)
  return cache.replace(segment_ids_BS=ids_BS, length=cache.length + P, **arrays)


_BY_LAYER = ("k", "v", "k_nope", "fine", "coarse")


def layer_view(cache: KVCache, layer: int | None, step: Step | None = None) -> kv.LayerCache:
  """One layer of an unrolled cache, or the stacked cache at layer 0 (`layer` None)."""
  arrays = {name: getattr(cache, name) for name in _BY_LAYER}
  more = {"length": cache.length}
  if step is not None:
    more = {"length": lengths(cache, step), "row": step.row, "span": step.span}
    more["num_rows"] = step.num_rows
  if layer is None:
    return kv.LayerCache(layer=jnp.zeros((), jnp.int32), **more, **arrays)
  arrays = {name: None if x is None else x[layer] for name, x in arrays.items()}
  return kv.LayerCache(**more, **arrays)


def lengths(cache: KVCache, step: Step) -> Any:
  """int32 [B]: slots used by the rows that a forward works on."""
  if step.row is None:
    return cache.length
  return jax.lax.dynamic_slice_in_dim(cache.length, step.row, step.num_rows)


def with_lengths(cache: KVCache, step: Step, length_B: Any) -> KVCache:
  """`cache` with these slots used in the rows that a forward works on."""
  if step.row is None:
    return cache.replace(length=length_B)
  length = jax.lax.dynamic_update_slice_in_dim(cache.length, length_B, step.row, axis=0)
  return cache.replace(length=length)


def check_room(cache: KVCache, step: Step | None, num_new: int) -> None:
  """ValueError where num_new tokens do not fit behind those held (a traced length cannot tell)."""
  held: Any = cache.length if step is None else lengths(cache, step)
  is_padded = step is not None and step.num_new_B is not None
  is_unseen = isinstance(held, jax.core.Tracer) or not getattr(held, "is_fully_addressable", True)
  num_held = 0 if is_padded or is_unseen else int(np.max(jax.device_get(held)))
  if num_held + num_new > cache.capacity:
    behind = f" behind {num_held}" if num_held else ""
    raise ValueError(
      f"tokens_BT: found {num_new} tokens{behind}, "
      f"expected at most the cache's {cache.capacity} slots"
    )


def positions(cache: KVCache, step: Step, num_new: int) -> Any:
  """int32 [B, T]: absolute positions of the tokens of a forward."""
  steps_1T = jnp.arange(num_new, dtype=jnp.int32)[None, :]
  return lengths(cache, step)[:, None] + (steps_1T if step.depth_BT is None else step.depth_BT)


def tree_mask(length_B: Any, anc_BTT: Any, span: int, sees_BTS: Any = None) -> Any:
  """bool [B, T, span]: slots below the length, and ancestors at length + node (inference.md 2).

  sees_BTS: bool [B, T, any width]: of the slots below the length only these.
  """
  T = anc_BTT.shape[-1]
  node_BS = jnp.arange(span, dtype=jnp.int32)[None, :] - length_B[:, None]
  is_node_BS = (node_BS >= 0) & (node_BS < T)
  at_B1S = jnp.clip(node_BS, 0, T - 1)[:, None, :]
  anc_BTS = jnp.take_along_axis(anc_BTT, jnp.broadcast_to(at_B1S, (*anc_BTT.shape[:2], span)), 2)
  past_BTS = (node_BS < 0)[:, None, :]
  if sees_BTS is not None:
    past_BTS &= jnp.pad(sees_BTS, ((0, 0), (0, 0), (0, max(0, span - sees_BTS.shape[2]))))[
      ..., :span
    ]
  return past_BTS | (is_node_BS[:, None, :] & anc_BTS)


def after(
  cache: KVCache,
  views: kv.LayerCache | list[kv.LayerCache],
  num_new: int,
  step: Step | None = None,
) -> KVCache:
  """The cache from the view(s) that the layers returned, `num_new` slots longer (or as `step`)."""

  def joined(name: str) -> Any:
    if isinstance(views, kv.LayerCache):
      return getattr(views, name)
    return None if getattr(cache, name) is None else tuple(getattr(w, name) for w in views)

  arrays = {name: joined(name) for name in _BY_LAYER}
  if step is None:
    return cache.replace(length=cache.length + num_new, **arrays)
  if step.is_tree:
    return cache.replace(**arrays)
  new = num_new if step.num_new_B is None else step.num_new_B
  return cache.replace(length=_longer(cache, step, new), **arrays)


def _longer(cache: KVCache, step: Step, num_B: Any) -> Any:
  """int32 [B]: lengths of all rows, with num_B more in those that the forward works on."""
  if step.row is None:
    return cache.length + num_B
  return cache.length.at[step.row + jnp.arange(step.num_rows, dtype=jnp.int32)].add(num_B)


def _rows_axis(array: Any) -> int:
  """Axis of the batch: stacked arrays have the layers first."""
  return array.ndim - 4


def commit(
  cfg: ModelConfig, cache: KVCache, path_BA: Any, num_B: Any, step: Step | None = None
) -> KVCache:
  """The accepted path of a tree, as slots length, length + 1, ... (inference.md 9).

  path_BA: node of each depth, nodes lie at length + node; rows beyond num_B are garbage that the
  next forward overwrites. Compressed keys are made of committed tokens alone, so here. step: whose
  `row` and `num_rows` the tree's forward had.
  """
  step, (B, A) = Step() if step is None else step, path_BA.shape
  if A > 1:
    length_B = lengths(cache, step)
    slots_BA = length_B[:, None] + path_BA
    first = jnp.zeros((), jnp.int32) if step.row is None else step.row
    rows_B1 = first + jnp.arange(B, dtype=jnp.int32)[:, None]
    zero = jnp.zeros((), jnp.int32)

    def moved(x: Any) -> Any:
      stacked = (slice(None),) * _rows_axis(x)
      # The barrier ends the read before the write, which then happens in place.
      new = jax.lax.optimization_barrier(x[(*stacked, rows_B1, slots_BA)])
      if B == 1:
        at = (zero,) * len(stacked) + (first, length_B[0], zero, zero)
        return jax.lax.dynamic_update_slice(x, new, at)
      to_BA = length_B[:, None] + jnp.arange(A, dtype=jnp.int32)[None, :]
      return x.at[(*stacked, rows_B1, to_BA)].set(new, mode="drop", unique_indices=True)

    arrays = {name: getattr(cache, name) for name in ("k", "v", "k_nope")}
    cache = cache.replace(**jax.tree.map(moved, arrays))
    if cache.fine is not None:
      cache = _compress(cfg, cache, A, step)
  return cache.replace(length=_longer(cache, step, num_B))


def _compress(cfg: ModelConfig, cache: KVCache, num_new: int, step: Step) -> KVCache:
  """Adds the windows that the tokens at length, length + 1, ... complete, in every layer."""
  length_B = lengths(cache, step)
  step = Step(row=step.row, num_rows=step.num_rows)
  grid = sparse_grid.make_grid(
    cfg.sparse, num_new, cache.capacity, length_B.shape[0], q_offset=length_B
  )

  def one(view: kv.LayerCache) -> dict[str, Any]:
    keys = view.k_nope if cfg.sparse.use_nope else view.k
    return sparse_cache.extend(view, keys, cfg.sparse, grid)[0]

  if cfg.scan_layers:

    def body(layer: Any, levels: dict[str, Any]) -> dict[str, Any]:
      view = layer_view(cache, None, step).replace(layer=layer, **levels)
      return one(view)

    levels = {name: getattr(cache, name) for name in sparse_cache.LEVELS}
    return cache.replace(**jax.lax.fori_loop(0, cfg.num_layers, body, levels))
  levels = [one(layer_view(cache, i, step)) for i in range(cfg.num_layers)]
  return cache.replace(
    **{name: tuple(level[name] for level in levels) for name in sparse_cache.LEVELS}
  )


def copy_row(cache: KVCache, source: Any, target: Any) -> KVCache:
  """Row `target` becomes a copy of row `source`, its length apart."""

  def copied(x: Any) -> Any:
    axis = _rows_axis(x)
    row = jax.lax.dynamic_index_in_dim(x, source, axis, keepdims=True)
    return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis)

  arrays = {name: getattr(cache, name) for name in _BY_LAYER}
  return cache.replace(**jax.tree.map(copied, arrays))
