"""Key/value cache of a whole model: a frozen pytree that goes into a forward and comes out of it.

Slots are filled in order; prompts of unequal length are padded on the left (segment id 0). A
forward of T tokens writes slots [length, length + T) and must fit into the capacity. Going back
after rejected speculative tokens is `cache.replace(length=...)`: later slots are never seen.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.nn import kv


@flax.struct.dataclass
class KVCache:
  """k, v: [L, B, S, K, H] (scan) or one [B, S, K, H] a layer (unrolled), keys already rotated.

  MLA stores one head of latent + rope channels as k, and v of width 0.
  """

  k: Any
  v: Any
  segment_ids_BS: Any  # int32, 0 = empty or padding
  length: Any  # int32 scalar, slots used

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
  shape = (batch_size, capacity, num_heads)

  def zeros(width: int) -> Any:
    if cfg.scan_layers:
      return jnp.zeros((cfg.num_layers, *shape, width), dtype)
    return tuple(jnp.zeros((*shape, width), dtype) for _ in range(cfg.num_layers))

  return KVCache(
    k=zeros(k_width),
    v=zeros(v_width),
    segment_ids_BS=jnp.zeros((batch_size, capacity), jnp.int32),
    length=jnp.zeros((), jnp.int32),
  )


def layer_view(cache: KVCache, layer: int | None) -> kv.LayerCache:
  """One layer of an unrolled cache, or the stacked cache at layer 0 (`layer` None)."""
  if layer is None:
    return kv.LayerCache(cache.k, cache.v, cache.length, jnp.zeros((), jnp.int32))
  return kv.LayerCache(cache.k[layer], cache.v[layer], cache.length)
