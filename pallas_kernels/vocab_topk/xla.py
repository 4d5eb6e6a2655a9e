"""The k largest logits of a vocabulary in XLA.

XLA's kernel for GPUs gives a whole row to one multiprocessor: a draft level's 10 rows of 73,448
logits keep 10 of 132 busy, and its search of 1,280 candidates takes 62 us (H200). `by_chunks` reads
the logits with all multiprocessors and sorts what is left, twice; a sort of up to 1,024 numbers a
row takes 9 us.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LEAST = 8  # times as many logits as candidates
FEW = 256  # numbers of a row that are compared each with each


def top_k_xla(x_NV: Float[Array, "N V"], k: int) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """As `api.top_k`."""

  def whole(x_NV):
    return tuple(jax.lax.top_k(x_NV, k))

  if k < 1 or x_NV.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):  # `_order` has 32 bits
    return whole(x_NV)
  chunk = chunk_of(x_NV.shape[1], k)
  if x_NV.shape[1] <= FEW:
    on_cuda = functools.partial(by_rank, k=k)
  elif x_NV.shape[1] >= LEAST * k * chunk:
    on_cuda = functools.partial(by_chunks, k=k, chunk=chunk)
  else:
    return whole(x_NV)
  return jax.lax.platform_dependent(x_NV, cuda=on_cuda, default=whole)


def chunk_of(vocab_size: int, k: int) -> int:
  """About as many chunks as there are numbers in k of them, in whole warps."""
  return 32 * max(1, round(math.sqrt(vocab_size / k) / 32))


def by_rank(x_NV: Float[Array, "N V"], k: int) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """`jax.lax.top_k` of short rows: a number's place is how many come before it. A sort of 100
  takes a GPU twice as long as these two sums."""
  V = x_NV.shape[1]
  order_NV, id_V = _order(x_NV), jnp.arange(V, dtype=jnp.int32)
  mine_NV1, other_N1V = order_NV[:, :, None], order_NV[:, None, :]
  is_before = (other_N1V > mine_NV1) | (
    (other_N1V == mine_NV1) & (id_V[None, None, :] < id_V[None, :, None])
  )
  rank_NV = jax.lax.optimization_barrier(jnp.sum(is_before, axis=2, dtype=jnp.int32))
  is_at_NkV = rank_NV[:, None, :] == jnp.arange(k, dtype=jnp.int32)[None, :, None]
  best_NK = jnp.sum(jnp.where(is_at_NkV, order_NV[:, None, :], 0), axis=2)
  values_NK = jax.lax.bitcast_convert_type(_flipped(best_NK), jnp.float32)
  ids_NK = jnp.sum(jnp.where(is_at_NkV, id_V[None, None, :], 0), axis=2)
  return values_NK.astype(x_NV.dtype), ids_NK


def maxima(x_NV: Float[Array, "N V"], chunk: int) -> Int[Array, "N C"]:
  """Of every chunk, the last of which may be shorter, as integers: a maximum of floats may take -0
  for 0 and any NaN for another."""
  order_NV = _order(x_NV)
  rest = ((0, 0), (0, -x_NV.shape[1] % chunk))
  padded_NW = jnp.pad(order_NV, rest, constant_values=np.iinfo(np.int32).min)
  return jnp.max(jnp.reshape(padded_NW, (-1, padded_NW.shape[1] // chunk, chunk)), axis=2)


def by_chunks(
  x_NV: Float[Array, "N V"], k: int, chunk: int
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """`jax.lax.top_k` of what the k chunks with the largest maxima hold; needs at least k chunks.

  No other chunk has a part: of k chunks with larger maxima, or with the same ones earlier, each
  holds an element that comes first.
  """
  V = x_NV.shape[1]
  C = -(-V // chunk)
  if C < k:
    raise ValueError(f"by_chunks: found {C} chunks of {chunk}, expected at least k = {k}")
  falling_NV = ~_order(x_NV)  # the largest first in a sort that rises
  best_NC = ~maxima(x_NV, chunk)
  every_NC = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32), best_NC.shape)
  _, chunks_NK = _first(best_NC, every_NC, k)
  ids_NKc = chunks_NK[:, :, None] * chunk + jnp.arange(chunk, dtype=jnp.int32)[None, None, :]
  ids_NE = jnp.reshape(ids_NKc, (-1, k * chunk))
  held_NE = jnp.take_along_axis(falling_NV, jnp.minimum(ids_NE, V - 1), axis=1)
  held_NE = jnp.where(ids_NE < V, held_NE, np.iinfo(np.int32).max)
  best_NK, ids_NK = _first(held_NE, ids_NE, k)
  values_NK = jax.lax.bitcast_convert_type(_flipped(~best_NK), jnp.float32)
  return values_NK.astype(x_NV.dtype), ids_NK


def _first(falling_NE: Int[Array, "N E"], ids_NE: Int[Array, "N E"], k: int):
  """The k smallest with their ids, equal ones by id: a sort, which `jax.lax.top_k` is not."""
  return tuple(x[:, :k] for x in jax.lax.sort((falling_NE, ids_NE), dimension=1, num_keys=2))


def _order(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
  """int32 in the order of the floats, as `jax.lax.top_k` has it (-0 below 0)."""
  return _flipped(jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32))


def _flipped(bits: Int[Array, "*n"]) -> Int[Array, "*n"]:
  return jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)
