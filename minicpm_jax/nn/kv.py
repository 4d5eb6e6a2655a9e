"""One layer's view of the key/value cache: written in place, read whole or up to `span`."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class LayerCache:
  """Keys and values of one layer, or of all layers with the number of the one at work.

  Under the scan over layers the stacked arrays travel in the carry and each layer writes its T
  new slots, so a decode step copies no cache. With `row` a forward works on `num_rows` rows from
  that one on, of a cache with more rows.
  """

  k: Float[Array, "*L B S K H"]
  v: Float[Array, "*L B S K V"]
  length: Int[Array, "*B"]  # slots in use before this forward; one number, or one a row
  layer: Int[Array, ""] | None = None  # set when k and v are stacked
  k_nope: Float[Array, "*L B S K H"] | None = None  # keys before RoPE (sparse.use_nope)
  fine: Float[Array, "*L B F K H"] | None = None  # compressed keys, see nn/sparse_cache.py
  coarse: Float[Array, "*L B C K H"] | None = None
  row: Int[Array, ""] | None = None
  num_rows: int = flax.struct.field(pytree_node=False, default=1)
  span: int | None = flax.struct.field(pytree_node=False, default=None)  # slots read; None = all


def write_at(cache: LayerCache, array: Array, new_BEKH: Array, first: Array) -> Array:
  """`array` with new_BEKH at entries first.. of this layer and of every row (or those of `row`).

  `first` is a scalar or one start a row. One row is a slice update; rows that start apart are one
  scatter. Entries beyond the end are dropped by the scatter (a slice update would move: callers
  keep room for all).
  """
  new = new_BEKH.astype(array.dtype)
  zero = jnp.zeros((), jnp.int32)
  rows = array.shape[-4]
  if first.ndim and new.shape[0] == 1:
    first = first[0]
  if first.ndim == 0 and (cache.row is not None or rows == new.shape[0]):
    row = zero if cache.row is None else cache.row
    if cache.layer is None:
      return jax.lax.dynamic_update_slice(array, new, (row, first, zero, zero))
    return jax.lax.dynamic_update_slice(array, new[None], (cache.layer, row, first, zero, zero))
  at_B1 = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
  at_B1 = at_B1 if cache.row is None else at_B1 + cache.row
  at_BE = first[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None, :]
  at = (at_B1, at_BE) if cache.layer is None else (cache.layer, at_B1, at_BE)
  return array.at[at].set(new, mode="drop", unique_indices=True)


def read(cache: LayerCache, array: Array, *, span: int | None = None) -> Array:
  """This layer's entries [B, S, K, H] of `array`, those of `cache.row`.., up to `span`."""
  starts, sizes = [0] * 4, list(array.shape[-4:])
  if cache.row is not None:
    starts[0], sizes[0] = cache.row, cache.num_rows
  if span is not None:
    sizes[1] = min(span, sizes[1])
  if cache.layer is not None:
    cut = jax.lax.dynamic_slice(array, (cache.layer, *starts), (1, *sizes))
    return jnp.reshape(cut, sizes)
  return array if sizes == list(array.shape) else jax.lax.dynamic_slice(array, starts, sizes)


def write_nope(
  cache: LayerCache, k_BTKH: Float[Array, "B T K H"]
) -> tuple[Array, Float[Array, "B S K H"]]:
  """Puts T keys before RoPE at `length`; returns the cache's array and this layer's view."""
  array = write_at(cache, cache.k_nope, k_BTKH, cache.length)
  return array, read(cache, array, span=cache.span)


def view(
  cache: LayerCache, layer: Int[Array, ""] | None
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
  """Keys and values of a layer that has been written (`layer` None: not stacked)."""
  cache = cache.replace(layer=layer)
  return read(cache, cache.k, span=cache.span), read(cache, cache.v, span=cache.span)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _put_in_place(put: Callable, arrays: tuple, new: tuple, length: Array) -> tuple:
  """put(arrays, new), linear in both; on CPUs as one turn of a loop.

  XLA on CPU would fuse the bare write into those who read the whole array, and so copy the cache
  in every layer of every step (4 times the time of a step behind 4k tokens). A GPU's loop would
  ask the host in every layer whether to go on.
  """

  def turn(arrays, new, length):
    body = lambda carry: (carry[0] != carry[0], put(carry[1], new))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0], body, (jnp.max(length) >= 0, arrays))[1]

  bare = lambda arrays, new, _: put(arrays, new)  # noqa: E731
  return jax.lax.platform_dependent(arrays, new, length, cpu=turn, default=bare)


@_put_in_place.defjvp
def _put_in_place_jvp(put, primals, tangents):
  return _put_in_place(put, *primals), put(*tangents[:2])


def write(
  cache: LayerCache, k_BTKH: Float[Array, "B T K H"], v_BTKV: Float[Array, "B T K V"]
) -> tuple[LayerCache, Float[Array, "B S K H"], Float[Array, "B S K V"]]:
  """Puts T new tokens at `length`; returns the view for the next layer and this layer's k, v."""

  def put(arrays: tuple, new: tuple) -> tuple:
    return tuple(write_at(cache, x, y, cache.length) for x, y in zip(arrays, new, strict=True))

  is_read_whole = cache.layer is None and read(cache, cache.k, span=cache.span) is cache.k
  args = ((cache.k, cache.v), (k_BTKH, v_BTKV))
  k, v = _put_in_place(put, *args, cache.length) if is_read_whole else put(*args)
  written = cache.replace(k=k, v=v)
  k_BSKH, v_BSKV = view(written, cache.layer)
  layer = None if cache.layer is None else cache.layer + 1
  return written.replace(layer=layer), k_BSKH, v_BSKV
