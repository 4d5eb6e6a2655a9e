"""Draft objectives against their equations: every row run alone through the draft, no scan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.align import draft as draft_loss
from minicpm_jax.core import trees
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer
from minicpm_jax.optim import schedules
from minicpm_jax.quant import tree as quant_tree
from minicpm_jax.train import step as step_lib
from tests.models import common

T, STEPS, V = 14, 4, 256
SEGMENTS = [[1] * 9 + [2] * 5, [1] * 10 + [0] * 4]


@functools.cache
def target():
  return common.build(common.config(num_layers=3))


@functools.cache
def setup(kind, window=0):
  """(config, draft params, ids, batch) with two packed rows and an uneven loss mask."""
  changes = {"window_size": window}
  changes |= {"draft_vocab_size": 100} if kind == "eagle3" else {}
  draft = draft_lib.for_target(target()[0].cfg, kind, **changes)
  cfg = config.DistillConfig(
    target="x",
    draft=draft,
    optim=config.OptimConfig(),
    data=config.DataConfig(seq_len=T),
    ttt_steps=STEPS,
    noise=0.0,
    ce_weight=0.3,
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    return jnp.asarray(path.endswith("scale") + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

  params = trees.map_with_path(draw, draft_lib.abstract_params(draft)[0])
  ids = np.sort(rng.choice(V, 100, replace=False)) if kind == "eagle3" else None
  segments = np.asarray(SEGMENTS, np.int32)
  tokens = rng.integers(0, V, (2, T)).astype(np.int32)
  batch = {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, 1),
    "segment_ids": segments,
    "positions": np.asarray([[*range(9), *range(5)], [*range(10), *[0] * 4]], np.int32),
    "loss_mask": ((rng.random((2, T)) < 0.8) & (segments > 0)).astype(np.float32),
  }
  return cfg, params, ids, batch


@functools.cache
def seen(kind):
  """(features, logits, scaled embeddings) of the target, as numpy."""
  cfg, _, _, batch = setup(kind)
  model, params = target()
  out = jax.jit(
    lambda p, b: model.apply(
      {"params": p},
      b["tokens"],
      b["positions"],
      b["segment_ids"],
      tap_layers=cfg.draft.feature_layers,
    )
  )(params, batch)
  features = out.taps if cfg.draft.feature_layers else out.hidden
  table = np.asarray(params["embed"]["embedding"]) * model.cfg.scale_emb
  return np.asarray(features), np.asarray(out.logits, np.float64), table


@functools.cache
def free_run(kind, window=0):
  """{(row, t, i): output of step i after row t}: the rows of t's document up to t are committed,
  then step j appends (token t + 1 + j, own output of step j - 1) at position t + j."""
  cfg, params, _, batch = setup(kind, window)
  features, _, table = seen(kind)
  model = draft_lib.DraftModel(cfg.draft)

  @jax.jit
  def one(embedded, feature, positions):  # a committed prefix of 1 and free rows behind, padded
    mask = draft_lib.seen(positions, positions, window)
    tables = draft_lib.position_tables(cfg.draft, jnp.maximum(positions, 0))
    return model.apply({"params": params}, embedded, feature, tables, (), mask)[0]

  fuse = jax.jit(lambda x: model.apply({"params": params}, x, method="fuse"))
  found = {}
  for b in range(2):
    fused = np.asarray(fuse(features[b : b + 1]))[0]
    for t in range(T):
      segment = batch["segment_ids"][b]
      start = int(np.argmax(segment == segment[t]))
      own = []
      for i in range(STEPS):
        at = t + 1 + i
        if segment[t] == 0 or at >= T or segment[at] != segment[t]:
          break
        rows = [(table[batch["tokens"][b, s + 1]], fused[s]) for s in range(start, t + 1)]
        rows += [(table[batch["tokens"][b, t + 1 + j]], own[j - 1]) for j in range(1, i + 1)]
        width = 16
        e, f = (np.zeros((1, width, 32), np.float32) for _ in range(2))
        positions = np.full((1, width), -1, np.int32)
        for n, (x, y) in enumerate(rows):
          e[0, n], f[0, n], positions[0, n] = x, y, n
        own.append(np.asarray(one(e, f, positions))[0, len(rows) - 1])
        found[b, t, i] = own[-1]
  return found


def weight(kind, b, t, i):
  batch = setup(kind)[3]
  segment, at = batch["segment_ids"][b], t + 1 + i
  return float(batch["loss_mask"][b, at]) if at < T and segment[at] == segment[t] else 0.0


def run(kind, window=0, ids=None, **changes):
  cfg, params, own_ids, batch = setup(kind, window)
  ids = own_ids if ids is None else ids
  cfg = dataclasses.replace(cfg, **changes)
  model, target_params = target()
  both = {"draft": params, "target": target_params}
  batch = draft_loss.with_row_seeds(batch, 3)
  ctx = step_lib.LossContext(draft_loss.make_totals_fn(cfg)(batch))
  loss_fn = draft_loss.make_loss_fn(cfg, model, ids)
  (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(both, batch, ctx)
  return float(loss), metrics, grads


def log_softmax(x):
  return x - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True)) - x.max()


@pytest.mark.parametrize(
  "kind, temperature", [pytest.param("eagle", 1.0, marks=pytest.mark.slow), ("minicpm", 0.4)]
)
def test_eagle_loss_is_smooth_l1_plus_soft_cross_entropy(kind, temperature):
  cfg, _, _, _ = setup(kind)
  features, logits, _ = seen(kind)
  model, params = target()
  head = np.asarray(transformer.head_weight(model.cfg, params), np.float64)
  total, weights, hits = 0.0, 0.0, 0.0
  for (b, t, i), g in free_run(kind).items():
    if i == 0:
      w = weight(kind, b, t, 0)
      d = np.abs(g - features[b, t + 1])
      error = np.mean(np.where(d < 1, 0.5 * d**2, d - 0.5))
      q = log_softmax(g.astype(np.float64) @ head / model.cfg.logit_divisor / temperature)
      p = log_softmax(logits[b, t + 1] / temperature)
      total += w * (error + 0.3 * -np.sum(np.exp(p) * q))
      hits, weights = hits + w * (q.argmax() == p.argmax()), weights + w
  loss, metrics, grads = run(kind, loss_temperature=temperature)
  np.testing.assert_allclose(loss, total / weights, rtol=1e-5)
  np.testing.assert_allclose(float(metrics["loss"].sum), total, rtol=1e-5)
  assert (float(metrics["acc_1"].sum), float(metrics["acc_1"].weight)) == (hits, weights)
  assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads["target"])) == 0.0
  assert min(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads["draft"])) > 0.0


def test_a_restricted_loss_renormalises_both_sides_and_chunks_change_nothing():
  """FR-Spec's list in the loss: p and q over its tokens only. The feature loss is untouched."""
  cfg, _, _, _ = setup("minicpm")
  _, logits, _ = seen("minicpm")
  model, params = target()
  ids = np.sort(np.random.default_rng(4).choice(V, 60, replace=False))
  head = np.asarray(transformer.head_weight(model.cfg, params), np.float64)[:, ids]
  ce, hits = 0.0, 0.0
  for (b, t, i), g in free_run("minicpm").items():
    if i == 0:
      q = log_softmax(g.astype(np.float64) @ head / model.cfg.logit_divisor)
      p = log_softmax(logits[b, t + 1][ids])
      ce += weight("minicpm", b, t, 0) * -np.sum(np.exp(p) * q)
      hits += weight("minicpm", b, t, 0) * (ids[q.argmax()] == logits[b, t + 1].argmax())
  whole = run("minicpm", ids=ids)
  np.testing.assert_allclose(float(whole[1]["ce"].sum), ce, rtol=1e-5)
  assert float(whole[1]["acc_1"].sum) == hits
  np.testing.assert_allclose(whole[1]["feature_loss"].sum, run("minicpm")[1]["feature_loss"].sum)
  for kind, more in (("minicpm", {"ids": ids}), ("eagle3", {})):
    parts, full = run(kind, loss_chunk=7, **more), run(kind, **more)
    np.testing.assert_allclose(parts[0], full[0], rtol=1e-6)
    common.assert_trees_close(parts[2]["draft"], full[2]["draft"], atol=1e-6)
  with pytest.raises(ValueError, match="loss_chunk: found 4, expected a divisor of data.seq_len"):
    run("minicpm", loss_chunk=4)


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_eagle3_loss_is_the_decayed_sum_over_free_running_steps(window):
  cfg, params, ids, _ = setup("eagle3", window)
  _, logits, _ = seen("eagle3")
  norm, head = (
    np.asarray(params[n][k], np.float64) for n, k in (("norm", "scale"), ("lm_head", "kernel"))
  )
  sums, weights = np.zeros(STEPS), np.zeros(STEPS)
  for (b, t, i), h in free_run("eagle3", window).items():
    x = h.astype(np.float64)
    x = x / np.sqrt(np.mean(x * x) + cfg.draft.layer.norm_eps) * norm
    w = weight("eagle3", b, t, i)
    weights[i] += w
    if logits[b, t + 1 + i].argmax() in ids:
      p = log_softmax(logits[b, t + 1 + i][ids])
      sums[i] += w * -np.sum(np.exp(p) * log_softmax(x @ head))
  loss, metrics, grads = run("eagle3", window)
  assert 0 < sums.min() and len(set(weights)) == STEPS
  np.testing.assert_allclose(loss, np.sum(0.8 ** np.arange(STEPS) * sums / weights), rtol=2e-5)
  np.testing.assert_allclose(float(metrics["acc_4"].weight), weights[3])
  assert min(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads["draft"])) > 0.0


