"""Sampling against float64 numpy written from the definitions, and against the exact law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax import config
from minicpm_jax.core import rng
from minicpm_jax.infer import sampling


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31, 2**40 + 3, -(2**63), 2**63 - 1])
def test_keys_of_seeds_are_the_same_inside_jit(seed):
  """Requests send their seed as a number; jax.random's own eager functions are the reference."""
  named = jax.random.fold_in(jax.random.key(seed), rng.tag("sampling"))
  expected = jax.random.key_data(jax.random.fold_in(named, 0))
  found = jax.jit(lambda seed: rng.key(seed, "sampling"))(np.int64(seed))
  np.testing.assert_array_equal(jax.random.key_data(found), expected)


def keep_oracle(z_V, top_k, top_p, min_p):
  """inference.md section 4 for one row, in float64."""
  z_V = z_V.astype(np.float64)
  order = np.lexsort((np.arange(z_V.size), -z_V))  # falling z, rising id
  keep_V = np.ones(z_V.size, bool)
  if top_k > 0:
    keep_V &= z_V >= z_V[order[min(top_k, z_V.size) - 1]]
  p_V = np.where(keep_V, np.exp(z_V - z_V.max()), 0.0)
  p_V /= p_V.sum()
  if top_p < 1:
    before = 0.0
    for i in order:
      keep_V[i] &= before < top_p
      before += p_V[i]
  return keep_V & (p_V >= min_p * p_V.max())


def is_near_a_border(z_V, top_k, top_p):
  """True where float32 may decide top-p the other way."""
  z_V = np.sort(z_V.astype(np.float64))[::-1]
  if top_k > 0:
    z_V = z_V[z_V >= z_V[min(top_k, z_V.size) - 1]]
  until = np.cumsum(np.exp(z_V - z_V.max()))
  return top_p < 1 and np.min(np.abs(until / until[-1] - top_p)) < 1e-5


def state_of(top_k, top_p, min_p, temperature=1.0, seeds=(0,)):
  cfg = config.SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  return sampling.sampling_state(cfg, list(seeds))


def repeat(state, num_rows):
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rows,)), state)


draw = jax.jit(sampling.sample)
draw_seen = jax.jit(lambda z, state, at, seen: sampling.sample(z, state, at, lambda: seen))


FILTERS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (12, 0.7, 0.05)]


@pytest.mark.smoke
@pytest.mark.parametrize("num_candidates", [8, 64], ids=["fallback", "whole"])
@pytest.mark.parametrize("top_k, top_p, min_p", FILTERS)
def test_filters_equal_the_float64_oracle_on_random_rows(top_k, top_p, min_p, num_candidates):
  rng = np.random.default_rng(0)
  z_BV = (rng.normal(size=(200, 64)) * rng.uniform(0.2, 4, size=(200, 1))).astype(np.float32)
  z_BV[100:] = np.round(z_BV[100:] * 2) / 2  # many ties
  state = repeat(state_of(top_k, top_p, min_p), 200)
  keep = jax.jit(functools.partial(sampling.keep_mask, num_candidates=num_candidates))
  found_BV = np.asarray(keep(z_BV, state))
  compared = 0
  for z_V, found_V in zip(z_BV, found_BV, strict=True):
    if not is_near_a_border(z_V, top_k, top_p):
      np.testing.assert_array_equal(found_V, keep_oracle(z_V, top_k, top_p, min_p))
      compared += 1
  assert compared > 150


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  st.lists(st.integers(-12, 12), min_size=16, max_size=16),
  st.integers(0, 20),
  st.sampled_from([0.1, 0.3, 0.55, 0.9, 1.0]),
  st.sampled_from([0.0, 0.02, 0.3, 0.99, 1.0]),
)
def test_filters_with_ties(eighths, top_k, top_p, min_p):
  z_V = np.array(eighths, np.float32) / 8
  if is_near_a_border(z_V, top_k, top_p):
    return
  keep_V = _keep_small(z_V[None], state_of(top_k, top_p, min_p))[0]
  np.testing.assert_array_equal(np.asarray(keep_V), keep_oracle(z_V, top_k, top_p, min_p))
  assert keep_V[np.argmax(z_V)]


