"""The QAT study at a few steps: arms share rows and stages, the report can be continued."""

import json

import numpy as np
import pytest

from experiments import _qat_study as study_lib
from minicpm_jax import config
from minicpm_jax.core import files


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
  ]
  results = dict((a.name, r) for a, r in study.run_seed(arms, 0, lambda arm: False))
  names = ["ternary 40%", "decoupled distillation", "full precision"]
  assert list(results) == names  # the dense run goes on after the others
  taught = results["decoupled distillation"]
  plain = results["ternary 40%"]
  assert taught["loss"][:3] == plain["loss"][:3] and taught["loss"][4:] != plain["loss"][4:]
  assert taught["teacher"] < np.log(256) + 0.5 and "teacher" not in plain
  assert len(plain["loss"]) == 5 and "flip_rate" in results["ternary 40%"]
  assert results["full precision"]["heldout"] < np.log(256) + 0.5
  report = study_lib.load(tmp_path / "r.json", size)
  report["arms"] = {name: {"0": r} for name, r in results.items()}
  files.write_json(tmp_path / "r.json", report)
  again = study_lib.load(tmp_path / "r.json", size)
  assert again == json.loads(json.dumps(report))
  rows = study_lib.table(again, "share")
  assert [r["arm"] for r in rows] == ["full precision", "ternary 40%"]
  gap = results["ternary 40%"]["heldout"] - results["full precision"]["heldout"]
  assert rows[1]["minus first"] == pytest.approx(gap)
  with pytest.raises(ValueError, match="found size"):
    study_lib.load(tmp_path / "r.json", study_lib.Size())
  with pytest.raises(ValueError, match="suite: found 'none'"):
    study_lib.arms_of("none")
