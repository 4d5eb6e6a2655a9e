"""`experiments.scalingbench`: losses of a user's items, the sigmoid over five models, bad input."""

import json
import math

import numpy as np
import pytest

from experiments import _models, scalingbench
from minicpm_jax.tunnel import bench, likelihood


def run(*flags: str) -> int:
  scalingbench.VALUES.unparse_flags()
  return scalingbench.main(["scalingbench", *flags])


def test_five_models_give_losses_and_a_sigmoid(tmp_path, monkeypatch, capsys):
  """Models are planted: their losses and the accuracies of a known sigmoid of them."""
  pytest.importorskip("matplotlib")
  items = tmp_path / "items.jsonl"
  rows = [{"input": "a", "target": " b", "choices": [" b", " c"], "gold": 0}] * 3
  items.write_text("".join(json.dumps(row) + "\n" for row in rows))
  planted = bench.Sigmoid(0.5, 0.95, 4.0, 1.5)
  losses = {"m0": 2.6, "m1": 2.2, "m2": 1.8, "m3": 1.5, "m4": 0.9}

  class Model:
    class cfg:
      max_position = 64

  monkeypatch.setattr(_models, "load", lambda path: (Model, path, None))
  monkeypatch.setattr(likelihood, "Scorer", lambda model, tok, seq_len: seq_len)

  def score(scorer, params, found):
    assert scorer == 64 and len(found) == 3
    nats = np.full(3, 2 * losses[params])
    right = np.full(3, float(planted(losses[params])))
    return bench.ItemScores(("t",) * 3, nats, np.full(3, 2.0), np.full(3, 2.0), right)

  monkeypatch.setattr(bench, "score", score)
  output = tmp_path / "out.json"
  models = [f"--model={name}" for name in losses]
  assert run(f"--items={items}", *models, "--chance=0.5", f"--output={output}") == 0
  data = json.loads(output.read_text())
  assert [row["task"] for row in data["models"]] == pytest.approx(list(losses.values()))
  assert data["models"][0]["token_bits_per_byte"] == pytest.approx(2.6 / math.log(2))
  assert data["sigmoid"]["l0"] == pytest.approx(1.5, abs=0.05)
  assert data["sigmoid"]["sigmoid_error"] < 0.02 < data["sigmoid"]["line_error"]
  assert output.with_suffix(".png").exists()
  assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize(
  "flags, match",
  [
    (("--items=x.jsonl",), "--model: found none"),
    (("--items=missing.jsonl", "--model=x"), "missing.jsonl"),
  ],
)
def test_bad_flags_are_named(flags, match, capsys):
  assert run(*flags) == 1
  assert match in capsys.readouterr().err
