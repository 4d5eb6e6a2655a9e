"""Whole runs: resume, branch, other meshes, SIGTERM, refusals. All in float32 on 8 CPU devices."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io, run_config
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.data import iterator, sources
from minicpm_jax.models import transformer
from minicpm_jax.train import evaluate, loop, start, stop, window
from minicpm_jax.train import step as step_lib
from tests import words

ROOT = pathlib.Path(__file__).parents[2]


def losses(workdir):
  return {r["step"]: r["loss"] for r in logging_lib.read_metrics(workdir) if "loss" in r}


def assert_same_state(a, b, rtol=0.0, atol=0.0):
  a, b = (trees.flatten_paths(jax.device_get(x)) for x in (a, b))
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_allclose(a[path], b[path], rtol=rtol, atol=atol, err_msg=path)


def saved_data(workdir, step):
  with orbax_io.CheckpointStore(workdir, is_read_only=True) as store:
    return store.data(step)


@pytest.fixture(scope="module")
def straight(train_config, tmp_path_factory):
  """(workdir, result) of the six steps without a stop; c is evaluated at steps 3 and 6."""
  workdir = tmp_path_factory.mktemp("straight")
  cfg = dataclasses.replace(
    train_config, eval_sources=("c",), eval_every=3, eval_batches=0, source_losses=True
  )
  return workdir, loop.train(cfg, workdir)


def test_a_run_leaves_its_record(straight, train_config):
  workdir, result = straight
  assert result.step == 6 and not result.is_stopped
  rows = logging_lib.read_metrics(workdir)
  steps = {r["step"]: r for r in rows if "loss" in r}
  assert sorted(steps) == [1, 2, 3, 4, 5, 6]
  # WSD by hand: warm-up 1, flat to 3, then 0.1^(s/3).
  rates = [0.02, 0.02, 0.02] + [0.02 * 0.1 ** (s / 3) for s in (1, 2, 3)]
  np.testing.assert_allclose([steps[s]["learning_rate"] for s in range(1, 7)], rates, rtol=1e-5)
  # Source b comes with the decay; half of the rows each, so the losses average to the whole.
  assert [sorted(k for k in steps[s] if k[:7] == "source_") for s in (3, 6)] == [
    ["source_loss/a"],
    ["source_loss/a", "source_loss/b"],
  ]
  assert steps[3]["source_loss/a"] == pytest.approx(steps[3]["loss"], rel=1e-5)
  halves = (steps[6]["source_loss/a"] + steps[6]["source_loss/b"]) / 2
  assert halves == pytest.approx(steps[6]["loss"], rel=0.02)
  assert steps[6]["tokens_seen"] == 6 * 8 * 32 and steps[6]["tokens_per_second"] > 0
  assert list(workdir.glob("tensorboard/events*"))
  cfg = run_config.read(workdir)
  more = dict(eval_sources=("c",), eval_every=3, eval_batches=0, source_losses=True)
  assert cfg == dataclasses.replace(train_config, **more)
  text = (workdir / "config.py").read_text()
  assert f"jax {jax.__version__}" in text and "revision:" in text and "8 x cpu" in text
  namespace = {}
  exec(text, namespace)  # and it is Python that runs
  assert namespace["get_config"]() == cfg


def test_held_out_loss_and_bits_per_byte(straight, train_config):
  """Against logits of the loaded checkpoint, over the documents of source c."""
  workdir, result = straight
  model, params, _ = orbax_io.load_run(f"{workdir}@6")
  total = count = 0.0
  for batch in iterator.make_eval_iterator(train_config.data, "c", None):
    out = model.apply(
      {"params": params},
      *(jax.numpy.asarray(batch[k]) for k in ("tokens", "positions", "segment_ids")),
    )
    logits = np.asarray(out.logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    total += ((log_z - picked) * batch["loss_mask"]).sum()
    count += batch["loss_mask"].sum()
  assert result.values["eval/c/loss"] == pytest.approx(total / count, rel=1e-5)
  source = next(s for s in train_config.data.sources if s.name == "c")
  index = json.loads((pathlib.Path(source.path) / "index.json").read_text())
  bits = total / count / math.log(2) * index["num_tokens"] / index["text_bytes"]
  assert result.values["eval/c/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_resume_is_bitwise_across_the_phase_switch(straight, train_config, tmp_path):
  workdir, whole = straight
  loop.train(dataclasses.replace(train_config, num_steps=2), tmp_path)
  resumed = loop.train(train_config, tmp_path)
  assert_same_state(resumed.state, whole.state)
  assert losses(tmp_path) == losses(workdir)
  assert saved_data(tmp_path, 6) == saved_data(workdir, 6)
  again = loop.train(train_config, tmp_path)  # nothing left to do
  assert_same_state(again.state, whole.state)
  assert again.values["loss"] == whole.values["loss"]


def test_branch_of_the_stable_stage_equals_a_fresh_wsd_run(straight, train_config, tmp_path):
  """A trunk without decay or second mixture, branched at step 3, is bitwise the straight run."""
  workdir, whole = straight
  schedule = dataclasses.replace(train_config.optim.schedule, stable_steps=9, decay_steps=0)
  trunk = dataclasses.replace(
    train_config,
    optim=dataclasses.replace(train_config.optim, schedule=schedule),
    data=dataclasses.replace(train_config.data, phases=train_config.data.phases[:1]),
    num_steps=4,
  )
  loop.train(trunk, tmp_path / "trunk")
  branch = dataclasses.replace(train_config, branch_from=f"{tmp_path / 'trunk'}@3")
  result = loop.train(branch, tmp_path / "branch")
  assert_same_state(result.state, whole.state)
  assert losses(tmp_path / "branch") == {s: v for s, v in losses(workdir).items() if s > 3}
  assert result.values["tokens_seen"] == whole.values["tokens_seen"]


def test_resume_on_another_mesh(straight, train_config, tmp_path):
  workdir, whole = straight
  loop.train(dataclasses.replace(train_config, num_steps=3), tmp_path)
  moved = dataclasses.replace(train_config, mesh=config.MeshConfig(dp=1, fsdp=4, tp=2))
  result = loop.train(moved, tmp_path)
  kernel = result.state.params["layers"]["mlp"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 8
  assert_same_state(result.state.params, whole.state.params, rtol=1e-4, atol=1e-5)


def test_weights_of_another_run_start_a_new_one(straight, train_config, tmp_path, capsys):
  """Weights only: step 0, fresh moments; the head is untied and an MTP head added on request."""
  workdir, _ = straight
  model = dataclasses.replace(train_config.model, tie_embeddings=False, mtp=config.MTPConfig())
  cfg = dataclasses.replace(
    train_config, model=model, init_from=f"{workdir}@6", num_steps=1, profile_steps=(0, 1)
  )
  result = loop.train(cfg, tmp_path)
  assert "weights of" in capsys.readouterr().out
  _, params, _ = orbax_io.load_run(workdir)
  before, after = (np.asarray(p["final_norm"]["scale"]) for p in (params, result.state.params))
  # One AdamW step of 0.02 on scales (muP factor 1) moves each by at most that.
  assert 0 < np.abs(after - before).max() < 0.0201
  assert result.state.params["lm_head"]["kernel"].shape == (32, 64)
  assert int(result.state.step) == 1 and "mtp_loss" in result.values
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_initial_weights_of_another_shape_name_the_tensor(straight, train_config, tmp_path):
  model = dataclasses.replace(train_config.model, mlp_dim=96)
  cfg = dataclasses.replace(train_config, model=model, init_from=str(straight[0]))
  with pytest.raises(ValueError, match=r"mlp/down/kernel: found \[2, 64, 32\], expected \[2, 96"):
    loop.train(cfg, tmp_path / "new")
  assert not (tmp_path / "new").exists()
  cfg = dataclasses.replace(train_config, init_from=str(tmp_path))
  with pytest.raises(ValueError, match="expected a run folder"):
    loop.train(cfg, tmp_path / "new")


def test_a_workdir_of_another_config_is_refused(straight, train_config):
  workdir, _ = straight
  before = (workdir / "config.py").read_text()
  other = dataclasses.replace(
    train_config, seed=1, model=dataclasses.replace(train_config.model, num_layers=3)
  )
  with pytest.raises(start.WorkdirError) as error:
    loop.train(other, workdir)
  assert "model.num_layers: found 2, expected 3" in str(error.value)
  assert "seed: found 0, expected 1" in str(error.value)
  longer = dataclasses.replace(train_config.optim.schedule, stable_steps=5)
  other = dataclasses.replace(
    train_config, optim=dataclasses.replace(train_config.optim, schedule=longer)
  )
  with pytest.raises(start.WorkdirError, match="step 4 trained with another learning rate"):
    loop.train(other, workdir)
  assert (workdir / "config.py").read_text() == before


def test_a_workdir_without_a_checkpoint_takes_another_config(train_config, tmp_path):
  """A first start that did not get anywhere (out of memory, Ctrl-C) does not block the folder."""
  run_config.write(tmp_path, dataclasses.replace(train_config, seed=1))
  assert start.check_workdir(tmp_path, train_config) == ["seed: 1 -> 0"]
  (tmp_path / "checkpoints" / "0").mkdir(parents=True)
  with pytest.raises(start.WorkdirError, match="seed: found 1, expected 0"):
    start.check_workdir(tmp_path, train_config)


def test_past_batches_of_another_mixture_are_refused(straight, train_config, tmp_path, capsys):
  """Resuming insists on the data order; a branch goes on from the cursors and says so."""
  workdir, _ = straight
  phases = (dataclasses.replace(train_config.data.phases[0], weights=(("b", 1.0),)),)
  data = dataclasses.replace(train_config.data, phases=phases)
  cfg = dataclasses.replace(train_config, data=data, num_steps=7)
  with pytest.raises(iterator.DataStateError, match="sources|weights"):
    loop.train(cfg, workdir)
  assert run_config.read(workdir).data.phases == train_config.data.phases
  assert loop.train(dataclasses.replace(cfg, branch_from=str(workdir)), tmp_path).step == 7
  assert "sources go on from their cursors" in capsys.readouterr().out


def test_a_small_vocabulary_is_refused(train_config, tmp_path):
  cfg = dataclasses.replace(
    train_config, model=dataclasses.replace(train_config.model, vocab_size=48)
  )
  with pytest.raises(ValueError, match="model.vocab_size: found 48, expected at least 64"):
    loop.train(cfg, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_ids_that_the_model_lacks_are_refused_wherever_they_come_from(train_config, tmp_path):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  cfg, workdir = train_config, tmp_path / "run"
  big = [[2, 3, 64, 5]] * 40
  pq.write_table(pa.table({"tokens": big}), tmp_path / "known.parquet")
  pq.write_table(pa.table({"tokens": big}), tmp_path / "unknown.parquet", write_statistics=False)
  known, unknown = (
    config.SourceConfig(name="c", path=str(tmp_path / f"{n}.parquet")) for n in ("known", "unknown")
  )
  a, b, _ = cfg.data.sources

  def with_sources(*sources, **changes):
    return dataclasses.replace(
      cfg, data=dataclasses.replace(cfg.data, sources=sources), num_steps=1, **changes
    )

  too_big = "model.vocab_size: found 64, expected at least 65, the vocabulary of the data"
  with pytest.raises(ValueError, match=too_big):  # held out
    loop.train(with_sources(a, b, known, eval_sources=("c",)), workdir)
  with pytest.raises(ValueError, match=too_big):  # trained on
    loop.train(with_sources(dataclasses.replace(known, name="a"), b), workdir)
  assert not workdir.exists()
  row = "source [ac]: found token id 64, expected ids below model.vocab_size 64"
  hidden = with_sources(dataclasses.replace(unknown, name="a"), b).data
  with pytest.raises(ValueError, match=row):  # nothing in the file says so: found in the row
    next(iterator.make_iterator(hidden, vocab_size=64))
  batches = iterator.make_eval_iterator(
    with_sources(a, b, unknown).data, "c", num_batches=1, vocab_size=64
  )
  with pytest.raises(ValueError, match=row):
    next(batches)

  class Large(words.NumberTokenizer):
    vocab_size = 70

  with pytest.raises(ValueError, match="found 64, expected at least 70, the size of the tokenizer"):
    loop.train(cfg, workdir, tok=Large())
  assert not workdir.exists()


def test_bits_per_byte_of_no_source(train_config):
  with pytest.raises(ValueError, match="name: found 'nobody', expected one of"):
    evaluate.tokens_per_byte(train_config.data, "nobody")


def test_a_parquet_source_is_evaluated_without_bits_per_byte(straight, train_config, tmp_path):
  """The same documents as Parquet: the loss of the shards, but no bytes are recorded."""
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  _, result = straight
  shard = train_config.data.sources[2]
  source = sources.open_source("c", shard.path)
  rows = [source[i].tolist() for i in range(len(source))]
  pq.write_table(pa.table({"tokens": rows}), tmp_path / "c.parquet")
  parquet = dataclasses.replace(shard, path=str(tmp_path / "c.parquet"))
  data = dataclasses.replace(train_config.data, sources=(*train_config.data.sources[:2], parquet))
  cfg = dataclasses.replace(train_config, data=data, eval_sources=("c",), eval_batches=0)
  mesh = mesh_lib.make_mesh(cfg.mesh)
  with jax.set_mesh(mesh):
    step = step_lib.make_eval_step(transformer.Transformer(cfg.model))
    found = evaluate.evaluate(jax.jit(step), result.state.params, cfg, mesh)
  assert sorted(found) == ["eval/c/accuracy", "eval/c/loss"]
  assert found["eval/c/loss"] == pytest.approx(result.values["eval/c/loss"], rel=1e-5)


def test_a_non_finite_loss_stops_the_run_with_a_diagnosis(train_config, tmp_path):
  """A learning rate of 1e30 breaks step 2 or 3; nothing of the broken state is saved."""
  cfg = dataclasses.replace(
    train_config,
    optim=dataclasses.replace(train_config.optim, peak_lr=1e30),
    checkpoint=config.CheckpointConfig(every_steps=1),
  )
  with pytest.raises(window.NonFiniteError) as error:
    loop.train(cfg, tmp_path)
  text = str(error.value)
  step = int(text.split(":")[0].removeprefix("step "))
  assert "loss nan" in text or "gradient norm nan" in text or "inf" in text
  assert "embed/embedding" in text and "lower optim.peak_lr" in text
  assert f"last good checkpoint is step {step - 1}" in text
  assert orbax_io.latest_step(tmp_path) == step - 1
  _, params, _ = orbax_io.load_run(tmp_path)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_one_leaf_that_is_not_finite_is_named():
  metric = loop.metrics_lib.Metric
  metrics = {"total_loss": metric(2.0, 1), "loss": metric(2.0, 1), "learning_rate": metric(0.1, 1)}
  metrics["grad_norm"] = metric(float("inf"), 1)
  norms = {"layers/attn/q/kernel": float("inf"), "layers/attn/k/kernel": 3.0}
  with pytest.raises(window.NonFiniteError) as error:
    window.check_finite(5, metrics, norms, last_loss=1.5, last_good=lambda: "none")
  assert "not finite in 1 of 2 leaves: layers/attn/q/kernel" in str(error.value)
  assert "layers/attn/k/kernel 3" in str(error.value) and "step before: 1.5" in str(error.value)


SCRIPT = """
import signal, sys
from minicpm_jax.ckpt import run_config
from minicpm_jax.train import loop, stop
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
cfg, workdir = run_config.read(sys.argv[1]), sys.argv[1] + "/run"
assert loop.train(cfg, workdir).is_stopped
try:
  loop.train(cfg, workdir)
