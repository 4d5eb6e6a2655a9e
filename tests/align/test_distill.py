"""Distillation loss against float64 softmaxes; its step trains a quantised student."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.align import distill
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib
from tests.models import common
from tests.train import conftest as training


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_loss_is_the_weighted_sum_and_the_step_lowers_it():
  student, params = common.build(training.model_config(quant=config.QuantConfig(scheme="ternary")))
  teacher, teacher_params = common.build(training.model_config(mlp_dim=48), seed=1)
  batch = jax.tree.map(jnp.asarray, training.packed_batch())
  loss = distill.DistillLoss(alpha=0.3, temperature=2.0)
  optimizer = build.make_optimizer(config.OptimConfig(), student.cfg, params)
  step = jax.jit(distill.make_step(student, teacher, optimizer, loss, grad_accum=2))
  state = step_lib.TrainState(jnp.int32(0), params, optimizer.init(params))
  schedule = schedules.schedule_arrays(config.ScheduleConfig(kind="constant", warmup_steps=0), 0.01)
  _, metrics, norms = step(state, batch, schedule, teacher_params)

  inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
  logits, goals = (
    np.asarray(common.apply(m, p, *inputs).logits)
    for m, p in ((student, params), (teacher, teacher_params))
  )
  mask = np.asarray(batch["loss_mask"])
  soft, goal = log_softmax(logits / 2), log_softmax(goals / 2)
  kl = 4 * np.sum(np.exp(goal) * (goal - soft), axis=-1)
  ce = -np.take_along_axis(log_softmax(logits), np.asarray(batch["targets"])[..., None], -1)[..., 0]
  np.testing.assert_allclose(metrics["kl"].sum, np.sum(kl * mask), rtol=1e-4)
  np.testing.assert_allclose(metrics["loss"].sum, np.sum(ce * mask), rtol=1e-4)
  expected = (0.7 * np.sum(ce * mask) + 0.3 * np.sum(kl * mask)) / mask.sum()
  np.testing.assert_allclose(metrics["total_loss"].sum, expected, rtol=1e-4)
  assert float(norms["layers/attn/q/kernel"]) > 0 and "zero_share" in metrics
  for _ in range(8):
    state, metrics, _ = step(state, batch, schedule, teacher_params)
  assert float(metrics["total_loss"].sum) < 0.9 * expected


def test_refusals():
  model = transformer.Transformer(training.model_config())
  other = transformer.Transformer(
    dataclasses.replace(model.cfg, vocab_size=model.cfg.vocab_size + 1)
  )
  with pytest.raises(ValueError, match="teacher: found a vocabulary"):
    distill.make_loss_fn(model, other, {})
  with pytest.raises(ValueError, match="distill.alpha: found 1.5"):
    distill.DistillLoss(alpha=1.5)
