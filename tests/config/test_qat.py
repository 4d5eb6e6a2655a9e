"""Two-stage configs: lengths, rates and phases worked out by hand."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.config import qat as qat_lib
from minicpm_jax.optim import schedules

WSD = config.ScheduleConfig(warmup_steps=10, stable_steps=70, decay_steps=20, min_ratio=0.1)


def rates(schedule, peak, steps):
  arrays = schedules.schedule_arrays(schedule, peak)
  return np.array([schedules.learning_rate(s, arrays) for s in range(1, steps + 1)])


def test_switch_in_the_stable_stage():
  qat = config.QATConfig(share=0.4, peak_lr=0.005, rewarmup_steps=5)
  schedule, ratio = qat_lib.second_schedule(WSD, qat, 100)
  assert (schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps) == (5, 15, 20)
  found = rates(schedule, qat.peak_lr * ratio, 40)
  np.testing.assert_allclose(found[:5], 0.005 * np.arange(1, 6) / 5, rtol=1e-6)
  np.testing.assert_allclose(found[4:20], 0.005, rtol=1e-6)
  np.testing.assert_allclose(found[20:], 0.005 * 0.1 ** (np.arange(1, 21) / 20), rtol=1e-5)


def test_switch_inside_the_decay_goes_on_from_its_fraction():
  """Share 10% of 100 steps: half of the decay is done, 10^-1/2 of it is left to fall."""
  qat = config.QATConfig(share=0.1, peak_lr=0.005, rewarmup_steps=2)
  schedule, ratio = qat_lib.second_schedule(WSD, qat, 100)
  assert (schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps) == (2, 0, 8)
  found = rates(schedule, qat.peak_lr * ratio, 10)
  np.testing.assert_allclose(found[1], 0.005 * 0.1**0.5, rtol=1e-5)
  np.testing.assert_allclose(found[-1], 0.005 * 0.1, rtol=1e-5)


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
  model = config.ModelConfig(
    vocab_size=8,
    model_dim=8,
    mlp_dim=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position=8,
  )
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


@pytest.mark.parametrize(
  "change, message",
  [
    ({"share": 0.0}, "qat.share: found 0.0"),
    ({"share": 0.4, "rewarmup_steps": 41}, "qat.rewarmup_steps: found 41, expected at most"),
  ],
)
def test_refusals(change, message):
  with pytest.raises(ValueError, match=message):
    qat_lib.second_schedule(WSD, config.QATConfig(**change), 100)
