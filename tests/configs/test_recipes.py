"""Every recipe: published numbers, the `:arg` grammar, and two tiny steps that learn."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import _common
from experiments import _flags
from minicpm_jax import config
from minicpm_jax.core import metrics, trees
from minicpm_jax.models import transformer, zoo
from minicpm_jax.optim import build, mup, schedules
from minicpm_jax.train import step as step_lib

NAMES = _flags.names()
FAMILY = {
  "minicpm_1b",
  "minicpm_2b",
  "minicpm_2b_128k",
  "minicpm_moe_8x2b",
  "minicpm_s_1b",
  "minicpm3_4b",
  "minicpm4_0p5b",
  "minicpm4_8b",
  "minicpm4p1_8b",
  "bitcpm4_0p5b",
  "bitcpm4_1b",
  "minicpm5_1b",
}


def test_every_released_member_has_a_recipe_of_its_shape():
  assert FAMILY < set(NAMES)
  for name in FAMILY:
    model, shape = _flags.load(name).model, zoo.ZOO[name]()
    for field in ("arch", "model_dim", "mlp_dim", "num_layers", "num_heads", "vocab_size", "moe"):
      assert getattr(model, field) == getattr(shape, field), f"{name}.{field}"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_consistent_and_its_docstring_tells_cost_and_command(name):
  cfg = _flags.load(name)
  schedule = cfg.optim.schedule
  assert cfg.num_steps == schedule.total_steps
  assert cfg.name == name
  assert schedule.decay_start in cfg.checkpoint.keep_steps  # the branch point survives
  for phase in cfg.data.phases[1:]:
    assert phase.start_step == schedule.decay_start
  for phase in cfg.data.phases:
    assert sum(w for _, w in phase.weights) == pytest.approx(1.0)
  text = (_flags.CONFIGS / f"{name}.py").read_text()
  assert f"--config={name} " in text and "Expected" in text
  tokens = cfg.num_steps * cfg.data.batch_size * cfg.data.seq_len
  found = re.search(r"Cost: ([\d.]+)([TBM]) tokens, ([\d.e]+) FLOPs", text)
  assert found, "no cost line"
  said = float(found[1]) * {"T": 1e12, "B": 1e9, "M": 1e6}[found[2]]
  assert said == pytest.approx(tokens, rel=0.08)
  flops = metrics.flops_per_token(cfg.model, cfg.data.seq_len) * tokens
  assert float(found[3]) == pytest.approx(flops, rel=0.08)


def test_published_numbers():
  """training.md sections 1, 4.1, 6, 8 and 10.1."""
  cfg = _flags.load("minicpm_2b")
  tokens = cfg.data.batch_size * cfg.data.seq_len
  assert tokens == 3_932_160 and cfg.optim.peak_lr == 0.01
  schedule = cfg.optim.schedule
  assert schedule.decay_shape == "exp_half_life" and schedule.half_life_steps == 5000
  assert schedule.decay_start * tokens == pytest.approx(1e12, rel=0.02)
  assert cfg.num_steps * tokens == pytest.approx(1.1e12, rel=0.01)
  eight = _flags.load("minicpm4_8b")
  assert eight.optim.peak_lr == 7e-3 and eight.model.max_position == 4096
  assert eight.optim.schedule.decay_start * tokens == pytest.approx(7e12, rel=0.01)
  assert eight.optim.schedule.decay_steps * tokens == pytest.approx(1e12, rel=0.01)
  assert _flags.load("minicpm_moe_8x2b").num_steps == 130_000
  assert _flags.load("minicpm_moe_8x2b").model.moe.aux_loss_weight == 0.01
  n, d = zoo.param_counts(zoo.minicpm5_1b()).non_embedding, 1e12  # StepLaw
  five = _flags.load("minicpm5_1b")
  assert five.optim.peak_lr == pytest.approx(1.79 * n**-0.713 * d**0.307, rel=0.02)
  assert five.data.batch_size * 4096 == pytest.approx(0.58 * d**0.571, rel=0.02)
  long = _flags.load("minicpm4_8b_long")
  assert long.model.rope.kind == "longrope" and long.data.seq_len == 32768
  assert long.num_steps * long.data.batch_size * 32768 == pytest.approx(20e9, rel=0.02)
  short_32k = _flags.load("minicpm_2b_32k")
  assert short_32k.model.rope == config.RopeConfig(theta=1e6)
  assert dict(short_32k.data.phases[0].weights)["long"] == 0.44


def test_arg_grammar():
  cfg = _flags.load("minicpm_2b:steps=1000")
  old, new = _flags.load("minicpm_2b").optim.schedule, cfg.optim.schedule
  assert new.total_steps == cfg.num_steps == 1000
  assert new.decay_steps / 1000 == pytest.approx(old.decay_steps / old.total_steps)
  assert new.half_life_steps / new.decay_steps == pytest.approx(5 / 28, rel=0.05)
  assert cfg.data.phases[1].start_step == new.decay_start
  assert cfg.model == _flags.load("minicpm_2b").model
  tiny = _flags.load("minicpm_2b:tiny, optim.peak_lr=0.5, model.num_layers=3")
  assert (tiny.num_steps, tiny.optim.peak_lr, tiny.model.num_layers) == (20, 0.5, 3)
  for arg, message in (
    ("tyni", "found 'tyni'"),
    ("steps=ten", "steps='ten'"),
    ("steps=0", "steps='0'"),
    ("model.layers=3", "no field 'layers'"),
  ):
    with pytest.raises(ValueError, match=message):
      _flags.load(f"minicpm_2b:{arg}")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 17, 5000])
def test_any_length_keeps_the_stages_in_order(num_steps):
  for name in NAMES:
    schedule = _common.scaled(_flags.load(name), num_steps).optim.schedule
    assert schedule.total_steps == num_steps and schedule.decay_start >= 0


@functools.cache
def losses_of(cfg: config.TrainConfig) -> tuple[float, ...]:
  """Losses of three updates on one batch of repeated rows; compiled without LLVM's optimiser."""
  model = transformer.Transformer(cfg.model)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    value = np.ones(leaf.shape) if mup.role_of(path) == "norm" else rng.normal(size=leaf.shape) / 10
    return jnp.asarray(value, leaf.dtype)

  params = trees.map_with_path(draw, transformer.abstract_params(model)[0])
  tx = build.make_optimizer(cfg.optim, cfg.model, params)
  loss_fn = step_lib.make_loss_fn(model, z_loss=cfg.z_loss)
  train_step = step_lib.make_train_step(loss_fn, step_lib.make_totals_fn(model), tx)
  rows, length = cfg.data.batch_size, cfg.data.seq_len
  tokens = np.tile(rng.integers(3, 40, size=(1, length + 1)), (rows, 1)).astype(np.int32)
  batch = step_lib.whole_rows(tokens) | {"source_ids": np.zeros((rows, length), np.int32)}
  schedule = schedules.schedule_arrays(cfg.optim.schedule, cfg.optim.peak_lr)
  state = step_lib.TrainState(jnp.int32(0), params, tx.init(params))
  run = jax.jit(train_step).lower(state, batch, schedule)
  run = run.compile(compiler_options={"xla_backend_optimization_level": 0})
  losses = []
  for _ in range(3):
    state, values, _ = run(state, batch, schedule)
    losses.append(float(values["total_loss"].mean))
  return tuple(losses)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_recipe_learns_a_batch_by_heart(name):
  cfg = _flags.load(f"{name}:tiny,optim.peak_lr=0.01,optim.schedule.warmup_steps=0")
  model = dataclasses.replace(cfg.model, name="tiny", max_position=64)
  same = config.TrainConfig(  # recipes that differ in lengths and data only share one compilation
    model=model,
    optim=config.OptimConfig(schedule=config.ScheduleConfig(kind="constant", warmup_steps=0)),
    data=dataclasses.replace(_flags.load("nano:tiny").data, align=cfg.data.align),
  )
  losses = losses_of(same)
  assert np.isfinite(losses).all()
  assert losses[2] < losses[1] < losses[0]
