"""Runs: a branch is a fresh run bitwise, resume, batches, one JSON a run, refused plans."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.tunnel import corpus, plan, records, run

STEPS = 12


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
  words = np.random.default_rng(0).choice(["alpha ", "beta ", "gamma(", ") "], 2000)
  return corpus.from_texts({"text": ["".join(words)]}, {"text": ["".join(words[:300])]})


def spec(name="trunk", *, lr=0.02, steps=STEPS, decay=0, seed=0, **more) -> plan.RunSpec:
  warmup = 2
  schedule = config.ScheduleConfig(
    warmup_steps=warmup, stable_steps=steps - warmup - decay, decay_steps=decay, min_ratio=0.1
  )
  return plan.RunSpec(
    name=name,
    model=plan.small_model(16, "matrix", head_dim=8, base_width=16, num_layers=1),
    optim=config.OptimConfig(peak_lr=lr, schedule=schedule, weight_decay=0.0),
    num_steps=steps,
    batch_size=4,
    seq_len=16,
    seed=seed,
    data_seed=seed,
    **more,
  )


def runner(text, folder, **more) -> run.Runner:
  rows = {"text": text.heldout_rows("text", num_rows=8, seq_len=16)}
  more = {"chunk_steps": 5, "devices": jax.devices()[:1], **more}
  return run.Runner(text, folder, rows, **more)


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
  """A trunk, two branches of it, and the fresh run of the second branch."""
  folder = tmp_path_factory.mktemp("runs")
  decays = {name: spec(steps=n, decay=3).optim.schedule for name, n in (("a", 8), ("b", STEPS))}
  specs = plan.trunk_and_branches(spec(steps=8), decays)
  specs[2] = dataclasses.replace(specs[2], save_steps=(STEPS,))
  fresh = dataclasses.replace(specs[2], name="fresh", branch_from=None, eval_steps=(4,))
  r = runner(text, folder)
  return r, [*specs, fresh], r.run([*specs, fresh])


def test_a_branch_equals_a_fresh_run_bitwise(done):
  r, (trunk, _, branch, fresh), results = done
  assert trunk.save_steps == (5, 9) and branch.branch_from == ("trunk", 9)
  assert results["trunk-b"].losses["text"][STEPS] == results["fresh"].losses["text"][STEPS]
  a, b = (r.load_state(s, s.name, STEPS) for s in (branch, fresh))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
  assert results["trunk-b"].steps_run == 3 and results["fresh"].steps_run == STEPS
  assert results["trunk-a"].loss() != results["trunk-b"].loss()


def test_training_learns_and_files_say_what_was_run(done):
  r, (_, _, _, fresh), results = done
  first, last = (results["fresh"].loss(step=s) for s in (4, STEPS))
  assert last < first < math.log(128)
  data = json.loads((r.workdir / "runs" / "fresh.json").read_text())
  assert data["spec"]["optim"]["peak_lr"] == 0.02 and data["tokens"] == STEPS * 64
  assert data["non_embedding_params"] == plan.num_params(fresh.model)
  again, result = records.read_result(r.workdir / "runs" / "fresh.json")
  assert again["name"] == "fresh" and result == results["fresh"]
  with pytest.raises(KeyError, match="no loss at step 7"):
    results["fresh"].loss(step=7)


def test_scores_of_saved_states_are_the_losses(done):
  r, (_, _, branch, fresh), results = done
  nats = r.score([branch, fresh], r.rows["text"])
  assert nats.shape == (2, 8)
  assert nats[1].sum() / r.rows["text"].mask.sum() == pytest.approx(results["fresh"].loss())


def test_finished_runs_are_read_and_cut_ones_go_on(done, text, tmp_path):
  r, specs, results = done
  again = runner(text, r.workdir, log=lambda line: pytest.fail(f"ran again: {line}"))
  found = again.run(specs)
  assert {n: x.losses for n, x in found.items()} == {n: x.losses for n, x in results.items()}
  # A run that was cut off after a save goes on from there, to the same end.
  cut = spec("cut", save_steps=(5, STEPS))
  r2 = runner(text, tmp_path)
  whole = r2.run([cut])["cut"]
  end = r2.load_state(cut, "cut", STEPS)
  (tmp_path / "runs" / "cut.json").unlink()
  (tmp_path / "states" / f"cut@{STEPS}.npz").unlink()
  lines = []
  resumed = runner(text, tmp_path, log=lines.append).run([cut])["cut"]
  assert resumed.is_resumed and resumed.losses == whole.losses
  assert resumed.steps_run == STEPS  # 5 before the cut and 7 after it
  for x, y in zip(
    jax.tree.leaves(end), jax.tree.leaves(r2.load_state(cut, "cut", STEPS)), strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_stacked_runs_equal_single_ones(done, text, tmp_path):
  """vmap over learning rates and seeds in one program against the loop."""
  points = [(0.02, 0), (0.08, 0), (0.02, 1)]
  specs = [spec(f"lr{lr}-s{s}", lr=lr, seed=s) for lr, s in points]
  single = runner(text, tmp_path / "loop").run(specs)
  both = runner(text, tmp_path / "vmap", batching="vmap").run(specs)
  for name in single:
    assert both[name].loss() == pytest.approx(single[name].loss(), rel=1e-4)
  assert len({round(x.loss(), 6) for x in both.values()}) == 3


def test_runs_of_one_shape_share_one_compiled_program(text, tmp_path):
  """Rates, schedules, seeds, muP constants, both readings and the standard parameterisation."""
  one = spec("one", steps=4)

  def model(mode, **more) -> config.ModelConfig:
    return plan.small_model(16, mode, head_dim=8, base_width=8, num_layers=1, **more)

  specs = [
    one,
    spec("rate", lr=0.05, steps=4),
    spec("decay", steps=6, decay=2),
    spec("seed", steps=4, seed=1),
    dataclasses.replace(one, name="constants", model=model("matrix", init_std=0.2, scale_emb=3.0)),
    dataclasses.replace(one, name="vector", model=model("vector")),
    dataclasses.replace(
      one, name="sp", model=model("sp"), optim=dataclasses.replace(one.optim, mup=False)
    ),
  ]
  r = runner(text, tmp_path)
  found = r.run(specs)
  (program,) = r._programs.values()
  assert program.advance._cache_size() == program.row_nats._cache_size() == 1
  assert len({result.loss() for result in found.values()}) == len(specs)


def test_runs_are_spread_over_devices(done, text, tmp_path):
  """Two devices give what one gives; `experiments.tunnel --jobs` makes CPU devices."""
  _, specs, results = done
  found = runner(text, tmp_path, devices=jax.devices()[:2]).run(specs)
  assert {n: x.losses for n, x in found.items()} == {n: x.losses for n, x in results.items()}


def test_a_diverged_run_is_infinite_and_does_not_stop_the_others(text, tmp_path):
  specs = [spec("wild", lr=1e30), spec("tame", lr=0.02)]
  found = runner(text, tmp_path).run(specs)
  assert found["wild"].loss() == math.inf and found["wild"].diverged_at is not None
  assert math.isfinite(found["tame"].loss())
  assert runner(text, tmp_path).run(specs)["wild"].loss() == math.inf  # JSON keeps it


def test_branches_of_a_diverged_trunk_are_infinite(text, tmp_path):
  branch = {"a": spec(decay=3).optim.schedule}
  specs = plan.trunk_and_branches(spec(lr=1e30, steps=8), branch)
  found = runner(text, tmp_path, chunk_steps=2).run(specs)
  assert [x.loss() for x in found.values()] == [math.inf, math.inf]


def test_a_run_cut_off_between_its_last_state_and_its_json_is_finished(text, tmp_path):
  whole = spec(save_steps=(STEPS,))
  before = runner(text, tmp_path).run([whole])["trunk"]
  (tmp_path / "runs" / "trunk.json").unlink()
  after = runner(text, tmp_path).run([whole])["trunk"]
  assert after.is_resumed and after.losses == before.losses and after.steps_run == STEPS


def test_other_runs_under_the_same_name_are_refused(done, text):
  r, (trunk, *_), _ = done
  with pytest.raises(records.PlanError, match="is of a run with seed 0, expected 1"):
    r.run([dataclasses.replace(trunk, seed=1)])


def edited(path, change) -> None:
  """The run's file as an older or newer version of the configs would have written it."""
  data = json.loads(path.read_text())
  change(data["spec"])
  path.write_text(json.dumps(data))


