"""BiTA's objective against float64 numpy, one group at a time; a run resumes, loads and drafts."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _regenerate, distill_draft
from minicpm_jax import ckpt, config
from minicpm_jax.align import bita as bita_loss
from minicpm_jax.align import draft as draft_loss
from minicpm_jax.align import draft_run
from minicpm_jax.data import documents, shards
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import bita as bita_drafter
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import transformer
from minicpm_jax.train import step as step_lib
from tests.infer import bita_cases
from tests.models import common

T, V = 14, 256
SEGMENTS = [[1] * 9 + [2] * 5, [1] * 10 + [0] * 4]


@functools.cache
def target(num_layers=2):
  return common.build(common.config(num_layers=num_layers))


@functools.cache
def setup():
  """(config, draft params, batch) with two packed rows and an uneven loss mask."""
  draft = bita_lib.for_target(target()[0].cfg, num_prompts=4)
  optim = config.OptimConfig(mup=False)
  cfg = config.DistillConfig(target="x", draft=draft, optim=optim, num_groups=6, eval_depth=3)
  rng = np.random.default_rng(0)
  segments = np.asarray(SEGMENTS, np.int32)
  tokens = rng.integers(0, V, (2, T)).astype(np.int32)
  batch = {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, 1),
    "segment_ids": segments,
    "positions": np.asarray([[*range(9), *range(5)], [*range(10), *[0] * 4]], np.int32),
    "loss_mask": ((rng.random((2, T)) < 0.8) & (segments > 0)).astype(np.float32),
  }
  batch["loss_mask"][0, 8] = 0  # no target beyond the end of a document, as packing makes it
  return cfg, jax.tree.map(jnp.asarray, bita_cases.params_of(draft)), batch


def groups_of(batch, b, end):
  """(weights [M], masks' logits [M, V], target's logits of the text [M, V]) by full forwards."""
  model, params = target()
  _, draft, _ = setup()
  segment = batch["segment_ids"][b]
  start = int(np.argmax(segment == segment[end]))
  context = batch["tokens"][b, start : end + 1]
  said = bita_cases.after(model.cfg, params, draft, context)[1:]
  weight, own = np.zeros(3), np.zeros((3, V))
  for i in range(3):
    at = end + 1 + i
    if at < T and segment[at] == segment[end] != 0:
      weight[i] = batch["loss_mask"][b, at]
      text = batch["tokens"][b, start : at + 1]
      own[i] = bita_cases.after(model.cfg, params, draft, text)[0]
  return weight, said, own


def test_places_are_consecutive_random_and_a_function_of_the_step():
  cfg, _, batch = setup()
  firsts = set()
  for step in range(40):
    found = bita_loss.place(draft_loss.with_row_seeds(batch, step), cfg)
    again = bita_loss.place(draft_loss.with_row_seeds(batch, step), cfg)
    np.testing.assert_array_equal(found.end_BR, again.end_BR)
    ends = np.asarray(found.end_BR)
    assert ends.shape == (2, 18) and (np.diff(ends[:, ::3]) == 1).all()
    assert ends.min() >= 0 and ends.max() <= T - 2
    assert (found.column_BR == ends + np.tile([1, 2, 3], 6)).all()
    firsts |= set(ends[:, 0].tolist())
  assert firsts == set(range(T - 6))


def test_loss_is_the_mean_cross_entropy_of_all_masks():
  cfg, draft, batch = setup()
  model, params = target()
  batch = draft_loss.with_row_seeds(batch, 1)
  ends = np.asarray(bita_loss.place(batch, cfg).end_BR)[:, ::3]
  total, weights, hits = 0.0, np.zeros(3), np.zeros(3)
  for b in range(2):
    for end in ends[b]:
      weight, said, _ = groups_of(batch, b, int(end))
      for i in np.flatnonzero(weight):
        wanted = batch["tokens"][b, end + 2 + i]
        logp = said[i] - np.log(np.sum(np.exp(said[i] - said[i].max()))) - said[i].max()
        total -= weight[i] * logp[wanted]
        hits[i] += weight[i] * (said[i].argmax() == wanted)
      weights += weight
  both = {"draft": draft, "target": params}
  ctx = step_lib.LossContext(bita_loss.make_totals_fn(cfg)(batch))
  loss_fn = jax.jit(jax.value_and_grad(bita_loss.make_loss_fn(cfg, model), has_aux=True))
  (loss, metrics), grads = loss_fn(both, batch, ctx)
  assert len(set(weights)) > 1
  np.testing.assert_allclose(float(loss), total / weights.sum(), rtol=1e-5)
  for i in range(3):
    found = metrics[f"acc_{i + 1}"]
    assert (float(found.sum), float(found.weight)) == (hits[i], weights[i])
  assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads["target"])) == 0.0
  assert min(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads["draft"])) > 0.0


def test_acceptance_goes_on_where_mask_target_and_text_agree():
  """Counted by hand; the text is bent so that later masks have groups left."""
  cfg, draft, batch = setup()
  model, params = target()
  batch = {name: x.copy() for name, x in batch.items()}
  ends = [i * (T - 1) // 6 for i in range(6)]
  hits, weights = np.zeros(3), np.zeros(3)
  for b in range(2):
    for end in ends:
      weight, said, own = groups_of(batch, b, end)
      alive = 1.0
      for i in range(3):
        alive *= weight[i]
        is_hit = said[i].argmax() == own[i].argmax()
        hits[i], weights[i] = hits[i] + alive * is_hit, weights[i] + alive
        at = end + 2 + i
        alive *= float(is_hit and at < T and said[i].argmax() == batch["tokens"][b, at])
  fn = jax.jit(bita_loss.make_acceptance_fn(cfg, model))
  found = fn({"draft": draft, "target": params}, batch)
  for i in range(3):
    assert float(found[f"acc_{i + 1}"].sum) == hits[i]
    assert float(found[f"acc_{i + 1}"].weight) == weights[i]
  assert weights[0] > 3


def source(folder, name, step):
  """Documents that count: `step` apart modulo 40, so that three tokens ahead can be known."""
  rng = np.random.default_rng(step)
  texts = [
    " ".join(str((start + step * i) % 40) for i in range(48)) for start in rng.integers(0, 40, 24)
  ]
  ids = _regenerate.Ids(V)
  shards.prepare(
    documents.from_texts(texts), folder / name, name=name, tokenizer=ids, add_eos=False
  )
  return config.SourceConfig(name=name, path=str(folder / name))


def test_a_run_learns_resumes_and_what_it_leaves_drafts(tmp_path):
  """Masks of counting text learn on a random target; resuming is bitwise; weights load."""
  model, params = target()
  draft = bita_lib.for_target(model.cfg, num_prompts=4)
  cfg = config.DistillConfig(
    target="in memory",
    draft=draft,
    optim=config.OptimConfig(
      peak_lr=0.03, schedule=config.ScheduleConfig(warmup_steps=1, stable_steps=60), mup=False
    ),
    data=config.DataConfig(
      sources=(source(tmp_path, "text", 1), source(tmp_path, "held", 1)),
      phases=(config.PhaseConfig(weights=(("text", 1.0),)),),
      seq_len=48,
      batch_size=8,
    ),
    checkpoint=config.CheckpointConfig(every_steps=10),
    num_groups=16,
    eval_depth=3,
    eval_sources=("held",),
    eval_batches=1,
    eval_every=20,
    log_every=5,
    num_steps=20,
  )
  straight = draft_run.train(cfg, tmp_path / "a", target=(model, params, None))
  draft_run.train(
    dataclasses.replace(cfg, num_steps=10), tmp_path / "b", target=(model, params, None)
  )
  again = draft_run.train(cfg, tmp_path / "b", target=(model, params, None))
  common.assert_trees_close(again.params, straight.params, atol=0, rtol=0)
  losses = [
    json.loads(line)["loss"]
    for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    if '"loss"' in line
  ]
  assert len(losses) == 4 and losses == sorted(losses, reverse=True)
  loaded = ckpt.load_bita(tmp_path / "b" / "draft", model.cfg)
  common.assert_trees_close(loaded.params, straight.params, atol=0, rtol=0)
  drafter, weights = bita_drafter.make(loaded, model, params)
  sizes = config.EngineConfig(capacity=128, min_span=256, chunk_size=16)
  engine = engine_lib.Engine(model, params, sizes, drafter=drafter, draft_params=weights)
  sampling = config.SamplingConfig(max_new_tokens=16)
  out = engine.generate([[1, 2, 3, 4]], sampling)
  assert (
    out.tokens == engine_lib.Engine(model, params, sizes).generate([[1, 2, 3, 4]], sampling).tokens
  )


def test_flags_that_a_draft_without_a_layer_has_not(tmp_path, capsys):
  from minicpm_jax.ckpt import orbax_io

  model, params = target()
  orbax_io.import_params(tmp_path / "target", model.cfg, params)
  text = source(tmp_path, "text", 1)
  common_args = ["x", f"--target={tmp_path / 'target'}", "--kind=bita", f"--data=text:{text.path}"]
  assert distill_draft.main([*common_args, f"--workdir={tmp_path / 'a'}", "--int4=16"]) == 1
  assert "found one with --kind=bita" in capsys.readouterr().err


def test_a_target_that_scales_with_the_length_reads_the_text_as_without_masks():
  """Text as long as its positions without scaling; with the masks behind it, it would be longer."""
  cfg, draft, batch = setup()
  model, params = target()
  longest = int(batch["positions"].max()) + 1
  scaled = config.RopeConfig(kind="dynamic", factor=4.0)
  model = transformer.Transformer(dataclasses.replace(model.cfg, rope=scaled, max_position=longest))
  inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
  expected = common.apply(model, params, *inputs).hidden
  both = {"draft": draft, "target": params}
  _, found = bita_loss.mask_logits(model, both, batch, bita_loss.place(batch, cfg))
  real = batch["segment_ids"] > 0
  np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("field, value", [("loss_vocab_size", 8), ("stored_rows", 64)])
def test_fields_of_other_kinds_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}: found {value}, expected .* for bita"):
    dataclasses.replace(setup()[0], **{field: value})
