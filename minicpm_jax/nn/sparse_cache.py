"""Compressed keys beside a KV cache: windows are added as tokens complete them (section 13).

Counts follow from the length, so going back is free: entries beyond the count are never read and
are written anew. A level has one entry more than windows fit, so that a write never runs over.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.nn import kv, sparse_grid
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.sparse_topk import xla as topk_xla

LEVELS = {"fine": 1, "coarse": rules.COARSE}


def num_entries(cfg: SparseAttentionConfig, level: str, capacity: int) -> int:
  return capacity // (LEVELS[level] * cfg.kernel_stride) + 2


def extend(
  cache: kv.LayerCache,
  keys: Float[Array, "*L B S K H"],
  cfg: SparseAttentionConfig,
  grid: sparse_grid.Grid,
) -> tuple[dict[str, Array], tuple[Float[Array, "B F K H"], Float[Array, "B C K H"]]]:
  """Adds the windows that the new tokens complete.

  `cache` is the view before the write, `keys` the array of keys after it. Returns the new
  arrays of the cache by level and this layer's (fine, coarse) keys.
  """
  arrays, views = {}, []
  for level in LEVELS:
    new_BEKH, first_B = _new_windows(keys, cache.layer, cfg, grid, LEVELS[level])
    array, view = _write(getattr(cache, level), new_BEKH, cache.layer, first_B)
    arrays[level] = array
    views.append(view)
  return arrays, tuple(views)


def _new_windows(keys, layer, cfg: SparseAttentionConfig, grid: sparse_grid.Grid, level: int):
  """(every window that T new tokens may complete, number of complete ones before)."""
  size, stride = level * cfg.kernel_size, level * cfg.kernel_stride
  T, (B, S, K, H) = grid.start_BT.shape[1], keys.shape[-4:]
  bound = T // stride + 1
  first_B = jnp.maximum(0, (jnp.maximum(grid.offset_B, 0) - size) // stride + 1)
  base_B = 0 if grid.base_B is None else grid.base_B
  steps_R = jnp.arange((bound - 1) * stride + size, dtype=jnp.int32)
  slots_BR = jnp.minimum((base_B + stride * first_B)[:, None] + steps_R[None, :], S - 1)

  def means():
    k_BSKH = keys if layer is None else jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
    rows_BRKH = jax.vmap(lambda k_SKH, at_R: k_SKH[at_R])(k_BSKH, slots_BR)
    return topk_xla.compress(rows_BRKH, sparse_grid.rule_of(cfg), level)

  # Most decode steps complete no window. The branch also keeps XLA from fusing the write of the new
  # token into this small read, for which it would copy the whole cache.
  is_complete_B = grid.offset_B + T >= stride * first_B + size
  zeros = functools.partial(jnp.zeros, (B, bound, K, H), keys.dtype)
  new_BEKH = jax.lax.cond(jnp.any(is_complete_B), means, zeros)
  return new_BEKH, first_B


def _write(array, new_BEKH, layer, first_B):
  """Puts new_BEKH at entries first_B on of every row (in place: no transposes around a scatter)."""
  new_BEKH = new_BEKH.astype(array.dtype)
  B, E = new_BEKH.shape[:2]
  rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  entries_BE = first_B[:, None] + jnp.arange(E, dtype=jnp.int32)[None, :]
  if layer is None:
    array = array.at[rows_B1, entries_BE].set(new_BEKH, mode="drop", unique_indices=True)
    return array, array
  array = array.at[layer, rows_B1, entries_BE].set(new_BEKH, mode="drop", unique_indices=True)
  return array, jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
