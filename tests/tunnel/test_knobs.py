"""Constants as data: equal to the model with its constants inside, one program for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import rng, trees
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib
from minicpm_jax.tunnel import engine, knobs, plan
from tests import words
from tests.models import common

STEPS, ROWS, SEQ = 3, 4, 16


def spec(mode: str, **more) -> plan.RunSpec:
  small = dict(base_width=16, head_dim=8, vocab_size=64, num_layers=1)
  optim = config.OptimConfig(
    peak_lr=0.02,
    schedule=plan.schedule(STEPS, decay_share=0, warmup_steps=2),
    weight_decay=0.1,
    mup=mode != "sp",
  )
  return plan.RunSpec(
    name=mode,
    model=plan.small_model(32, mode, **{**small, **more}),
    optim=optim,
    num_steps=STEPS,
    batch_size=ROWS,
    seq_len=SEQ,
  )


@pytest.fixture(scope="module")
def program():
  return engine.Program(engine.key_of(spec("sp")), "loop")


TOKENS = np.random.default_rng(0).integers(0, 64, 500).astype(np.int32)
STARTS = np.random.default_rng(1).integers(0, 480, (1, STEPS, ROWS)).astype(np.int32)


@pytest.mark.parametrize("mode", ["matrix", "vector", "sp"])
def test_steps_equal_those_of_train_step(program, mode):
  """Three steps (decay, clipping, warm-up) against `train.step` with the constants in the model."""
  run = spec(mode)
  assert engine.key_of(run) == program.key
  state = engine.stack([program.init(run)])
  args = [
    engine.stack([knobs.knobs_of(run.model, run.optim)]),
    engine.stack([schedules.schedule_arrays(run.optim.schedule, run.optim.peak_lr)]),
  ]
  state, losses = program.advance(TOKENS, state, STARTS, *args, np.int32(STEPS))

  model = transformer.Transformer(run.model)
  params = transformer.init_params(model, rng.key(run.seed, "init"))
  optimizer = build.make_optimizer(run.optim, run.model, params)
  step = jax.jit(
    step_lib.make_train_step(
      step_lib.make_loss_fn(model), step_lib.make_totals_fn(model), optimizer
    )
  )
  expected = step_lib.TrainState(jnp.int32(0), params, optimizer.init(params))
  for i in range(STEPS):
    ids = TOKENS[STARTS[0, i][:, None] + np.arange(SEQ + 1)]
    batch = {
      "tokens": jnp.asarray(ids[:, :-1]),
      "targets": jnp.asarray(ids[:, 1:]),
      "positions": jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32), (ROWS, SEQ)),
      "segment_ids": jnp.ones((ROWS, SEQ), jnp.int32),
      "loss_mask": jnp.ones((ROWS, SEQ), jnp.float32),
    }
    expected, metrics, _ = step(
      expected, batch, schedules.schedule_arrays(run.optim.schedule, run.optim.peak_lr)
    )
    assert float(losses[0, i]) == pytest.approx(float(metrics["loss"].mean), rel=2e-5)
  _, found = knobs.trained_form(run.model, engine.unstack(state.params, 0))
  for path, leaf in trees.flatten_paths(expected.params).items():
    np.testing.assert_allclose(
      trees.flatten_paths(found)[path], leaf, atol=2e-4, rtol=2e-3, err_msg=path
    )


def init(run: plan.RunSpec, seed: int):
  drawn = knobs.draw_params(knobs.plain_model(run.model), rng.key(seed, "init"))
  return knobs.scale_params(run.model, drawn)


def test_initial_parameters_are_those_of_train():
  for mode in plan.MODES:
    run = spec(mode, num_layers=3)
    _, ours = knobs.trained_form(run.model, init(run, 3))
    theirs = transformer.init_params(transformer.Transformer(run.model), rng.key(3, "init"))
    for path, leaf in trees.flatten_paths(theirs).items():
      np.testing.assert_allclose(trees.flatten_paths(ours)[path], leaf, rtol=1e-6, err_msg=path)


def test_folded_logits_equal_the_models():
  run = spec("matrix", num_layers=2, scale_emb=3.0, scale_depth=0.7, init_std=0.3)
  params = init(run, 0)
  folded = knobs.fold(params, knobs.knobs_of(run.model, run.optim))
  ids = TOKENS[:32].reshape(2, 16)
  ours = common.apply(knobs.graph_model(knobs.plain_model(run.model)), folded, ids).logits
  cfg, stacked = knobs.trained_form(run.model, params)
  theirs = common.apply(transformer.Transformer(cfg), stacked, ids).logits
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_constants_by_hand():
  model = plan.small_model(64, "vector", base_width=32, num_layers=4)
  found = knobs.knobs_of(model, config.OptimConfig())
  expected = (12.0, 1.4 / 2, 0.5, 0.5, 1.0)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  plain = knobs.knobs_of(plan.small_model(64, "sp"), config.OptimConfig(mup=False))
  np.testing.assert_allclose(plain, np.ones(5))


def test_what_cannot_be_data_is_refused():
  moe = words.model_config(8, moe=config.MoEConfig())
  with pytest.raises(ValueError, match=r"model\.moe.*queue"):
    knobs.plain_model(moe)
  bad = spec("matrix")
  optim = config.OptimConfig(decay_coupling="independent")
  with pytest.raises(ValueError, match="decay_coupling"):
    engine.key_of(plan.dataclasses.replace(bad, optim=optim))
  with pytest.raises(ValueError, match="max_position"):
    engine.key_of(plan.dataclasses.replace(bad, seq_len=65))