_keep_small = jax.jit(functools.partial(sampling.keep_mask, num_candidates=4))


def test_candidates_and_full_sort_cut_alike():
  """A long flat row needs the full sort; a peaked row must not change by it."""
  rng = np.random.default_rng(1)
  z_BV = np.stack([rng.normal(size=300) * 0.01, rng.normal(size=300) * 6]).astype(np.float32)
  state = state_of(0, 0.9, 0.0)
  for rows in ([0], [1], [0, 1]):
    found_BV = sampling.keep_mask(
      jnp.asarray(z_BV[rows]), repeat(state, len(rows)), num_candidates=16
    )
    for row, found_V in zip(rows, found_BV, strict=True):
      np.testing.assert_array_equal(found_V, keep_oracle(z_BV[row], 0, 0.9, 0.0))


@pytest.mark.smoke
def test_greedy_takes_the_lower_id_of_a_tie():
  logits_BV = jnp.array([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
  state = state_of(0, 1.0, 0.0, temperature=0.0, seeds=[0, 1])
  tokens_B = draw(logits_BV, state, jnp.array([4, 9]))
  np.testing.assert_array_equal(tokens_B, [1, 0])


def test_a_temperature_near_zero_is_greedy():
  """z / t - max(z / t) in one multiply-add is not 0 for the largest: NaN below 1e-8, once."""
  logits_BV = jnp.asarray(np.random.default_rng(4).normal(size=(8, 50)) * 5, jnp.float32)
  for temperature in (1e-5, 1e-9, 1e-20, 1.2e-38):
    for fields in (dict(top_k=0), dict(top_k=3), dict(top_k=0, top_p=0.9, min_p=0.1)):
      state = state_of(**{"top_p": 1.0, "min_p": 0.0} | fields, temperature=temperature, seeds=[1])
      tokens_B = draw(logits_BV, repeat(state, 8), jnp.arange(8))
      np.testing.assert_array_equal(tokens_B, np.argmax(logits_BV, axis=1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1e-40, 1e-38, 1e38])
def test_extreme_penalties_leave_finite_numbers_and_what_is_forbidden_forbidden(
  penalty, temperature
):
  cfg = config.SamplingConfig(temperature=temperature, repetition_penalty=penalty)
  state = repeat(sampling.sampling_state(cfg, [2]), 40)
  logits_BV = jnp.broadcast_to(jnp.array([-jnp.inf, -3.0, 0.5, -jnp.inf, 4.0]), (40, 5))
  seen_BV = jnp.broadcast_to(jnp.array([True, True, False, False, True]), (40, 5))
  found = draw_seen(logits_BV, state, jnp.arange(40), seen_BV)
  # A large one brings 4 down to 0, and -3 to nothing.
  likely = {4} if penalty < 1 else {2, 4} if temperature else {2}
  assert set(np.asarray(found).tolist()) == likely


def test_a_filter_that_leaves_one_token_always_draws_it():
  z_V = np.random.default_rng(2).normal(size=50).astype(np.float32)
  logits_BV = jnp.broadcast_to(z_V, (500, 50))
  state = repeat(state_of(1, 1.0, 0.0, seeds=[3]), 500)
  tokens_B = draw(logits_BV, state, jnp.arange(500))
  np.testing.assert_array_equal(tokens_B, np.full(500, z_V.argmax()))


@pytest.mark.smoke
def test_inverse_cdf_follows_the_definition():
  rng = np.random.default_rng(3)
  p_BV = rng.exponential(size=(400, 33)) * (rng.uniform(size=(400, 33)) < 0.5)
  p_BV[:, 7] += 0.1
  u_B = rng.uniform(size=400)
  found_B = np.asarray(sampling.inverse_cdf(jnp.float32(p_BV), jnp.float32(u_B)))
  for p_V, u, found in zip(p_BV, u_B, found_B, strict=True):
    cdf_V = np.cumsum(p_V)
    if np.min(np.abs(cdf_V - u * cdf_V[-1])) > 1e-5:
      assert found == np.flatnonzero(cdf_V > u * cdf_V[-1])[0]
    assert p_V[found] > 0


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24], ids=["zero", "just below one"])
def test_inverse_cdf_at_the_ends_never_takes_zero_mass(u):
  p_V = np.zeros(1000, np.float32)
  p_V[[100, 500, 900]] = [0.1, 0.7, 0.2]
  found = int(sampling.inverse_cdf(jnp.asarray(p_V)[None], jnp.array([u], jnp.float32))[0])
  assert found == (100 if u == 0 else 900)


