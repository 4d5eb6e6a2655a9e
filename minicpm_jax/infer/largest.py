"""The k largest logits of a vocabulary, exactly as `jax.lax.top_k` gives them, on every device
(of rows with several NaN other ones may be named).

XLA's kernel for GPUs gives a whole row to one multiprocessor: a draft level's 10 rows of 73,448
logits keep 10 of 132 busy. `by_chunks` reads them with all, and searches what is left.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 128


def top_k(x_NV: Float[Array, "N V"], k: int) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """(values, int32 indices), largest first, ties by the lower index."""

  def whole(x_NV):
    return tuple(jax.lax.top_k(x_NV, k))

  if x_NV.shape[1] < 2 * k * CHUNK:
    return whole(x_NV)
  return jax.lax.platform_dependent(
    x_NV, cuda=functools.partial(by_chunks, k=k, chunk=CHUNK), default=whole
  )


def by_chunks(
  x_NV: Float[Array, "N V"], k: int, chunk: int
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """`jax.lax.top_k` of what the k chunks with the largest maxima hold; needs at least k chunks.

  No other chunk has a part: of k chunks with larger maxima, or with the same ones earlier, each
  holds an element that comes first.
  """
  N, V = x_NV.shape
  C = -(-V // chunk)
  if C < k:
    raise ValueError(f"by_chunks: found {C} chunks of {chunk}, expected at least k = {k}")
  padded_NW = jnp.pad(x_NV, ((0, 0), (0, C * chunk - V)), constant_values=-jnp.inf)
  maxima_NC = jnp.max(jnp.reshape(padded_NW, (N, C, chunk)), axis=2)
  # The barrier keeps XLA's top-k: merged into what follows it becomes a sort of whole rows.
  _, chunks_NK = jax.lax.optimization_barrier(jax.lax.top_k(maxima_NC, k))
  chunks_NK = jnp.sort(chunks_NK, axis=1)  # so that places rise with ids
  ids_NKc = chunks_NK[:, :, None] * chunk + jnp.arange(chunk, dtype=jnp.int32)[None, None, :]
  ids_NE = jnp.reshape(ids_NKc, (N, k * chunk)).astype(jnp.int32)
  held_NE = jnp.take_along_axis(x_NV, jnp.minimum(ids_NE, V - 1), axis=1)
  held_NE = jnp.where(ids_NE < V, held_NE, -jnp.inf)
  best_NK, at_NK = jax.lax.optimization_barrier(jax.lax.top_k(held_NE, k))
  return best_NK, jnp.take_along_axis(ids_NE, at_NK, axis=1)
