"""Classic speculative sampling: the law of the rules by enumeration, of the whole by chi-square."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from minicpm_jax import config
from minicpm_jax.infer import chain, generate
from minicpm_jax.infer import engine as engine_lib
from tests.infer import small

V = 5


def laws(rng, *shape):
  """Random distributions, some with zeros."""
  x = rng.dirichlet(np.full(shape[-1], 0.7), shape[:-1])
  x = np.where(x < 0.05, 0.0, x)
  return x / x.sum(-1, keepdims=True)


def is_accepted(p_V, q_V, x, r):
  num, _ = chain.verify_chain(
    jnp.asarray([[x]]),
    jnp.asarray(q_V[None, None], jnp.float32),
    jnp.asarray(np.stack((p_V, p_V))[None], jnp.float32),
    jnp.asarray([[r]], jnp.float32),
    jnp.zeros((1, 2), jnp.float32),
  )
  return int(num[0]) == 2


@pytest.mark.parametrize("seed", range(4))
def test_one_position_has_the_target_law(seed):
  """P1: q(a) min(1, p(a)/q(a)) + (1 - sum_b min(p, q)) res(a) = p(a), from what the code does."""
  rng = np.random.default_rng(seed)
  p, q = laws(rng, V), laws(rng, V)
  accept = np.zeros(V)
  for x in np.flatnonzero(q):
    accept[x] = min(1.0, p[x] / q[x])
    if accept[x] > 0.01:
      assert is_accepted(p, q, x, accept[x] - 1e-3)
    if accept[x] < 0.99:
      assert not is_accepted(p, q, x, accept[x] + 1e-3)
  rest = np.asarray(chain.residual(jnp.asarray(p[None]), jnp.asarray(q[None])))[0]
  rejected = 1 - (q * accept).sum()
  np.testing.assert_allclose(q * accept + rejected * rest, p, atol=1e-6)
  np.testing.assert_allclose(rejected, 1 - np.minimum(p, q).sum(), atol=1e-6)  # P2


def test_equal_laws_accept_all_and_a_residual_without_mass_is_the_target():
  p = jnp.asarray([[0.5, 0.25, 0.25]])
  np.testing.assert_array_equal(chain.residual(p, p), p)


def grid(num):
  return (np.arange(num) + 0.5) / num


def test_siblings_have_the_target_law_by_enumeration():
  """All candidate sets; the uniforms run over a midpoint grid (thus the tolerance)."""
  p = np.array([4, 0, 2, 2]) / 8
  q = np.array([2, 4, 1, 1]) / 8
  for rule in ("iid", "without_replacement", "deterministic"):
    law = np.zeros(4)
    for pair in itertools.product(range(4), repeat=2):
      if rule == "iid":
        weight = q[pair[0]] * q[pair[1]]
      elif pair[0] == pair[1]:
        continue
      elif rule == "without_replacement":
        weight = q[pair[0]] * q[pair[1]] / (1 - q[pair[0]])
      else:
        weight = float(pair == (1, 2))  # one set, as a draft's top-k would give
      if weight:
        law += weight * emitted_law(pair, q, p, rule)
    np.testing.assert_allclose(law, p, atol=7e-3, err_msg=rule)


def emitted_law(pair, q, p, rule):
  r0, r1, u = (x.ravel() for x in np.meshgrid(grid(24), grid(24), grid(42), indexing="ij"))
  size = len(r0)
  _, token = jax.jit(chain.verify_siblings, static_argnames="rule")(
    jnp.broadcast_to(jnp.asarray(pair), (size, 2)),
    jnp.broadcast_to(jnp.asarray(q, jnp.float32), (size, 4)),
    jnp.broadcast_to(jnp.asarray(p, jnp.float32), (size, 4)),
    jnp.asarray(np.stack((r0, r1), 1), jnp.float32),
    jnp.asarray(u, jnp.float32),
    rule=rule,
  )
  return np.bincount(np.asarray(token), minlength=4) / size


# --- P4: chi-square on a toy whose laws depend on the token before --------------------------------

TOY, SAMPLES, LENGTH = 16, 50_000, 3


def toy():
  rng = np.random.default_rng(3)
  p = rng.dirichlet(np.full(TOY, 0.6), TOY) * 0.9 + 0.1 / TOY
  q = rng.dirichlet(np.full(TOY, 0.6), TOY) * 0.5 + p * 0.5
  return jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)


def first_two(p_VV, q_VV, key, verify):
  """The first two tokens after token 0 of many runs; one more round where the first gave one."""

  def one_round(key, root_B):
    keys = jax.random.split(key, LENGTH + 2)
    token_B, drafted, laws = root_B, [], []
    for i in range(LENGTH):
      laws.append(q_VV[token_B])
      token_B = jax.random.categorical(keys[i], jnp.log(laws[-1]))
      drafted.append(token_B)
    drafted_BL = jnp.stack(drafted, 1)
    fed_BA = jnp.concatenate((root_B[:, None], drafted_BL), axis=1)
    r = jax.random.uniform(keys[-2], drafted_BL.shape)
    u = jax.random.uniform(keys[-1], fed_BA.shape)
    return verify(drafted_BL, jnp.stack(laws, 1), p_VV[fed_BA], r, u)

  a, b = jax.random.split(key)
  num_B, new_BA = one_round(a, jnp.zeros((SAMPLES,), jnp.int32))
  _, again_BA = one_round(b, new_BA[:, 0])
  return new_BA[:, 0], jnp.where(num_B > 1, new_BA[:, 1], again_BA[:, 0]), num_B


def p_values(verify):
  p, q = toy()
  first, second, num = map(np.asarray, jax.jit(lambda k: first_two(p, q, k, verify))(KEY))
  p = np.asarray(p, np.float64)
  one = scipy.stats.chisquare(np.bincount(first, minlength=TOY), SAMPLES * p[0] / p[0].sum())
  joint = p[0][:, None] * p
  seen = np.bincount(first * TOY + second, minlength=TOY * TOY)
  expected = SAMPLES * joint.ravel() / joint.sum()
  large = expected >= 5
  rest = (seen[~large].sum(), expected[~large].sum())
  both = scipy.stats.chisquare([*seen[large], rest[0]], [*expected[large], rest[1]])
  return one.pvalue, both.pvalue, num


KEY = jax.random.key(11)


def test_first_token_and_first_pair_by_chi_square():
  one, both, num = p_values(chain.verify_chain)
  assert one > 1e-4 and both > 1e-4, (one, both)
  p, q = map(np.asarray, toy())
  rate = np.minimum(p[0], q[0]).sum()  # P2
  assert abs((num > 1).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / SAMPLES)


def test_the_chi_square_has_power():
  """A verifier that accepts everything, and one that forgets to take q away, are found out."""

  def greedy(drafted_BL, q_BLV, p_BAV, r_BL, u_BA):
    return chain.verify_chain(drafted_BL, q_BLV, p_BAV, jnp.zeros_like(r_BL), u_BA)

  def no_residual(drafted_BL, q_BLV, p_BAV, r_BL, u_BA):
    num_B, new_BA = chain.verify_chain(drafted_BL, q_BLV, p_BAV, r_BL, u_BA)
    at = num_B[:, None] - 1
    p_BV = jnp.take_along_axis(p_BAV, at[:, :, None], axis=1)[:, 0]
    last_B = chain.sampling_lib.inverse_cdf(p_BV, jnp.take_along_axis(u_BA, at, axis=1)[:, 0])
    is_last = jnp.arange(new_BA.shape[1])[None, :] == at
    return num_B, jnp.where(is_last, last_B[:, None], new_BA)

  for verify in (greedy, no_residual):
    one, both, _ = p_values(verify)
    assert one < 1e-4 and both < 1e-4


def test_expected_tokens_of_a_round():
  """P3: simulated acceptance of i.i.d. coins."""
  rng, a, length = np.random.default_rng(0), 0.7, 4
  coins = rng.random((200_000, length)) < a
  tokens = np.cumprod(coins, axis=1).sum(axis=1) + 1
  assert abs(tokens.mean() - chain.expected_tokens(a, length)) < 0.01
  assert chain.expected_tokens(1.0, 4) == 5
  with pytest.raises(ValueError, match="acceptance: found 1.1"):
    chain.expected_tokens(1.1, 4)
  with pytest.raises(ValueError, match="num_drafted: found -1"):
    chain.expected_tokens(0.5, -1)


# --- With models ----------------------------------------------------------------------------------


def test_greedy_output_is_plain_greedy():
  """P5: at temperature 0 both laws are points, so a draft is accepted iff it is the argmax."""
  model, params = small.make()
  noisy = jax.tree.map(lambda x: x + 0.02 * jnp.sign(jnp.sin(37 * x)), params)
  prompts = [[3, 1, 4, 1, 5], [9, 2]]
  sampling = config.SamplingConfig(max_new_tokens=12)
  plain = generate.generate(model, params, prompts, sampling)
  found = chain.Pair(model, params, model, noisy, num_drafted=3).generate(prompts, sampling)
  assert found.tokens == plain.tokens and found.finish_reason == ["length"] * 2
  rounds = [n for s in found.stats for n in s.accepted]
  assert 1 <= min(rounds) < max(rounds) <= 4
  perfect = chain.Pair(model, params, model, params, num_drafted=3).generate(prompts, sampling)
  assert perfect.tokens == plain.tokens
  assert all(n == 4 for s in perfect.stats for n in s.accepted)


def test_sampled_output_has_the_law_of_the_target():
  """First token of many seeds against the exact filtered law of the target."""
  model, params = small.make()
  noisy = jax.tree.map(lambda x: x + 0.05 * jnp.sign(jnp.sin(37 * x)), params)
  prompt, num = [3, 1, 4], 1000
  sampling = config.SamplingConfig(temperature=1.5, top_k=6, max_new_tokens=1)
  pair = chain.Pair(model, params, model, noisy, num_drafted=2)
  found = pair.generate([prompt] * num, sampling, seeds=range(num))
  z = small.full_logits(model, params, prompt)[-1] / 1.5
  p = np.exp(z - z.max()) * (z >= np.sort(z)[-6])
  p /= p.sum()
  seen = np.bincount([row[0] for row in found.tokens], minlength=len(p))
  assert not seen[p == 0].any()
  assert scipy.stats.chisquare(seen[p > 0], num * p[p > 0]).pvalue > 1e-4
  accepted = np.mean([s.accepted[0] > 1 for s in found.stats])
  assert 0.05 < accepted < 1  # the draft takes part


def test_bad_input():
  model, params = small.make()
  other, other_params = small.make(vocab_size=62)
  with pytest.raises(
    ValueError, match="draft_model: found vocabulary 62, expected the target's 61"
  ):
    chain.Pair(model, params, other, other_params)
  with pytest.raises(ValueError, match="num_drafted: found 0"):
    chain.Pair(model, params, model, params, num_drafted=0)
  pair = chain.Pair(model, params, model, params)
  with pytest.raises(ValueError, match=r"sampling\.repetition_penalty"):
    pair.generate([[1]], config.SamplingConfig(repetition_penalty=1.2))
  for prompts, match in (
    ([], "prompts: found none"),
    ([[1], []], r"prompts\[1\]: found no token"),
    ([[1], [61]], r"prompts\[1\]: found token 61, expected 0\.\.60"),
  ):
    with pytest.raises(ValueError, match=match):
      pair.generate(prompts, config.SamplingConfig())
  with pytest.raises(ValueError, match="seeds: found 1, expected one for each of 2 prompts"):
    pair.generate([[1], [2]], config.SamplingConfig(), seeds=[3])
  with pytest.raises(ValueError, match=r"^draft_params: found an embedding of \[62, 16\]"):
    chain.Pair(model, params, model, other_params)
  with pytest.raises(ValueError, match="q_BLV, p_BAV: found shapes"):
    x = jnp.zeros((1, 2, 3))
    chain.verify_chain(jnp.zeros((1, 2), jnp.int32), x, x, jnp.zeros((1, 2)), jnp.zeros((1, 2)))


def test_a_sparse_target_attends_as_in_plain_decoding_on_both_sides_of_dense_len():
  """Greedy: chains that straddle dense_len, rows of unequal length, a sparse draft too."""
  model, params = small.make(sparse=small.SPARSE)
  draft, draft_params = small.make(sparse=small.SPARSE, num_layers=1)
  rng = np.random.default_rng(2)
  prompts = [rng.integers(0, small.VOCAB, n).tolist() for n in (9, 18, 20, 21, 22, 23, 24, 30)]
  sampling = config.SamplingConfig(max_new_tokens=16)
  cfg = config.EngineConfig(capacity=64, max_batch=8, chunk_size=32, min_span=64)
  expected = engine_lib.Engine(model, params, cfg).generate(prompts, sampling)
  found = chain.Pair(model, params, draft, draft_params, num_drafted=3).generate(prompts, sampling)
  assert found.tokens == expected.tokens
  itself = chain.Pair(model, params, model, params, num_drafted=3).generate(prompts, sampling)
  assert itself.tokens == expected.tokens
  assert min(min(s.accepted[:-1]) for s in itself.stats) == 4  # the draft is as sparse as it