@pytest.mark.parametrize("top_k, top_p, min_p", FILTERS)
def test_the_law_by_chi_square(top_k, top_p, min_p):
  """50k positions of one key against the exact filtered distribution; p-value > 1e-4."""
  from scipy import stats

  temperature, num_draws = 0.8, 50_000
  z_V = np.random.default_rng(4).normal(size=16).astype(np.float32) * 1.5
  keep_V = keep_oracle(z_V / temperature, top_k, top_p, min_p)
  p_V = np.where(keep_V, np.exp(z_V.astype(np.float64) / temperature), 0.0)
  p_V /= p_V.sum()
  state = state_of(top_k, top_p, min_p, temperature=temperature, seeds=[11])
  state = repeat(state, num_draws)
  logits_BV = jnp.broadcast_to(z_V, (num_draws, 16))
  tokens_B = np.asarray(draw(logits_BV, state, jnp.arange(num_draws)))
  counts_V = np.bincount(tokens_B, minlength=16)
  assert not counts_V[~keep_V].any()
  if keep_V.sum() > 1:
    assert stats.chisquare(counts_V[keep_V], num_draws * p_V[keep_V]).pvalue > 1e-4
  wrong_V = np.ones(16) / 16  # power: the flat law must fail
  assert stats.chisquare(counts_V, num_draws * wrong_V).pvalue < 1e-4


def test_noise_is_uniform_and_depends_on_key_and_position_only():
  from scipy import stats

  key_B = repeat(state_of(0, 1.0, 0.0, seeds=[5]), 2000).key_B
  u_B = np.asarray(sampling.uniforms(key_B, jnp.arange(2000)))
  assert stats.kstest(u_B, "uniform").pvalue > 1e-3
  alone = sampling.uniforms(key_B[:1], jnp.array([1234]))
  assert float(alone[0]) == u_B[1234]
  other = sampling.uniforms(state_of(0, 1.0, 0.0, seeds=[6]).key_B, jnp.array([1234]))
  assert float(other[0]) != u_B[1234]


def test_new_settings_do_not_compile_again():
  count = 0

  @jax.jit
  def counted(logits_BV, state, positions_B):
    nonlocal count
    count += 1  # runs while tracing only
    return sampling.sample(logits_BV, state, positions_B)

  logits_BV = jnp.zeros((1, 40))
  for i, (top_k, top_p, min_p) in enumerate(FILTERS):
    for temperature in (0.0, 0.7):
      state = state_of(top_k, top_p, min_p, temperature=temperature, seeds=[i])
      counted(logits_BV, state, jnp.array([i]))
  assert count == 1


def test_rows_of_one_batch_may_differ_in_every_setting():
  rng = np.random.default_rng(7)
  logits_BV = jnp.asarray(rng.normal(size=(4, 40)) * 2, jnp.float32)
  rows = [
    state_of(*f, temperature=t, seeds=[s])
    for f, t, s in zip(FILTERS[:4], (0.0, 0.5, 1.0, 1.5), range(4), strict=True)
  ]
  together = jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows)
  positions_B = jnp.array([3, 1, 4, 1])
  tokens_B = draw(logits_BV, together, positions_B)
  for b, row in enumerate(rows):
    alone = draw(logits_BV[b : b + 1], row, positions_B[b : b + 1])
    assert int(alone[0]) == int(tokens_B[b])


@pytest.mark.smoke
def test_logprobs_are_the_log_softmax_of_the_raw_logits():
  z_BV = np.random.default_rng(8).normal(size=(5, 30)) * 4
  tokens_B = np.array([0, 29, 7, 7, 12])
  expected_B = z_BV - np.log(np.exp(z_BV).sum(-1, keepdims=True))
  found_B = sampling.logprobs(jnp.float32(z_BV), jnp.asarray(tokens_B))
  np.testing.assert_allclose(found_B, expected_B[np.arange(5), tokens_B], atol=1e-5)