def test_files_older_than_a_field_are_read_where_the_run_has_its_default(text, tmp_path):
  one, two = spec("one"), spec("two", seed=2)
  runner(text, tmp_path).run([one, two])

  def age(data):  # fields of four dataclasses that these runs leave at their defaults
    for place, name in ((data, "save_steps"), (data["model"], "sparse")):
      del place[name]
    del data["optim"]["clip_norm"], data["optim"]["schedule"]["decay_shape"]
    del data["phases"][0]["start_step"]

  edited(tmp_path / "runs" / "one.json", age)
  r = runner(text, tmp_path, log=lambda line: pytest.fail(f"ran again: {line}"))
  assert math.isfinite(r.run([one])["one"].loss())
  edited(tmp_path / "runs" / "two.json", lambda data: data.pop("seed"))  # its seed was 2
  with pytest.raises(records.PlanError, match="is of a run with seed 0, expected 2"):
    r.run([two])


@pytest.mark.parametrize(
  "change, match",
  [
    (lambda d: d["model"].pop("model_dim"), "model.model_dim nothing, expected 16"),  # no default
    (lambda d: d["optim"].update(magic=3), "optim.magic 3, expected nothing"),  # no such field now
    (lambda d: d["phases"][0].update(start_step=4), "with phases"),
  ],
)
def test_other_fields_of_a_file_are_refused(text, tmp_path, change, match):
  one = spec("one", steps=4)
  runner(text, tmp_path).run([one])
  edited(tmp_path / "runs" / "one.json", change)
  with pytest.raises(records.PlanError, match=match):
    runner(text, tmp_path).run([one])