def test_acceptance_is_a_free_run_on_the_text():
  """A draft whose head says the target's own choice at step 0 is right there; then only where the
  text is that choice does the run go on. Counted by hand from the free run."""
  cfg, params, _, batch = setup("minicpm")
  _, logits, _ = seen("minicpm")
  model, target_params = target()
  head = np.asarray(transformer.head_weight(model.cfg, target_params))
  # Text that mostly follows the draft, so that later steps have rows left.
  drafts = {key: int(np.argmax(h @ head)) for key, h in free_run("minicpm").items()}
  alive = {(b, t): 1.0 for b in range(2) for t in range(T)}
  hits, weights = np.zeros(5), np.zeros(5)
  for i in range(STEPS):
    for (b, t), w in list(alive.items()):
      w *= weight("minicpm", b, t, i)
      alive[b, t] = 0.0
      if w:
        is_hit = drafts[b, t, i] == logits[b, t + 1 + i].argmax()
        hits[i], weights[i] = hits[i] + is_hit, weights[i] + 1
        is_text = t + 2 + i < T and drafts[b, t, i] == batch["tokens"][b, t + 2 + i]
        alive[b, t] = float(is_hit and is_text)
  fn = draft_loss.make_acceptance_fn(dataclasses.replace(cfg, eval_depth=STEPS), model)
  found = jax.jit(fn)({"draft": params, "target": target_params}, batch)
  for i in range(STEPS):
    assert float(found[f"acc_{i + 1}"].sum) == hits[i]
    assert float(found[f"acc_{i + 1}"].weight) == weights[i]
  assert weights[0] > 10


