"""Two-stage configs: lengths, rates and phases worked out by hand."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.config import qat as qat_lib
from minicpm_jax.optim import schedules
from tests import words

WSD = config.ScheduleConfig(warmup_steps=10, stable_steps=70, decay_steps=20, min_ratio=0.1)


def rates(schedule, peak, steps):
  arrays = schedules.schedule_arrays(schedule, peak)
  return np.array([schedules.learning_rate(s, arrays) for s in range(1, steps + 1)])


def test_switch_in_the_stable_stage():
  qat = config.QATConfig(share=0.4, lr_peak=0.005, rewarmup_steps=5)
  schedule, ratio = qat_lib.second_schedule(WSD, qat, 100)
  assert (schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps) == (5, 15, 20)
  found = rates(schedule, qat.lr_peak * ratio, 40)
  np.testing.assert_allclose(found[:5], 0.005 * np.arange(1, 6) / 5, rtol=1e-6)
  np.testing.assert_allclose(found[4:20], 0.005, rtol=1e-6)
  np.testing.assert_allclose(found[20:], 0.005 * 0.1 ** (np.arange(1, 21) / 20), rtol=1e-5)


def test_switch_inside_the_decay_goes_on_from_its_fraction():
  """Share 10% of 100 steps: half of the decay is done, 10^-1/2 of it is left to fall."""
  qat = config.QATConfig(share=0.1, lr_peak=0.005, rewarmup_steps=2)
  schedule, ratio = qat_lib.second_schedule(WSD, qat, 100)
  assert (schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps) == (2, 0, 8)
  found = rates(schedule, qat.lr_peak * ratio, 10)
  np.testing.assert_allclose(found[1], 0.005 * 0.1**0.5, rtol=1e-5)
  np.testing.assert_allclose(found[-1], 0.005 * 0.1, rtol=1e-5)


@pytest.mark.parametrize("shape", ["exp_to", "linear_to", "exp_half_life"])
def test_the_rest_of_a_decay_is_that_of_the_whole_run(shape):
  """Without re-warm-up, at the same peak: the second stage's rates are the whole run's."""
  whole = dataclasses.replace(WSD, decay_shape=shape, half_life_steps=7)
  qat = config.QATConfig(share=0.13, lr_peak=0.005, rewarmup_steps=0)
  schedule, ratio = qat_lib.second_schedule(whole, qat, 100)
  found = rates(schedule, 0.005 * ratio, 13)
  np.testing.assert_allclose(found, rates(whole, 0.005, 100)[87:], rtol=1e-5)


@pytest.mark.parametrize("num_steps, stable", [(90, 24), (120, 6)])
def test_the_decay_stays_where_the_whole_schedule_has_it(num_steps, stable):
  """A run cut short, or one that goes on at the floor: the decay is from step 80 to 100 in both."""
  qat = config.QATConfig(share=0.4, lr_peak=0.005, rewarmup_steps=2)
  schedule, ratio = qat_lib.second_schedule(WSD, qat, num_steps)
  assert (schedule.stable_steps, schedule.decay_steps, ratio) == (stable, 20, 1.0)
  start = qat.switch_step(num_steps)
  found = rates(schedule, 0.005, num_steps - start)[2:]
  np.testing.assert_allclose(found, rates(WSD, 0.005, num_steps)[start + 2 :], rtol=1e-5)


def test_a_stable_stage_that_was_not_branched_stays_flat():
  """decay_steps 0: the rate holds however long the run is, so the quantised stage's does."""
  flat = config.ScheduleConfig(warmup_steps=10, stable_steps=20)
  qat = config.QATConfig(share=0.4, lr_peak=0.005, rewarmup_steps=2)
  schedule, ratio = qat_lib.second_schedule(flat, qat, 100)
  np.testing.assert_allclose(rates(flat, 0.01, 100)[60:], 0.01)
  np.testing.assert_allclose(rates(schedule, 0.005 * ratio, 40)[2:], 0.005)
  assert (schedule.stable_steps, schedule.decay_steps) == (38, 0)


def test_no_rewarmup_starts_at_the_peak_and_the_whole_run_warms_up_once():
  none = config.QATConfig(share=0.4, rewarmup_steps=0)
  schedule, _ = qat_lib.second_schedule(WSD, none, 100)
  np.testing.assert_allclose(rates(schedule, 0.005, 1), 0.005, rtol=1e-6)
  whole, _ = qat_lib.second_schedule(WSD, config.QATConfig(share=1.0), 100)
  assert dataclasses.replace(whole) == WSD


