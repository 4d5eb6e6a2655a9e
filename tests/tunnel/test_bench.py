"""ScalingBench: scores against log-softmax by hand, averages by hand, sigmoids against scipy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from minicpm_jax.core import rng
from minicpm_jax.data import scalingbench
from minicpm_jax.models import transformer
from minicpm_jax.tunnel import bench, fit, likelihood
from tests.models import common

PLANTED = bench.Sigmoid(lo=0.25, hi=0.9, k=6.0, l0=1.3)


def item(i: int, given: str, target: str, **more) -> scalingbench.Item:
  return scalingbench.Item(task=f"t{i % 2}", id=str(i), input=given, target=target, **more)


@pytest.fixture(scope="module")
def scored(base_config, planted):
  model = transformer.Transformer(base_config.model)
  params = transformer.init_params(model, rng.key(0, "init"))
  scorer = likelihood.Scorer(model, planted.tokenizer(), seq_len=16)
  items = [
    item(0, "3 4 5", "6 7"),
    item(1, "9 8", "7 6 5 4"),
    item(2, "2 3", "4", choices=("4", "30"), gold=0),
  ]
  return model, params, scorer, items, bench.score(scorer, params, items)


def test_score_is_the_loss_of_the_target_alone(scored):
  model, params, _, items, found = scored
  for i, it in enumerate(items):
    given, target = ([int(w) for w in text.split()] for text in (it.input, it.target))
    ids = np.array([[1, *given, *target]])  # EOS = 1 starts a text
    logp = jax.nn.log_softmax(common.apply(model, params, ids).logits[0].astype(jnp.float32))
    at = np.arange(len(given), len(given) + len(target))
    assert found.nats[i] == pytest.approx(-float(logp[at, target].sum()), rel=1e-4)
    assert found.num_tokens[i] == len(target)
    assert found.num_bytes[i] == len(it.target.encode())
  assert np.isnan(found.correct[:2]).all() and found.correct[2] in (0, 1)


def test_logits_over_the_input_do_not_count(scored, monkeypatch):
  """Perturbing what the model says about the input changes no score."""
  model, params, scorer, items, found = scored
  apply = transformer.Transformer.apply

  def perturbed(self, variables, ids, *args, **kwargs):
    out = apply(self, variables, ids, *args, **kwargs)
    noise = jnp.zeros(out.logits.shape).at[:, 0].set(jnp.arange(out.logits.shape[-1]) * 0.1)
    return out.replace(logits=out.logits + noise)

  monkeypatch.setattr(transformer.Transformer, "apply", perturbed)
  again = likelihood.Scorer(model, scorer.tok, seq_len=16)
  np.testing.assert_allclose(bench.score(again, params, items).nats, found.nats, rtol=1e-6)


def test_three_averages_by_hand():
  s = bench.ItemScores(
    ("a", "a", "b"), np.array([2.0, 9.0, 8.0]), np.array([2.0, 3.0, 4.0]), np.array([8.0, 9.0, 8.0])
  )
  assert s.mean("token") == pytest.approx(19 / 9)
  assert s.mean("item") == pytest.approx((1 + 3 + 2) / 3)
  assert s.mean("task") == s.mean() == pytest.approx(((1 + 3) / 2 + 2) / 2)
  assert s.mean("token", "bits_per_byte") == pytest.approx(19 / 25 / np.log(2))
  assert s.by_task() == {"a": pytest.approx(2.0), "b": pytest.approx(2.0)}
  with pytest.raises(ValueError, match="no item with choices"):
    s.accuracy()
  assert dataclasses.replace(s, correct=np.array([1.0, np.nan, 0.0])).accuracy() == 0.5


@pytest.mark.parametrize("chance", [0.25, None])
def test_planted_sigmoid_is_recovered(chance):
  losses = np.linspace(0.6, 2.2, 12)
  for seed in range(3):
    noise = np.random.default_rng(seed).normal(0, 2e-3, len(losses))
    found = bench.fit_sigmoid(losses, np.clip(PLANTED(losses) + noise, 0, 1), chance=chance)
    assert found.l0 == pytest.approx(PLANTED.l0, abs=0.01)
    assert found.k == pytest.approx(PLANTED.k, rel=0.1)
    assert found.hi == pytest.approx(PLANTED.hi, abs=0.01)
    assert found.lo == pytest.approx(0.25, abs=0.02 if chance is None else 1e-12)


def test_fit_is_no_worse_than_scipy():
  losses = np.linspace(0.8, 2.0, 8)
  accs = PLANTED(losses) + np.random.default_rng(3).normal(0, 0.01, 8)

  def model(x, lo, hi, k, l0):
    return lo + (hi - lo) / (1 + np.exp(k * (x - l0)))

  values, _ = scipy.optimize.curve_fit(
    model, losses, accs, p0=(0.2, 0.8, 5, 1.2), bounds=((0, 0, 0, 0), (1, 1, 50, 3))
  )
  theirs = np.sum((model(losses, *values) - accs) ** 2)
  ours = np.sum((bench.fit_sigmoid(losses, accs)(losses) - accs) ** 2)
  assert ours <= theirs * (1 + 1e-3)


def test_bounds_hold_and_weights_count():
  found = bench.fit_sigmoid([1, 2, 3, 4, 5], [1.0, 1.0, 0.9, 0.1, 0.0])
  assert 0 <= found.lo <= found.hi <= 1 and found.k > 0
  # Twenty times the items at the ends than the noise in the middle: the ends win.
  accs = np.array([0.99, 0.95, 0.3, 0.05, 0.01])
  flat = bench.fit_sigmoid([1, 2, 3, 4, 5], accs, chance=0.0)
  weighted = bench.fit_sigmoid([1, 2, 3, 4, 5], accs, chance=0.0, num_items=10_000)
  ends = [0, 1, 3, 4]
  error = [np.abs(s(np.array([1.0, 2, 4, 5])) - accs[ends]).sum() for s in (weighted, flat)]
  assert error[0] < error[1]


def test_sigmoid_beats_a_line_on_the_held_out_largest():
  losses = np.array([2.0, 1.8, 1.6, 1.5, 1.4, 1.3, 0.9, 0.7])
  held = losses < 1.0
  noise = np.random.default_rng(0).normal(0, 5e-3, len(losses))
  found = bench.extrapolate(losses, PLANTED(losses) + noise, held, chance=0.25, num_items=2000)
  assert found.sigmoid_error < 0.05 < found.line_error
  with pytest.raises(ValueError, match="is_heldout"):
    bench.extrapolate(losses, PLANTED(losses), np.zeros(8, bool))


@pytest.mark.parametrize(
  "losses, accs, match",
  [
    ([1, 2, 3], [0.3, 0.2, 0.1], "at least 4"),
    ([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4], "found only 1"),
    ([1, 2, 3, 4], [0.1, 0.2, 0.3, 1.4], r"\[0, 1\]"),
  ],
)
def test_bad_points_are_named(losses, accs, match):
  with pytest.raises(fit.FitError, match=match):
    bench.fit_sigmoid(losses, accs)


def test_a_sigmoid_of_no_items_is_refused():
  with pytest.raises(ValueError, match="num_items: found 0"):
    bench.fit_sigmoid([1.0, 2.0, 3.0, 4.0], [0.9, 0.7, 0.4, 0.3], num_items=0)
