"""The quickstart on a small corpus: all stages, one resume, a second start that repeats none."""

import json
import subprocess
import sys

import pytest

from minicpm_jax.data import python_corpus

TINY = ("model.num_layers=2", "model.model_dim=64", "model.mlp_dim=96", "data.seq_len=64")


def run(workdir, *flags):
  command = [sys.executable, "-m", "experiments.quickstart", f"--workdir={workdir}", *flags]
  command += [f"--set={assignment}" for assignment in TINY]
  return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
  docs = python_corpus.documents_of("reference", "train", max_bytes=150_000)
  path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in docs))
  return path


def test_quickstart_runs_and_resumes(corpus_file, tmp_path):
  flags = (f"--data={corpus_file}", "--steps=30", "--vocab_size=400")
  first = run(tmp_path, *flags)
  assert first.returncode == 0, first.stderr[-3000:]
  assert "start: random weights" in first.stdout and "start: resumed own checkpoint" in first.stdout
  report = json.loads((tmp_path / "report.json").read_text())
  row = report["bits_per_byte"]["text"]
  assert 0 < row["ngram"] < 8 and 0 < row["model"] < 8 and row["gzip"] > 0
  assert report["export_logit_difference"] <= 1e-4
  assert {s["mode"][:4] for s in report["samples"]} == {"gree", "samp"}
  assert (tmp_path / "loss.png").stat().st_size > 5000
  lines = [json.loads(x) for x in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
  losses = {x["step"]: x["loss"] for x in lines if "loss" in x}
  assert losses[max(losses)] < losses[min(losses)] - 0.5
  again = run(tmp_path, *flags)
  assert again.returncode == 0, again.stderr[-3000:]
  assert again.stdout.count("nothing to do") == 2 and "start: random weights" not in again.stdout


def test_an_empty_corpus_is_refused(tmp_path):
  (tmp_path / "empty.txt").write_text("\n")
  result = run(tmp_path / "w", f"--data={tmp_path / 'empty.txt'}")
  assert result.returncode != 0
  assert "found 1 bytes of text, expected 10000" in result.stderr
