"""Plans: grids, schedules, parameter counts, the large run."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.ckpt import run_config
from minicpm_jax.models import zoo
from minicpm_jax.optim import schedules
from minicpm_jax.tunnel import plan


def make(width=32, lr=0.01, name=None) -> plan.RunSpec:
  return plan.RunSpec(
    name=name or f"w{width}-{lr}",
    model=plan.small_model(width),
    optim=config.OptimConfig(peak_lr=lr),
    num_steps=10,
  )


def test_grid_is_the_product():
  specs = plan.grid(make, {"width": (32, 64), "lr": (0.1, 0.2, 0.4)})
  assert [(s.model.model_dim, s.optim.peak_lr) for s in specs] == [
    (w, lr) for w in (32, 64) for lr in (0.1, 0.2, 0.4)
  ]
  np.testing.assert_allclose(plan.log_grid(0.01, 2, 5), [0.0025, 0.005, 0.01, 0.02, 0.04])
  np.testing.assert_allclose(plan.log_grid(0.01, 4, 2), [0.005, 0.02])


@pytest.mark.parametrize("mode", plan.MODES)
def test_parameter_counts_are_the_zoos(mode):
  for width in (32, 96):
    cfg = plan.small_model(width, mode)
    assert plan.num_params(cfg) == zoo.param_counts(cfg).non_embedding
    assert cfg.mlp_dim == 2.5 * width


def test_wind_tunnel_models_of_the_paper():
  """P1 table 8, recomputed (training.md 1.1)."""
  sizes = {
    "9m": 9_426_240,
    "30m": 36_188_672,
    "70m": 65_964_160,
    "0p1b": 108_552_960,
    "0p17b": 166_216_064,
    "0p2b": 241_214_464,
    "0p5b": 498_614_592,
  }
  for name, count in sizes.items():
    assert plan.num_params(zoo.tunnel(name)) == count


def test_schedule_shares():
  s = plan.schedule(400, decay_share=0.1)
  assert (s.warmup_steps, s.stable_steps, s.decay_steps) == (20, 340, 40)
  arrays = schedules.schedule_arrays(s, 1.0)
  rates = [float(schedules.learning_rate(step, arrays)) for step in (10, 20, 360, 380, 400)]
  np.testing.assert_allclose(rates, [0.5, 1, 1, 0.03**0.5, 0.03], rtol=1e-5)
  assert plan.schedule(100, decay_share=0).decay_steps == 0
  assert plan.schedule(40, decay_share=0.001).decay_steps == 1


def test_trunk_gathers_the_starts_of_its_branches():
  warm = dataclasses.replace(make(name="t"), optim=config.OptimConfig(schedule=plan.schedule(50)))
  trunk, *branches = plan.trunk_and_branches(
    warm, {"x": plan.schedule(100), "y": plan.schedule(200, decay_share=0.5)}
  )
  assert trunk.save_steps == (90, 100) and trunk.num_steps == 100
  assert trunk.optim.schedule.decay_steps == 0
  assert [(b.name, b.branch_from, b.num_steps) for b in branches] == [
    ("t-x", ("t", 90), 100),
    ("t-y", ("t", 100), 200),
  ]
  with pytest.raises(ValueError, match="warm-up"):
    plan.trunk_and_branches(warm, {"x": plan.schedule(100, warmup_steps=5)})


def test_large_run_takes_what_was_found(tmp_path):
  sources = tuple(config.SourceConfig(name=n, path=f"data/{n}") for n in ("web", "sft"))
  base = config.TrainConfig(
    model=zoo.minicpm4_0p5b(),
    data=config.DataConfig(
      sources=sources,
      phases=(
        config.PhaseConfig(weights=(("web", 1.0),)),
        config.PhaseConfig(name="decay", start_step=7, weights=(("web", 0.7), ("sft", 0.3))),
      ),
      seq_len=4096,
    ),
  )
  cfg = plan.large_run(
    base, tokens=100e9, peak_lr=0.012, batch_tokens=3.98e6, constants={"init_std": 0.08}
  )
  rows = 976  # 3.98e6 / 4096 = 971.7, to a multiple of 16
  assert cfg.data.batch_size == rows
  assert cfg.num_steps == int(np.ceil(100e9 / (rows * 4096)))
  schedule = cfg.optim.schedule
  assert schedule.total_steps == cfg.num_steps
  assert schedule.decay_steps == round(0.1 * cfg.num_steps)
  assert cfg.data.phases[1].start_step == schedule.decay_start
  assert cfg.checkpoint.keep_steps == (schedule.decay_start,)
  assert (cfg.optim.peak_lr, cfg.model.init_std) == (0.012, 0.08)
  run_config.write(tmp_path, cfg, header="found by the tunnel")
  assert run_config.read(tmp_path) == cfg
  with pytest.raises(ValueError, match="constants"):
    plan.large_run(base, tokens=1e9, peak_lr=0.01, batch_tokens=1e6, constants={"norm_eps": 1.0})


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda: make(width=40), "width"),
    (lambda: plan.grid(make, {"width": (32, 32)}), "name"),
    (lambda: plan.grid(make, {"width": ()}), "axes"),
    (lambda: dataclasses.replace(make(), eval_steps=(11,)), "eval_steps"),
    (lambda: dataclasses.replace(make(), name="a/b"), "name"),
    (lambda: plan.schedule(10, decay_share=1.0), "decay_share"),
    (lambda: plan.log_grid(0.0, 2, 3), "center"),
  ],
)
def test_bad_plans_are_named(call, match):
  with pytest.raises(ValueError, match=match):
    call()


def test_sizes_of_a_plan_are_checked():
  with pytest.raises(ValueError, match="batch_size: found 0"):
    plan.steps_for(10, batch_size=0, seq_len=1)
  with pytest.raises(ValueError, match="count: found 0"):
    plan.log_grid(1.0, 2.0, 0)
