"""Fits against planted constants, scipy and the papers' printed numbers."""

import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.tunnel import fit

# P1 section 4.5: printed averages and the ratio they give (training.md 5).
ALPHA, BETA = 0.29, 0.23
PLANTED = fit.ScalingLaw(alpha=ALPHA, beta=BETA, c_n=0.1, c_d=0.45, floor=0.3)
SIZES = np.array([0.04, 0.1, 0.3, 0.5, 1.0, 2.0])  # billions


def design() -> tuple[np.ndarray, np.ndarray]:
  """Six sizes, each decayed at 10N .. 60N."""
  n = np.repeat(SIZES, 6)
  return n, n * np.tile(np.arange(10, 70, 10), 6)


@pytest.mark.parametrize(
  "loss, tokens",
  [(5.5, 29e3), (4.5, 102e3), (4.0, 212e3), (3.5, 487e3), (3.0, 1.28e6), (2.5, 3.98e6)],
)
def test_published_batch_law(loss, tokens):
  assert fit.PUBLISHED_BATCH_LAW.batch(loss) == pytest.approx(tokens, rel=0.01)
  assert math.log(fit.PUBLISHED_BATCH_LAW.batch(loss)) == pytest.approx(
    20.91 - 6.24 * math.log(loss), abs=0.01
  )


def test_batch_law_is_recovered_from_a_surface_of_loss_curves():
  """Tokens to a loss: least at the planted batch, more by a parabola in ln(batch) around it."""
  law = fit.BatchLaw(5e6, 5.0)
  batches = np.geomspace(1e3, 64e3, 5)
  optima, levels = [], [4.5, 4.0, 3.5]
  for level in levels:
    needed = []
    for b in batches:
      losses = np.linspace(6.0, 2.5, 200)
      best = law.batch(1.0) / losses**law.exponent  # the planted optimum of every level
      tokens = 1e8 * losses**-9.0 * np.exp(0.2 * np.log(b / best) ** 2)
      needed.append(fit.tokens_to_loss(tokens, losses, level))
    optima.append(fit.optimal_batch(batches, needed).x)
  np.testing.assert_allclose(optima, [law.batch(level) for level in levels], rtol=0.1)
  found = fit.fit_batch_law(levels, optima)
  assert found.exponent == pytest.approx(5.0, abs=0.2)
  assert found.batch(4.0) == pytest.approx(law.batch(4.0), rel=0.1)


@given(st.floats(0.01, 100), st.floats(0.1, 3), st.floats(-2, 2))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_parabola_minimum_of_an_exact_parabola(x0, curvature, y0):
  x = x0 * np.array([0.3, 0.5, 0.9, 1.7, 4.0])
  y = curvature * np.log(x / x0) ** 2 + y0
  found = fit.log_parabola_minimum(x[::-1], y[::-1])
  assert found.x == pytest.approx(x0, rel=1e-6)
  assert found.y == pytest.approx(y0, abs=1e-6)
  assert found.is_inside
  assert not fit.log_parabola_minimum(
    x[:3] / 10, curvature * np.log(x[:3] / 10 / x0) ** 2
  ).is_inside


def test_parabola_around_the_lowest_points_ignores_the_far_ones():
  x = np.geomspace(1, 64, 7)
  y = np.log(x / 8) ** 2
  y[-1] = 100.0
  assert fit.log_parabola_minimum(x, y, around=3).x == pytest.approx(8.0)
  with pytest.raises(fit.FitError, match="curvature"):
    fit.log_parabola_minimum(x[:4], -y[:4])


def test_printed_ratio_holds_at_its_compute():
  """alpha 0.29, beta 0.23, K^2 0.01, eta -0.10 give D/N = 192 at 1.9B and 365B (billions)."""
  n, d = 1.9, 365.0
  assert d / n == pytest.approx(192, abs=0.5)
  assert 1 / (0.01 * (n * d) ** -0.10) == pytest.approx(d / n, rel=0.01)
  assert PLANTED.eta == pytest.approx((BETA - ALPHA) / (ALPHA + BETA))
  # The earlier text's constants (0.30, 0.30): no compute in the ratio, 91.
  earlier = fit.ScalingLaw(alpha=0.3, beta=0.3, c_n=0.0754, c_d=0.292, floor=0.25)
  for compute in (1.0, 1e4):
    n, d = earlier.optimum(compute)
    assert d / n == pytest.approx(91, abs=1)


