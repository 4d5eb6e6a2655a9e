"""Key/value cache of a whole model: a frozen pytree that goes into a forward and comes out of it.

Slots are filled in order; prompts of unequal length are padded on the left (segment id 0). A
forward of T tokens writes slots [length, length + T) and must fit into the capacity. Going back
after rejected speculative tokens is `cache.replace(length=...)`: later slots are never seen.
A model with sparse attention that may reach `dense_len` also holds compressed keys (4% more).
"""

from typing import Any

import flax.struct
import jax.numpy as jnp

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.nn import kv, sparse_cache, sparse_grid


@flax.struct.dataclass
class KVCache:
  """k, v: [L, B, S, K, H] (scan) or one [B, S, K, H] a layer (unrolled), keys already rotated.

  MLA stores one head of latent + rope channels as k, and v of width 0.
  """

  k: Any
  v: Any
  segment_ids_BS: Any  # int32, 0 = empty or padding
  length: Any  # int32 scalar, slots used
  k_nope: Any = None  # like k, keys before RoPE (sparse.use_nope)
  fine: Any = None  # like k with windows for slots: compressed keys (nn/sparse_cache.py)
  coarse: Any = None

  @property
  def capacity(self) -> int:
    return self.segment_ids_BS.shape[1]


def widths(cfg: ModelConfig) -> tuple[int, int, int]:
  """(heads, key width, value width) that a token stores in each layer."""
  if cfg.mla is not None:
    return 1, cfg.mla.kv_lora_rank + cfg.mla.qk_rope_head_dim, 0
  return cfg.num_kv_heads, cfg.head_dim, cfg.head_dim


def init(cfg: ModelConfig, batch_size: int, capacity: int, dtype: Any = None) -> KVCache:
  """An empty cache of `capacity` slots; `dtype` None = the compute dtype."""
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
    segment_ids_BS=jnp.zeros((batch_size, capacity), jnp.int32),
    length=jnp.zeros((), jnp.int32),
    **more,
  )


_BY_LAYER = ("k", "v", "k_nope", "fine", "coarse")


def layer_view(cache: KVCache, layer: int | None) -> kv.LayerCache:
  """One layer of an unrolled cache, or the stacked cache at layer 0 (`layer` None)."""
  arrays = {name: getattr(cache, name) for name in _BY_LAYER}
  if layer is None:
    return kv.LayerCache(length=cache.length, layer=jnp.zeros((), jnp.int32), **arrays)
  arrays = {name: None if x is None else x[layer] for name, x in arrays.items()}
  return kv.LayerCache(length=cache.length, **arrays)


def after(cache: KVCache, views: kv.LayerCache | list[kv.LayerCache], num_new: int) -> KVCache:
  """The cache from the view(s) that the layers returned, `num_new` slots longer."""

  def joined(name: str) -> Any:
    if isinstance(views, kv.LayerCache):
      return getattr(views, name)
    return None if getattr(cache, name) is None else tuple(getattr(w, name) for w in views)

  arrays = {name: joined(name) for name in _BY_LAYER}
  return cache.replace(length=cache.length + num_new, **arrays)
