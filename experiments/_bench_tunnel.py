"""The sides of `experiments.bench_tunnel`."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _tunnel
from minicpm_jax.core import rng
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib
from minicpm_jax.tunnel import corpus, engine, plan, run

EVAL_ROWS = 128


def sweep(width: int, count: int, steps: int) -> tuple[list[plan.RunSpec], corpus.Corpus]:
  """`count` learning rates, factors of 1.5 around 0.016."""
  text = corpus.python_source(max_bytes=1_000_000)

  def spec(lr: float) -> plan.RunSpec:
    return plan.RunSpec(
      name=f"lr{lr:.4g}",
      model=plan.small_model(width, vocab_size=text.vocab_size),
      optim=_tunnel.adam(lr, plan.schedule(steps)),
      num_steps=steps,
    )

  return plan.grid(spec, {"lr": plan.log_grid(0.016, 1.5, count)}), text


def _rows(text: corpus.Corpus) -> corpus.Rows:
  return text.heldout_rows("text", num_rows=EVAL_ROWS, seq_len=_tunnel.SEQ_LEN)


def one_by_one(
  specs: list[plan.RunSpec], text: corpus.Corpus, folder: str | pathlib.Path
) -> list[float]:
  """Every run for itself: `train.step` of its own config, a Python loop over steps."""
  del folder
  return [_alone(spec, text) for spec in specs]


def _alone(spec: plan.RunSpec, text: corpus.Corpus) -> float:
  model = transformer.Transformer(spec.model)
  params = transformer.init_params(model, rng.key(spec.seed, "init"))
  optimizer = build.make_optimizer(spec.optim, spec.model, params)
  step = jax.jit(
    step_lib.make_train_step(
      step_lib.make_loss_fn(model), step_lib.make_totals_fn(model), optimizer
    ),
    donate_argnums=0,
  )
  evaluate = jax.jit(step_lib.make_eval_step(model))
  schedule = schedules.schedule_arrays(spec.optim.schedule, spec.optim.peak_lr)
  state = step_lib.TrainState(jnp.int32(0), params, optimizer.init(params))
  for i in range(spec.num_steps):
    starts = text.starts(
      spec.weights_at(i), seed=spec.data_seed, step=i, rows=spec.batch_size, seq_len=spec.seq_len
    )
    ids = text.tokens[starts[:, None] + np.arange(spec.seq_len + 1)]
    state, _, _ = step(state, step_lib.whole_rows(ids), schedule)
  rows, total = _rows(text), 0.0
  for at in range(0, EVAL_ROWS, spec.batch_size):
    ids = rows.ids[at : at + spec.batch_size]
    total += float(evaluate(state.params, step_lib.whole_rows(ids))["loss"].sum)
  return total / float(rows.mask.sum())


def _through_runner(batching: engine.Batching):
  def side(
    specs: list[plan.RunSpec], text: corpus.Corpus, folder: str | pathlib.Path
  ) -> list[float]:
    found = run.Runner(text, folder, {"text": _rows(text)}, batching=batching).run(specs)
    losses = [found[spec.name].loss() for spec in specs]
    assert all(map(math.isfinite, losses))
    return losses

  return side


SIDES = {
  "one_by_one": one_by_one,
  "loop": _through_runner("loop"),
  "vmap": _through_runner("vmap"),
}
