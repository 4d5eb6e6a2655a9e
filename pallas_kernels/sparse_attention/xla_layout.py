"""Which (query, block) pairs make one matmul of `xla` and `xla_backward`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["token_IP", "filled_I", "block_I", "num_tiles"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Layout:
  """Pairs of one chunk in tiles of one block each.

  token_IP: query of each place, of which the first filled_I are taken; block_I: block of each tile;
  num_tiles: tiles in use.
  """

  token_IP: jax.Array
  filled_I: jax.Array
  block_I: jax.Array
  num_tiles: jax.Array


def layout(ids_CW, is_pair_CW, num_blocks: int, tile: int) -> Layout:
  """Sorts the pairs by (block, query), pads blocks to whole tiles, sorts these by first query.

  So tiles that follow one another touch about the same queries, which stay in the cache.
  """
  C, W = ids_CW.shape
  P = tile
  max_tiles = C * W // P + min(num_blocks, C * W)
  last = jnp.int32(num_blocks * C)
  key_CW = jnp.where(is_pair_CW, ids_CW * C + jnp.arange(C, dtype=jnp.int32)[:, None], last)
  key_R = jnp.sort(jnp.reshape(key_CW, (-1,)))
  bounds = jnp.searchsorted(key_R, C * jnp.arange(num_blocks + 1, dtype=jnp.int32))
  bounds = bounds.astype(jnp.int32)
  first_M, sizes_M = bounds[:-1], bounds[1:] - bounds[:-1]
  tiles_M = -(-sizes_M // P)
  ends_M = jnp.cumsum(tiles_M)
  tile_I = jnp.arange(max_tiles, dtype=jnp.int32)
  block_I = jnp.searchsorted(ends_M, tile_I, side="right").astype(jnp.int32)
  block_I = jnp.minimum(block_I, num_blocks - 1)
  done_I = P * (tile_I - (ends_M - tiles_M)[block_I])  # pairs of the block in earlier tiles
  pair_IP = (first_M[block_I] + done_I)[:, None] + jnp.arange(P, dtype=jnp.int32)[None, :]
  token_IP = key_R[jnp.clip(pair_IP, 0, C * W - 1)] % C
  filled_I = jnp.clip(sizes_M[block_I] - done_I, 0, P)
  order_I = jnp.argsort(jnp.where(filled_I > 0, token_IP[:, 0], C))
  return Layout(token_IP[order_I], filled_I[order_I], block_I[order_I], num_tiles=ends_M[-1])
