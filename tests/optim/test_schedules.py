"""Schedules against the paper's formulas in float64, against optax, and their properties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax import config
from minicpm_jax.optim import schedules

SHAPES = ("exp_half_life", "exp_to", "linear_to", "one_minus_sqrt")
CURVE = jax.jit(jax.vmap(schedules.learning_rate, (0, None)))


def decay(shape, s, length, ratio, half_life):
  """f(s) of MiniCPM section 4.2 and its three companions, s steps into the decay."""
  return {
    "exp_half_life": 0.5 ** (s / half_life),
    "exp_to": ratio ** (s / length),
    "linear_to": 1 - (1 - ratio) * s / length,
    "one_minus_sqrt": 1 - (1 - ratio) * math.sqrt(s / length),
  }[shape]


def wsd_by_hand(s, peak, warmup, stable, length, shape, ratio, half_life):
  start = warmup + stable
  if s < warmup:
    return peak * s / warmup
  return peak * (
    1.0 if s < start else decay(shape, min(s - start, length), length, ratio, half_life)
  )


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES)
def test_wsd_equals_the_formula_and_optax_join_schedules(shape):
  args = dict(warmup_steps=10, stable_steps=30, decay_steps=20, half_life_steps=7, min_ratio=0.05)
  cfg = config.ScheduleConfig(kind="wsd", decay_shape=shape, **args)
  steps = np.arange(70)
  got = CURVE(jnp.asarray(steps), schedules.schedule_arrays(cfg, 0.01))
  want = [wsd_by_hand(s, 0.01, 10, 30, 20, shape, 0.05, 7) for s in steps]
  np.testing.assert_allclose(got, want, rtol=2e-6)
  pieces = [
    optax.linear_schedule(0.0, 0.01, 10),
    optax.constant_schedule(0.01),
    lambda s: 0.01 * decay(shape, min(max(int(s), 0), 20), 20, 0.05, 7),
  ]
  joined = optax.join_schedules(pieces, [10, 40])
  np.testing.assert_allclose(got, [float(joined(s)) for s in steps], rtol=2e-6)
  wsd = schedules.wsd(47, peak_lr=0.01, shape=shape, **args)
  np.testing.assert_allclose(wsd, want[47], rtol=2e-6)


@pytest.mark.smoke
def test_cosine_equals_optax_and_ends_at_its_floor():
  optax_fn = optax.warmup_cosine_decay_schedule(0.0, 0.02, 20, 120, end_value=0.002)
  for s in (0, 1, 19, 20, 70, 119, 120, 500):
    got = schedules.cosine(s, peak_lr=0.02, warmup_steps=20, total_steps=120)
    np.testing.assert_allclose(got, optax_fn(s), rtol=1e-5)
  # training.md 4.2: 0.1 eta + 0.45 eta (1 + cos(pi s / T)), not the printed negative curve
  want = 0.1 * 0.02 + 0.45 * 0.02 * (1 + math.cos(math.pi * 0.75))
  got = schedules.cosine(95, peak_lr=0.02, warmup_steps=20, total_steps=120)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_cosine_loop_repeats_where_cosine_stops():
  fn = {
    kind: [
      float(getattr(schedules, kind)(s, peak_lr=1.0, warmup_steps=5, total_steps=25))
      for s in range(5, 85)
    ]
    for kind in ("cosine", "cosine_loop")
  }
  loop = np.asarray(fn["cosine_loop"])
  np.testing.assert_allclose(loop[:21], fn["cosine"][:21], rtol=1e-6)
  np.testing.assert_allclose(loop[:40], loop[40:], atol=1e-5)  # period 2 (T - W)
  np.testing.assert_allclose(loop[:21], loop[20:41][::-1], atol=1e-5)
  assert loop.min() == pytest.approx(0.1, abs=1e-5)
  np.testing.assert_allclose(fn["cosine"][20:], 0.1, rtol=1e-6)


def test_released_recipe_halves_every_5000_steps():
  args = dict(peak_lr=0.01, warmup_steps=100, stable_steps=250_000, decay_steps=28_000)
  lr = lambda s: float(schedules.wsd(s, shape="exp_half_life", **args))  # noqa: E731
  assert lr(255_100) == pytest.approx(0.005, rel=1e-6)
  assert lr(260_100) == pytest.approx(0.0025, rel=1e-6)
  assert lr(278_100) / 0.01 == pytest.approx(0.0206, abs=1e-4)  # "f = 0.02 after 28k steps"


def test_one_compiled_program_serves_every_kind_branch_and_peak():
  traces = []

  @jax.jit
  def lr(step, arrays):
    traces.append(step)
    return schedules.learning_rate(step, arrays)

  cfgs = [
    config.ScheduleConfig(kind=kind, decay_shape=shape, stable_steps=stable, decay_steps=10)
    for kind in ("wsd", "cosine", "cosine_loop", "constant")
    for shape in SHAPES
    for stable in (20, 40)
  ]
  values = {float(lr(jnp.int32(125), schedules.schedule_arrays(c, 0.01))) for c in cfgs}
  assert len(traces) == 1 and len(values) > 6
  peaks = jnp.asarray([0.1, 0.2, 0.4])
  arrays = schedules.schedule_arrays(cfgs[0], 1.0)
  rates = jax.vmap(lambda p: schedules.learning_rate(50, arrays._replace(peak=p)))(peaks)
  np.testing.assert_allclose(rates, peaks * 0.5, rtol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  shape=st.sampled_from(SHAPES),
  warmup=st.integers(0, 50),
  stable=st.integers(0, 200),
  length=st.integers(1, 100),
  ratio=st.floats(0.01, 1.0),
)
def test_wsd_is_continuous_monotone_and_forgets_the_horizon(shape, warmup, stable, length, ratio):
  cfg = config.ScheduleConfig(
    warmup_steps=warmup,
    stable_steps=stable,
    decay_steps=length,
    decay_shape=shape,
    min_ratio=ratio,
    half_life_steps=37,
  )
  got = np.asarray(CURVE(jnp.arange(360), schedules.schedule_arrays(cfg, 1.0)))
  start = warmup + stable
  assert (np.diff(got[: warmup + 1]) >= 0).all() and (np.diff(got[warmup:]) <= 1e-7).all()
  assert (got >= 0).all() and got.max() == pytest.approx(1.0)
  np.testing.assert_allclose(got[start], 1.0, rtol=1e-6)  # f(0) = 1: no jump at the branch
  end = 0.5 ** (length / 37) if shape == "exp_half_life" else ratio
  np.testing.assert_allclose(got[start + length :], end, rtol=1e-5)
  longer = config.ScheduleConfig(warmup_steps=warmup, stable_steps=stable + 50, decay_steps=3)
  trunk = np.asarray(CURVE(jnp.arange(360), schedules.schedule_arrays(longer, 1.0)))
  np.testing.assert_array_equal(got[:start], trunk[:start])


def test_a_cosine_without_length_is_refused_and_an_unbranched_wsd_stays_flat():
  with pytest.raises(ValueError, match=r"schedule\.decay_steps.*cosine"):
    schedules.schedule_arrays(config.ScheduleConfig(kind="cosine"), 0.01)
  for shape in SHAPES:
    lr = schedules.wsd(
      10**6, peak_lr=1.0, warmup_steps=5, stable_steps=10, decay_steps=0, shape=shape
    )
    assert float(lr) == 1.0


@pytest.mark.parametrize("peak", [-1.0, np.nan, np.inf])
def test_a_peak_that_is_no_rate_is_refused(peak):
  with pytest.raises(ValueError, match="peak_lr"):
    schedules.wsd(5, peak_lr=peak, warmup_steps=1, stable_steps=10, decay_steps=1)
