"""The QAT study at a few steps: arms share rows and stages, the report can be continued."""

import json

import jax
import numpy as np
import pytest

from experiments import _qat_study as study_lib
from experiments import _qat_study_report as report_lib
from minicpm_jax import config
from minicpm_jax.core import files
from minicpm_jax.models import transformer


@pytest.mark.slow
def test_arms_branch_from_one_run_and_land_in_the_report(tmp_path):
  size = study_lib.Size(steps=10, rows=2, length=16, dim=32, layers=1, eval_windows=16)
  study = study_lib.Study(size)
  np.testing.assert_array_equal(study.rows(1, 3, 5)[1], study.rows(1, 4, 5)[0])
  none = config.QuantConfig(scheme="ternary", include=("attn/q/kernel$",))
  arms = [
    study_lib.Arm("full precision", 0.0, None),
    study_lib.Arm("ternary 40%", 0.5, none, rewarmup=0.1),  # equal parts: one compilation
    study_lib.Arm("decoupled distillation", 0.5, none, rewarmup=0.1, distilled=0.4),
    study_lib.Arm("throughout", 0.5, none, rewarmup=0.1, distilled=1.0),
  ]
  qat, taught = (study_lib.Stage(0.5, is_taught) for is_taught in (False, True))
  stages = {"one": (qat,), "one taught": (taught,), "two": (qat, study_lib.Stage(0.3, True))}
  arms += [study_lib.Arm(k, 0.5, none, rewarmup=0.1, stages=v) for k, v in stages.items()]
  results = dict((a.name, r) for a, r in study.run_seed(arms, 0, lambda arm: False))
  assert list(results)[-1] == "full precision"  # the dense run goes on after the others
  taught = results["decoupled distillation"]
  plain = results["ternary 40%"]
  assert taught["loss"][:3] == plain["loss"][:3] and taught["loss"][4:] != plain["loss"][4:]
  taught_loss = taught["teacher"]
  assert taught_loss < np.log(256) + 0.5 and "teacher" not in plain
  assert len(plain["loss"]) == 5 and "flip_rate" in results["ternary 40%"]
  assert results["full precision"]["heldout"] < np.log(256) + 0.5
  # A stage of as many steps is what the arms without stages do; the next one goes on from it.
  assert results["one"]["heldout"] == plain["heldout"] and results["one"]["loss"] == plain["loss"]
  assert results["one taught"]["heldout"] == results["throughout"]["heldout"]
  two = results["two"]
  assert two["steps"] == [5, 3] and len(two["loss"]) == 8 and two["loss"][:5] == plain["loss"]
  assert two["heldout"] != plain["heldout"] and two["teacher"] == taught_loss
  report = report_lib.load(tmp_path / "r.json", size)
  report["arms"] = {name: {"0": r} for name, r in results.items()}
  files.write_json(tmp_path / "r.json", report)
  again = report_lib.load(tmp_path / "r.json", size)
  assert again == json.loads(json.dumps(report))
  rows = report_lib.table(again, "share")
  assert [r["arm"] for r in rows] == ["full precision", "ternary 40%"]
  gap = results["ternary 40%"]["heldout"] - results["full precision"]["heldout"]
  assert rows[1]["minus first"] == pytest.approx(gap)
  with pytest.raises(ValueError, match="found size"):
    report_lib.load(tmp_path / "r.json", study_lib.Size())
  with pytest.raises(ValueError, match="suite: found 'none'"):
    study_lib.arms_of("none")


def test_steps_of_equal_cost():
  """A decoupled run and one that is taught throughout, by counting parameters and passes."""
  size, wider = study_lib.Size(), study_lib.Size(dim=128)
  models = [transformer.Transformer(s.model(None)) for s in (size, wider)]
  own, teachers = (
    sum(x.size for x in jax.tree.leaves(transformer.abstract_params(model)[0])) for model in models
  )
  arms = {arm.name: arm for arm in study_lib.arms_of("decoupled")}
  steps = [size.steps_of(stage) for stage in arms["QAT, then taught"].stages]
  assert steps == [480, 160]
  passes = 3 * own * sum(steps) + teachers * steps[1]  # forward, backward as two; the teacher's
  (taught,) = (size.steps_of(stage) for stage in arms["taught, equal cost"].stages)
  assert abs(taught * (3 * own + teachers) - passes) <= 3 * own + teachers
  assert steps[1] < taught < sum(steps)


def test_curves_of_stages_are_as_long_as_their_steps(monkeypatch, tmp_path):
  report = {"size": {"steps": 400}, "arms": {}}
  for name, steps in (("QAT", [480]), ("QAT, then taught", [480, 160])):
    report["arms"][name] = {"0": {"heldout": 1.0, "loss": [2.0] * 41, "steps": steps}}
  figures = []
  monkeypatch.setattr(report_lib.pictures, "save", lambda figure, *_, **__: figures.append(figure))
  report_lib.plot(report, tmp_path / "plot.png")
  ends = [line.get_xdata()[[0, -1]].tolist() for line in figures[0].axes[-1].lines]
  np.testing.assert_allclose(ends, [[240, 720], [240, 880]])  # switched after 60% of 400 steps


def test_a_run_that_diverged_is_read_back(tmp_path):
  """JSON has null for what is not finite."""
  size, path = study_lib.Size(), tmp_path / "a.json"
  report = report_lib.load(path, size)
  suite = study_lib.SUITES[0]
  arms = [arm.name for arm in study_lib.arms_of(suite)][:2]
  runs = ({"0": {"heldout": x}} for x in (1.5, np.nan))
  report["arms"] = dict(zip(arms, runs, strict=True))
  files.write_json(path, report)
  rows = report_lib.table(report_lib.load(path, size), suite)
  assert rows[0]["mean"] == 1.5 and np.isnan(rows[1]["mean"]) and np.isnan(rows[1]["minus first"])
