"""One layer's view of the key/value cache: written in place, read whole."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class LayerCache:
  """Keys and values of one layer, or of all layers with the number of the one at work.

  Under the scan over layers the stacked arrays travel in the carry and each layer writes its T
  new slots, so a decode step copies no cache.
  """

  k: Float[Array, "*L B S K H"]
  v: Float[Array, "*L B S K V"]
  length: Int[Array, ""]  # slots in use before this forward
  layer: Int[Array, ""] | None = None  # set when k and v are stacked
  k_nope: Float[Array, "*L B S K H"] | None = None  # keys before RoPE (sparse.use_nope)
  fine: Float[Array, "*L B F K H"] | None = None  # compressed keys, see nn/sparse_cache.py
  coarse: Float[Array, "*L B C K H"] | None = None


def _write(cache, new_BTKH, layer, length):
  zero = jnp.zeros((), jnp.int32)
  new = new_BTKH.astype(cache.dtype)
  if layer is None:
    cache = jax.lax.dynamic_update_slice(cache, new, (zero, length, zero, zero))
    return cache, cache
  cache = jax.lax.dynamic_update_slice(cache, new[None], (layer, zero, length, zero, zero))
  return cache, jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)


def write_nope(
  cache: LayerCache, k_BTKH: Float[Array, "B T K H"]
) -> tuple[Array, Float[Array, "B S K H"]]:
  """Puts T keys before RoPE at `length`; returns the cache's array and this layer's view."""
  return _write(cache.k_nope, k_BTKH, cache.layer, cache.length)


def view(
  cache: LayerCache, layer: Int[Array, ""] | None
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
  """Keys and values of a layer that has been written (`layer` None: not stacked)."""
  if layer is None:
    return cache.k, cache.v
  return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (cache.k, cache.v))


def write(
  cache: LayerCache, k_BTKH: Float[Array, "B T K H"], v_BTKV: Float[Array, "B T K V"]
) -> tuple[LayerCache, Float[Array, "B S K H"], Float[Array, "B S K V"]]:
  """Puts T new tokens at `length`; returns the view for the next layer and this layer's k, v."""
  k, k_BSKH = _write(cache.k, k_BTKH, cache.layer, cache.length)
  v, v_BSKV = _write(cache.v, v_BTKV, cache.layer, cache.length)
  layer = None if cache.layer is None else cache.layer + 1
  return cache.replace(k=k, v=v, layer=layer), k_BSKH, v_BSKV
