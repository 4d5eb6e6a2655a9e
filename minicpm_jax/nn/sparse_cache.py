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
  keys: Float[Array, "*L rows S K H"],
  cfg: SparseAttentionConfig,
  grid: sparse_grid.Grid,
) -> tuple[dict[str, Array], tuple[Float[Array, "B F K H"], Float[Array, "B C K H"]]]:
  """Adds the windows that the new tokens complete.

  `cache` is the view before the write, `keys` the array of keys after it. Returns the new
  arrays of the cache by level and this layer's (fine, coarse) keys.
  """
  arrays, views = {}, []
  for level in LEVELS:
    new_BEKH, first_B = _new_windows(cache, keys, cfg, grid, LEVELS[level])
    arrays[level] = kv.write_at(cache, getattr(cache, level), new_BEKH, first_B)
    span = None if cache.span is None else num_entries(cfg, level, cache.span)
    views.append(kv.read(cache, arrays[level], span=span))
  return arrays, tuple(views)


def _new_windows(cache, keys, cfg: SparseAttentionConfig, grid: sparse_grid.Grid, level: int):
  """(every window that T new tokens may complete, number of complete ones before)."""
  size, stride = level * cfg.kernel_size, level * cfg.kernel_stride
  (B, T), (S, K, H) = grid.start_BT.shape, keys.shape[-3:]
  bound = T // stride + 1
  first_B = jnp.maximum(0, (jnp.maximum(grid.offset_B, 0) - size) // stride + 1)
  base_B = 0 if grid.base_B is None else grid.base_B
  steps_R = jnp.arange((bound - 1) * stride + size, dtype=jnp.int32)
  slots_BR = jnp.minimum((base_B + stride * first_B)[:, None] + steps_R[None, :], S - 1)

  def means():
    rows_BRKH = jax.vmap(lambda k_SKH, at_R: k_SKH[at_R])(kv.read(cache, keys), slots_BR)
    return topk_xla.compress(rows_BRKH, sparse_grid.rule_of(cfg), level)

  if jax.default_backend() == "gpu":  # a branch would wait for the host; incomplete: nobody reads
    return means(), first_B
  # Most decode steps complete no window. The branch also keeps XLA on CPU from fusing the write of
  # the new token into this small read, for which it would copy the whole cache.
  is_complete_B = grid.offset_B + T >= stride * first_B + size
  zeros = functools.partial(jnp.zeros, (B, bound, K, H), keys.dtype)
  new_BEKH = jax.lax.cond(jnp.any(is_complete_B), means, zeros)
  return new_BEKH, first_B
