"""Sampling from logits: penalty, temperature, top-k, top-p, min-p, with position-coupled noise.

Filters run in the order of the Hugging Face logits processors; a constraint's mask comes first. All
settings are data, one value a row, so changing them compiles nothing. The token at absolute
position t is the inverse CDF of the filtered distribution at u_t = uniform(fold_in(key, t)): a
function of (prefix, key) alone, whatever the batch, the padding or the number of tokens decoded
together.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from minicpm_jax import config
from minicpm_jax.core import rng

NUM_CANDIDATES = 1024  # top-k and top-p look at these many logits before they sort all of them
_MIN_TEMPERATURE = 1e-30  # so that quotients stay finite: of unequal logits one is left here anyway


@flax.struct.dataclass
class SamplingState:
  """`SamplingConfig` as arrays, one entry a row; temperature 0 is greedy."""

  key_B: Any  # typed keys
  temperature_B: Any  # float32
  top_k_B: Any  # int32, 0 = off
  top_p_B: Any  # float32
  min_p_B: Any  # float32
  penalty_B: Any  # float32, 1 = off

  def rows(self, num: int) -> "SamplingState":
    """Every row `num` times, for as many tree nodes."""
    at = jnp.repeat(jnp.arange(self.temperature_B.shape[0]), num)
    return jax.tree.map(lambda x: x[at], self)


def sampling_state(cfg: config.SamplingConfig, seeds: list[int]) -> SamplingState:
  """One row for each seed. Rows with one seed and one prompt draw the same tokens."""

  def full(value, dtype):
    return jnp.full((len(seeds),), value, dtype)

  return SamplingState(
    key_B=jnp.stack([rng.key(seed, "sampling") for seed in seeds]),
    temperature_B=full(cfg.temperature, jnp.float32),
    top_k_B=full(cfg.top_k, jnp.int32),
    top_p_B=full(cfg.top_p, jnp.float32),
    min_p_B=full(cfg.min_p, jnp.float32),
    penalty_B=full(cfg.repetition_penalty, jnp.float32),
  )


def _sorted_cut(z_BV, mass_BV, state: SamplingState, num_candidates: int):
  """Top-k and top-p as a cut in the order (falling logit, rising id), from the largest logits.

  Returns (value_B, id_B, is_exact_B): keep z > value, and z == value up to that id. `is_exact_B`
  is False where the cut lies beyond the candidates.
  """
  V = z_BV.shape[-1]
  # Equal values: lower id first. The barrier keeps XLA's top-k: a slice of its result merged into
  # it would turn it into a sort of the whole row (20 times slower on CPU).
  values_BC, ids_BC = jax.lax.optimization_barrier(jax.lax.top_k(z_BV, num_candidates))
  # top-k: all z >= the k-th largest, ties included.
  has_k_B = state.top_k_B > 0
  k_B = jnp.where(has_k_B, jnp.minimum(state.top_k_B, V), V)
  kth_B = jnp.take_along_axis(values_BC, jnp.minimum(k_B, num_candidates)[:, None] - 1, axis=1)
  kth_B = jnp.where(has_k_B, kth_B[:, 0], -jnp.inf)
  in_k_BV, in_k_BC = z_BV >= kth_B[:, None], values_BC >= kth_B[:, None]
  k_exact_B = jnp.logical_not(has_k_B) | (k_B <= num_candidates)
  # top-p of what is left: tokens whose mass before them is below p.
  mass_BC = jnp.where(in_k_BC, jnp.take_along_axis(mass_BV, ids_BC, axis=1), 0.0)
  until_BC = jnp.cumsum(mass_BC, axis=1)
  limit_B = state.top_p_B * jnp.sum(jnp.where(in_k_BV, mass_BV, 0.0), axis=1)
  keep_BC = in_k_BC & ((until_BC - mass_BC < limit_B[:, None]) | (state.top_p_B >= 1)[:, None])
  num_kept_B = jnp.maximum(jnp.sum(keep_BC, axis=1), 1)
  p_exact_B = (until_BC[:, -1] >= limit_B) | (jnp.sum(in_k_BV, axis=1) <= num_candidates)
  last_B = num_kept_B[:, None] - 1
  value_B = jnp.take_along_axis(values_BC, last_B, axis=1)[:, 0]
  id_B = jnp.take_along_axis(ids_BC, last_B, axis=1)[:, 0]
  # Without top-p the cut is the k-th value itself, with all its ties.
  no_p_B = state.top_p_B >= 1
  value_B = jnp.where(no_p_B, kth_B, value_B)
  id_B = jnp.where(no_p_B, V, id_B)
  return value_B, id_B, k_exact_B & (no_p_B | p_exact_B)


def keep_mask(
  z_BV: Float[Array, "B V"], state: SamplingState, *, num_candidates: int = NUM_CANDIDATES
) -> Bool[Array, "B V"]:
  """Tokens left by top-k, top-p and min-p on logits that the temperature has already divided.

  top-k keeps z >= the k-th largest (ties kept), top-p the tokens whose mass before them (falling
  z, ties by rising id) is below p, min-p those with p_i >= min_p * max p. The largest always stays.
  """
  return _keep(z_BV, _masses(z_BV), state, num_candidates)


def _masses(logits_BV, temperature_B1=1.0):
  """exp(z / t) up to a factor, 1 for the largest.

  The difference comes before the quotient: the other way round XLA makes one multiply-add of both,
  in which the largest is not 0 but its rounding error, below t = 1e-8 hundreds and more.
  """
  below_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
  return jnp.exp(below_BV / temperature_B1)


def _keep(z_BV, mass_BV, state: SamplingState, num_candidates: int = NUM_CANDIDATES):
  B, V = z_BV.shape
  z_BV = jnp.where(z_BV == 0, 0.0, z_BV)  # top_k orders -0.0 below 0.0; here they are a tie

  def without_sort():
    return jnp.full((B,), -jnp.inf, z_BV.dtype), jnp.full((B,), V, jnp.int32)

  def with_sort():
    value_B, id_B, is_exact_B = _sorted_cut(z_BV, mass_BV, state, min(num_candidates, V))
    if num_candidates >= V:
      return value_B, id_B
    return jax.lax.cond(
      jnp.all(is_exact_B),
      lambda: (value_B, id_B),
      lambda: _sorted_cut(z_BV, mass_BV, state, V)[:2],
    )

  needs_sort = jnp.any((state.top_k_B > 0) | (state.top_p_B < 1))
  value_B, id_B = jax.lax.cond(needs_sort, with_sort, without_sort)
  is_tie_BV = (z_BV == value_B[:, None]) & (jnp.arange(V)[None, :] <= id_B[:, None])
  return ((z_BV > value_B[:, None]) | is_tie_BV) & (mass_BV >= state.min_p_B[:, None])


def uniforms(key_B: Key[Array, " B"], positions_B: Int[Array, " B"]) -> Float[Array, " B"]:
  """u_t of each row: one number in [0, 1) for each (key, absolute position)."""
  fold = jax.vmap(jax.random.fold_in)
  return jax.vmap(jax.random.uniform)(fold(key_B, positions_B))


def inverse_cdf(p_BV: Float[Array, "B V"], u_B: Float[Array, " B"]) -> Int[Array, " B"]:
  """Smallest id with cumsum(p)[id] > u * sum(p); p need not be normalised, p = 0 is never taken."""
  cdf_BV = jnp.cumsum(p_BV, axis=1)
  # A parallel cumsum may wobble by an ulp where p is 0, hence the second condition.
  hit_BV = (cdf_BV > (u_B * cdf_BV[:, -1])[:, None]) & (p_BV > 0)
  ids_B = jnp.where(jnp.any(hit_BV, axis=1), jnp.argmax(hit_BV, axis=1), jnp.argmax(p_BV, axis=1))
  return ids_B.astype(jnp.int32)


def penalise(
  logits_BV: Float[Array, "B V"], penalty_B: Float[Array, " B"], seen_BV: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
  """z / r where z > 0, else z * r, for the tokens that have been seen (CTRL, arXiv 1909.05858)."""
  r_B1 = jnp.clip(penalty_B, 1e-30, 1e30)[:, None]  # keeps products finite, -inf times r no NaN
  punished_BV = jnp.where(logits_BV > 0, logits_BV / r_B1, logits_BV * r_B1)
  return jnp.where(seen_BV, punished_BV, logits_BV)


def _kept_masses(logits_BV, state: SamplingState):
  """What rows with a temperature draw from, not normalised."""
  t_B1 = jnp.where(state.temperature_B == 0, 1.0, state.temperature_B)[:, None]
  t_B1 = jnp.maximum(t_B1, _MIN_TEMPERATURE)
  mass_BV = _masses(logits_BV, t_B1)
  return jnp.where(_keep(logits_BV / t_B1, mass_BV, state), mass_BV, 0.0)


def distribution(logits_BV: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
  """The filtered probabilities that `sample` draws from (one-hot where greedy), without penalty."""
  logits_BV = logits_BV.astype(jnp.float32)
  is_greedy_B = state.temperature_B == 0
  p_BV = _kept_masses(logits_BV, state)
  greedy_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=1), logits_BV.shape[1])
  p_BV = jnp.where(is_greedy_B[:, None], greedy_BV, p_BV)
  return p_BV / jnp.sum(p_BV, axis=1, keepdims=True)


def sample(
  logits_BV: Float[Array, "B V"],
  state: SamplingState,
  positions_B: Int[Array, " B"],
  seen: Callable[[], Bool[Array, "B V"]] | None = None,
) -> Int[Array, " B"]:
  """The token at absolute position `positions_B` of each row; greedy ties go to the lower id.

  `seen` gives the tokens of each row's context; it is evaluated only where a row has a penalty.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if seen is not None:
    logits_BV = jax.lax.cond(
      jnp.any(state.penalty_B != 1),
      lambda: penalise(logits_BV, state.penalty_B, seen()),
      lambda: logits_BV,
    )
  greedy_B = jnp.argmax(logits_BV, axis=1)
  is_greedy_B = state.temperature_B == 0

  def draw():
    drawn_B = inverse_cdf(_kept_masses(logits_BV, state), uniforms(state.key_B, positions_B))
    return jnp.where(is_greedy_B, greedy_B, drawn_B)

  tokens_B = jax.lax.cond(jnp.all(is_greedy_B), lambda: greedy_B, draw)
  return tokens_B.astype(jnp.int32)


def logprobs(logits_BV: Float[Array, "B V"], tokens_B: Int[Array, " B"]) -> Float[Array, " B"]:
  """log softmax(logits)[token]: the model's own, before temperature and filters."""
  logits_BV = logits_BV.astype(jnp.float32)
  chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
  return chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