@pytest.mark.parametrize(
  "change, match",
  [
    ({"branch_from": ("nobody", 5)}, "no such run"),
    ({"branch_from": ("trunk", 4)}, r"save_steps \(5, 9\)"),
    ({"seed": 3}, "seed: found 3, expected the trunk's 0"),
    ({"optim": spec(lr=0.03, steps=STEPS, decay=3).optim}, "another rate"),
    (
      {"phases": (config.PhaseConfig(weights=(("text", 1.0), ("text2", 0.5))),)},
      "another mixture",
    ),
  ],
)
def test_branches_that_are_no_branches_are_refused(done, change, match):
  r, (trunk, _, branch, _), _ = done
  with pytest.raises(records.PlanError, match=match):
    r.run([trunk, dataclasses.replace(branch, **change)])


def test_queue_runs_configs_and_reads_finished_ones(base_config, tmp_path, monkeypatch):
  cfgs = [
    dataclasses.replace(
      base_config, name=f"q{lr}", num_steps=2, optim=config.OptimConfig(peak_lr=lr)
    )
    for lr in (0.01, 0.02)
  ]
  found = run.queue(cfgs, tmp_path)
  assert [d["step"] for d in found.values()] == [2, 2]
  monkeypatch.setattr(run.loop, "train", lambda *a, **k: pytest.fail("ran again"))
  assert run.queue(cfgs, tmp_path) == found
  with pytest.raises(records.PlanError, match="is of a run with config"):
    run.queue([dataclasses.replace(cfgs[0], seed=5)], tmp_path)
  with pytest.raises(records.PlanError, match="each once"):
    run.queue([cfgs[0], cfgs[0]], tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"spec": {}}'])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
  (tmp_path / "r.json").write_text(text)
  with pytest.raises(records.PlanError, match=r"r\.json: found no record of a run"):
    records.read_result(tmp_path / "r.json")