except KeyboardInterrupt as error:
  assert isinstance(error, stop.Stopped) and "starting again goes on" in str(error)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  print("interrupted")
"""


def test_sigterm_and_ctrl_c_save_and_leave(straight, train_config, tmp_path):
  """A run of a million steps is told to stop, starts again, is interrupted, then resumed for two
  more."""
  cfg = dataclasses.replace(
    train_config,
    num_steps=10**6,
    checkpoint=config.CheckpointConfig(every_steps=0),
    optim=dataclasses.replace(train_config.optim, schedule=config.ScheduleConfig(warmup_steps=1)),
  )
  run_config.write(tmp_path, cfg)
  process = subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(tmp_path)],
    cwd=ROOT,
    env=dict(os.environ),  # conftest's flags: the same programs, from the same cache
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  log, deadline, last = tmp_path / "run" / "metrics.jsonl", time.time() + 240, 0
  for number in (signal.SIGTERM, signal.SIGINT):
    while time.time() < deadline and not _has_step(log, last + 1):
      assert process.poll() is None, process.communicate()[1][-2000:]
      time.sleep(0.1)
    process.send_signal(number)
    while time.time() < deadline and orbax_io.latest_step(tmp_path / "run") <= last:
      assert process.poll() is None or number == signal.SIGINT, process.communicate()[1][-2000:]
      time.sleep(0.1)
    last = orbax_io.latest_step(tmp_path / "run")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err[-2000:]
  assert "SIGTERM: saved step " in out and f"Ctrl-C: saved step {last} " in out
  assert out.endswith("interrupted\n") and "once more: leave at once" in err
  result = loop.train(dataclasses.replace(cfg, num_steps=last + 2), tmp_path / "run")
  assert result.step == last + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_behind_the_last_step_is_not_lost(number, train_config, tmp_path, monkeypatch):
  """What comes next is the caller's: the evaluation of the last step is done, no other run starts.

  Ctrl-C may end the reader of stderr too (`2>&1 | tee log`): its pipe is broken here.
  """
  cfg = dataclasses.replace(train_config, num_steps=2, eval_sources=("c",), eval_batches=1)
  evaluate, (reader, writer), stderr = loop._Run._evaluate, os.pipe(), os.dup(2)
  os.close(reader)

  def told_to_stop(run):
    os.dup2(writer, 2)
    try:
      signal.raise_signal(number)
    finally:
      os.dup2(stderr, 2)
    evaluate(run)

  monkeypatch.setattr(loop._Run, "_evaluate", told_to_stop)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(stop.Stopped, match="stopped at step 2"):
      loop.train_to_end(cfg, tmp_path)
  finally:
    signal.signal(signal.SIGINT, before)
    os.close(writer)
    os.close(stderr)
  assert orbax_io.latest_step(tmp_path) == 2
  assert any("eval/c/loss" in row for row in logging_lib.read_metrics(tmp_path))


def test_a_tokenizer_of_another_vocabulary_is_refused(train_config):
  def of(size, digest="x"):
    return types.SimpleNamespace(vocab_size=size, tokenizer_hash=digest)

  start.check_tokenizer(of(30), train_config, {"web": of(30), "parquet": of(7, None)})
  with pytest.raises(ValueError, match="found 30 tokens, expected the 31 .* source web was made"):
    start.check_tokenizer(of(30), train_config, {"web": of(31)})


def test_a_workdir_that_is_a_model_folder_is_refused(train_config, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(start.WorkdirError, match="found config.json of a Hugging Face folder"):
    loop.train(train_config, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def _has_step(log, step):
  return log.exists() and any(
    json.loads(line)["step"] >= step for line in log.read_text().split("\n")[:-1]
  )