def test_noise_is_uniform_scaled_by_length_and_a_function_of_the_step():
  seeds = draft_loss.with_row_seeds(setup("eagle")[3], 3)["row_seed"]
  assert seeds.shape == (2, T) and seeds[0, 0] == 6 and seeds[1, 0] == 7

  def draw(seeds, width):
    return np.asarray(draft_loss.feature_noise(jnp.asarray(seeds), (*seeds.shape, width), 0.2, 5))

  noise, width = draw(np.repeat(seeds[:1, :1], 64, 1), 500), 0.2 * 512 / 64
  assert np.abs(noise).max() <= width / 2
  np.testing.assert_allclose(noise.std(), width / np.sqrt(12), rtol=0.02)
  np.testing.assert_array_equal(draw(seeds, 8), draw(seeds, 8))
  assert np.abs(draw(seeds, 8) - draw(seeds + 2, 8)).max() > 0.1
  with pytest.raises(ValueError, match="found no row_seed"):
    cfg, params, _, batch = setup("eagle")
    loss_fn = draft_loss.make_loss_fn(dataclasses.replace(cfg, noise=0.2), target()[0])
    ctx = step_lib.LossContext({})
    loss_fn({"draft": params, "target": target()[1]}, batch, ctx)


def test_int4_training_equals_a_fake_quant_callable_and_the_stored_codes():
  cfg, params, _, batch = setup("minicpm")
  model, target_params = target()
  int4 = draft_lib.quantized(cfg.draft, group_size=16)
  selected = quant_tree.selected(int4.layer.quant, params)
  assert set(selected) == {"fc/kernel"} | {
    f"layers_0/{n}/kernel"
    for n in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
  }
  quant = dataclasses.replace(int4.layer.quant, weights="codes")
  ctx = step_lib.LossContext(draft_loss.make_totals_fn(cfg)(batch))

  def rounded(params):
    return quant_tree.dequantize_params(quant_tree.quantize_params(quant, params), jnp.float32)

  losses = []
  for draft, fake in ((int4, None), (cfg.draft, rounded), (cfg.draft, None)):
    fn = draft_loss.make_loss_fn(dataclasses.replace(cfg, draft=draft), model, None, fake)
    losses.append(float(jax.jit(fn)({"draft": params, "target": target_params}, batch, ctx)[0]))
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
  assert abs(losses[0] - losses[2]) > 1e-4


def test_a_train_step_moves_the_draft_alone():
  cfg, params, ids, batch = setup("eagle3")
  cfg = dataclasses.replace(cfg, ttt_steps=2, optim=config.OptimConfig(mup=False, clip_norm=0.0))
  model, target_params = target()
  both = {"draft": params, "target": target_params}
  optimizer = draft_loss.make_optimizer(cfg, both)
  step = step_lib.make_train_step(
    draft_loss.make_loss_fn(cfg, model, ids), draft_loss.make_totals_fn(cfg), optimizer
  )
  state = step_lib.TrainState(jnp.int32(0), both, optimizer.init(both))
  moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x) > 0]
  assert sum(x.size for x in moments) == 2 * trees.num_params(params)  # none for the target
  schedule = schedules.schedule_arrays(config.ScheduleConfig(warmup_steps=0, stable_steps=9), 0.01)
  state, metrics, _ = jax.jit(step)(state, batch, schedule)
  common.assert_trees_close(state.params["target"], target_params, atol=0, rtol=0)
  moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params["draft"], params)
  assert min(jax.tree.leaves(moved)) > 0
