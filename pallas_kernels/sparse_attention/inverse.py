"""Inverse block lists: for every key block, who listed it (infllm_v2.md 19.2, K4).

What the backward passes of the GPU backends share. The entries of one block are cut into runs of at
most so many, one program each; their shares are added in order, so that results do not depend on
timing.
"""

import functools

import jax
import jax.numpy as jnp


def sort_by_block(block_BKE, item_BKE, *payload_BKE, num_blocks: int, num_items: int):
  """(block, item, *payload) [B, K, E] int32 by block, then item; block `num_blocks` = no entry."""
  (B, K, E), per_row = block_BKE.shape, (num_blocks + 1) * num_items
  if per_row >= 2**31:
    return tuple(jax.lax.sort((block_BKE, item_BKE, *payload_BKE), num_keys=2))
  # Block and item in one integer: without payload a sort of one array.
  key_BKE = block_BKE * num_items + item_BKE
  if jax.default_backend() == "gpu" and B * K * per_row < 2**31:
    # The row in it too: CUDA's radix sort is for one long array of keys. No two entries that count
    # are equal.
    key_BKE += (per_row * jnp.arange(B * K, dtype=jnp.int32)).reshape(B, K, 1)
    flat = [x.reshape(-1) for x in (key_BKE, *payload_BKE)]
    key_BKE, *payload_BKE = jax.lax.sort(flat, num_keys=1, is_stable=False)
    key_BKE, *payload_BKE = (x.reshape(B, K, E) for x in (key_BKE, *payload_BKE))
    key_BKE %= per_row
  else:
    key_BKE, *payload_BKE = jax.lax.sort((key_BKE, *payload_BKE), num_keys=1)
  return (key_BKE // num_items, key_BKE % num_items, *payload_BKE)


def runs(block_BKE, num_blocks: int, size: int):
  """(first run of each block [B, K, M + 1]; block, begin and end [B, K, R] of each run).

  block_BKE ascends; R = M + E / size; block -1 = no run. Entries begin <= e < end are the run's.
  """
  M, E = num_blocks, block_BKE.shape[-1]
  # One kernel where each step of a loop would be several.
  method = "scan_unrolled" if jax.default_backend() == "gpu" else "scan"
  edges = jnp.arange(M + 1, dtype=jnp.int32)
  find = functools.partial(jnp.searchsorted, side="left", method=method)
  bounds = jax.vmap(jax.vmap(lambda row: find(row, edges)))(block_BKE).astype(jnp.int32)
  lengths_BKM = bounds[..., 1:] - bounds[..., :-1]
  ends_BKM = jnp.cumsum(-(-lengths_BKM // size), axis=-1, dtype=jnp.int32)
  first_run = jnp.pad(ends_BKM, ((0, 0), (0, 0), (1, 0)))
  run_R = jnp.arange(M + E // size, dtype=jnp.int32)
  find = functools.partial(jnp.searchsorted, side="right", method=method)
  own_BKR = jax.vmap(jax.vmap(lambda row: find(row, run_R)))(ends_BKM).astype(jnp.int32)
  is_run = own_BKR < M
  own_BKR = jnp.minimum(own_BKR, M - 1)

  def of_block(x_BKM):
    return jnp.take_along_axis(x_BKM, own_BKR, axis=-1)

  begin_BKR = (
    of_block(bounds[..., :-1]) + (run_R[None, None] - of_block(first_run[..., :-1])) * size
  )
  end_BKR = jnp.minimum(begin_BKR + size, of_block(bounds[..., 1:]))
  return first_run, jnp.where(is_run, own_BKR, -1), begin_BKR, end_BKR