@pytest.mark.parametrize("compute", [6.0, 6e2, 6e4])
def test_optimum_equals_numeric_minimisation(compute):
  found = scipy.optimize.minimize_scalar(
    lambda log_n: float(PLANTED.loss(math.exp(log_n), compute / 6 / math.exp(log_n))),
    bracket=(-1.0, 1.0),
    tol=1e-13,
  )
  n, d = PLANTED.optimum(compute)
  assert float(PLANTED.loss(n, d)) == pytest.approx(found.fun, abs=1e-6)
  assert math.log(n) == pytest.approx(found.x, abs=1e-4)
  assert 6 * n * d == pytest.approx(compute)
  assert n / d == pytest.approx(PLANTED.k_squared * (compute / 6) ** PLANTED.eta)


def test_law_without_noise_is_exact():
  n, d = design()
  found = fit.fit_scaling_law(n, d, PLANTED.loss(n, d))
  assert (found.alpha, found.beta) == (
    pytest.approx(ALPHA, abs=1e-3),
    pytest.approx(BETA, abs=1e-3),
  )
  assert found.floor == pytest.approx(PLANTED.floor, abs=5e-3)
  assert found.r_squared > 0.999999


def test_law_under_noise_and_against_scipy():
  """Exponents within 0.02 at 2e-3 nats, the ratio within a factor of 2; scipy finds no better."""

  def law(x, c_n, c_d, alpha, beta, floor):
    return c_n * x[0] ** -alpha + c_d * x[1] ** -beta + floor

  n, d = design()
  for seed in range(3):
    noise = np.random.default_rng(seed).normal(0, 2e-3, len(n))
    losses = PLANTED.loss(n, d) + noise
    found = fit.fit_scaling_law(n, d, losses)
    assert abs(found.alpha - ALPHA) < 0.02 and abs(found.beta - BETA) < 0.02
    compute = 6 * 1.0 * 30.0
    ratio = np.divide(*found.optimum(compute)[::-1])
    planted = np.divide(*PLANTED.optimum(compute)[::-1])
    assert 0.5 < ratio / planted < 2
    best = math.inf
    for start in ((0.1, 0.5, 0.3, 0.3, 0.3), (0.5, 0.1, 0.5, 0.2, 0.1)):
      values, _ = scipy.optimize.curve_fit(
        law, (n, d), losses, p0=start, bounds=(0, 5), maxfev=10**5
      )
      best = min(best, math.sqrt(np.mean((law((n, d), *values) - losses) ** 2)))
    assert found.rmse <= best * (1 + 1e-4)


def test_tokens_to_match_inverts_the_law():
  d = PLANTED.tokens_to_match(0.5, float(PLANTED.loss(0.5, 20.0)))
  assert d == pytest.approx(20.0)
  assert PLANTED.tokens_to_match(0.5, PLANTED.floor) == math.inf


@pytest.mark.parametrize("kind", ["power", "exponential"])
def test_curve_recovers_and_matches_scipy(kind):
  x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
  shape = x**-0.543 if kind == "power" else np.exp(-0.2 * x)
  y = 0.98 * shape + 3.274 + np.array([1, -1, 1, -1, 1]) * 1e-3

  def model(x, scale, rate, floor):
    return scale * (x**-rate if kind == "power" else np.exp(-rate * x)) + floor

  values, _ = scipy.optimize.curve_fit(model, x, y, p0=(1, 0.3, 3), maxfev=10**5)
  found = fit.fit_curve(x, y, kind)
  assert found.rmse <= math.sqrt(np.mean((model(x, *values) - y) ** 2)) * (1 + 1e-4)
  assert found.rate == pytest.approx(values[1], rel=1e-2)
  other = fit.fit_curve(x, y, "exponential" if kind == "power" else "power")
  assert found.rmse < other.rmse


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda: fit.fit_scaling_law([1] * 6, [1, 2, 3, 4, 5, 6], [1] * 6), "n: found 1 different"),
    (lambda: fit.fit_scaling_law([1, 2], [1, 2], [1, 2]), "at least 6"),
    (lambda: fit.fit_scaling_law([1, 2, 3] * 2, [1, 2, 3] * 2, [1, 2, math.nan] * 2), "losses"),
    (lambda: fit.fit_batch_law([3.0, 3.0], [1, 2]), "two different"),
    (lambda: fit.log_parabola_minimum([1, 2, -3], [1, 2, 3]), "positive"),
    (lambda: fit.fit_curve([1, 2, 3], [1, 2, 3]), "at least 4"),
    (lambda: fit.ScalingLaw(0.3, 0.3, 0.0, 1.0, 0.1).optimum(1.0), "c_n, c_d"),
  ],
)
def test_bad_points_are_named(call, match):
  with pytest.raises(fit.FitError, match=match):
    call()


def test_equal_settings_show_no_minimum():
  with pytest.raises(fit.FitError, match="three different"):
    fit.log_parabola_minimum([2.0, 2.0, 4.0], [1.0, 2.0, 3.0])