def test_stages_of_a_run():
  data = config.DataConfig(
    sources=(config.SourceConfig(name="a", path="a"), config.SourceConfig(name="b", path="b")),
    phases=(
      config.PhaseConfig(weights=(("a", 1.0),)),
      config.PhaseConfig(name="decay", start_step=80, weights=(("b", 1.0),)),
    ),
  )
  model = words.model_config(8)
  whole = config.TrainConfig(
    model=model, data=data, optim=config.OptimConfig(schedule=WSD), num_steps=100
  )
  first, second = config.qat_stages(
    whole, config.QATConfig(rewarmup_steps=9), first_workdir="runs/a"
  )
  assert (first.num_steps, second.num_steps) == (60, 40)
  assert first.optim == whole.optim and first.checkpoint.keep_steps == (60,)
  assert second.init_from == "runs/a@60" and second.model.quant == config.QuantConfig()
  assert [p.start_step for p in second.data.phases] == [0, 20]
  assert second.data.seed == whole.data.seed + 1
  late = config.QATConfig(share=0.1, rewarmup_steps=2)
  _, second = config.qat_stages(whole, late, first_workdir="x")
  assert [p.name for p in second.data.phases] == ["decay"]


def test_the_names_of_the_specification():
  qat = config.QATConfig(
    start_step=60, scheme="five", g=32, lr_peak=0.01, rewarmup_steps=5, decay_start=90
  )
  assert qat.weights == config.QuantConfig(scheme="five", group_size=32)
  schedule, ratio = qat_lib.second_schedule(WSD, qat, 100)
  assert (schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps) == (5, 25, 10)
  assert ratio == 1.0 and qat.switch_step(100) == 60
  whole = qat.whole_schedule(WSD, 100)
  assert (whole.decay_start, whole.total_steps) == (90, 100)


def test_int4_stages():
  """100 steps, 20 of decay, a fifth of them in int4 at a tenth of the peak rate."""
  model = words.model_config(8)
  schedule = dataclasses.replace(WSD, decay_shape="one_minus_sqrt")  # the int4 stage has its own
  optim = config.OptimConfig(schedule=schedule, peak_lr=0.01)
  whole = config.TrainConfig(model=model, optim=optim, num_steps=100, name="run")
  first, int4 = config.int4_stages(whole, first_workdir="runs/a", group_size=8, decay_share=0.2)
  assert (first.num_steps, int4.num_steps, int4.init_from) == (96, 4, "runs/a@96")
  assert first.optim == whole.optim and first.model.quant is None
  assert int4.model.quant == config.QuantConfig(scheme="int4", group_size=8, scale_dtype="f16")
  np.testing.assert_allclose(rates(int4.optim.schedule, int4.optim.peak_lr, 4), 0.001, rtol=1e-6)
  more = dict(first_workdir="runs/a", decay_share=0.2, export_ready_step=3)
  _, free, ready = config.int4_stages(whole, **more)
  assert (free.num_steps, ready.num_steps) == (3, 1)
  assert (free.model.quant.scale_dtype, ready.model.quant.scale_dtype) == ("f32", "f16")
  assert ready.init_from == "runs/a_int4@3" and ready.keep_moments
  assert free.checkpoint.keep_steps == (3,)
  assert ready.optim == free.optim
  with pytest.raises(ValueError, match="export_ready_step: found 4, expected a step below"):
    config.int4_stages(whole, first_workdir="a", decay_share=0.2, export_ready_step=4)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"start_step": 100}, "qat.start_step: found 100, expected a step below the run's 100"),
    ({"decay_start": 5}, "qat.decay_start: found 5"),
    ({"scheme": "int4", "quant": config.QuantConfig()}, "qat.scheme, qat.g: found"),
    ({"share": 0.0}, "qat.share: found 0.0"),
    ({"share": 0.4, "rewarmup_steps": 41}, "qat.rewarmup_steps: found 41, expected at most"),
  ],
)
def test_refusals(change, message):
  root = dataclasses.replace(WSD, decay_shape="one_minus_sqrt")
  with pytest.raises(ValueError, match="decay_shape: found 'one_minus_sqrt', expected another"):
    qat_lib.second_schedule(root, config.QATConfig(share=0.1, rewarmup_steps=1), 100)
  with pytest.raises(ValueError, match=message):
    qat_lib.second_schedule(WSD, config.QATConfig(**change), 100)


def test_a_switch_at_or_behind_the_end_of_the_decay_is_refused():
  linear = dataclasses.replace(WSD, decay_shape="linear_to", min_ratio=0.0)
  for start, warmup, least in ((100, 0, 101), (104, 0, 105), (98, 3, 101)):
    qat = config.QATConfig(start_step=start, rewarmup_steps=warmup)
    message = f"optim.schedule: total steps: found 100, expected at least {least}"
    with pytest.raises(ValueError, match=message):
      qat_lib.second_schedule(linear, qat, 120)
