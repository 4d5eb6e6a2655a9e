"""`experiments.tunnel` at tiny scale: reports are written, runs are read back, input is checked."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import _flags, _tunnel, _tunnel_stages, _tunnel_suites, tunnel
from minicpm_jax.tunnel import corpus
from tests import words

ROOT = pathlib.Path(__file__).parents[2]


def run(tmp_path, suite: str) -> int:
  tunnel.VALUES.unparse_flags()
  return tunnel.main(["tunnel", f"--suite={suite}", "--scale=tiny", f"--workdir={tmp_path}"])


@pytest.fixture(autouse=True)
def flags_of_this_process(monkeypatch):
  """The command writes XLA_FLAGS; later tests start processes with them."""
  monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


@pytest.fixture
def one_device(monkeypatch):
  """The test session has 8 host devices; each would compile for itself."""
  import jax

  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "local_devices", lambda *a, **k: first)


def test_stages_suite_writes_a_report_and_resumes(tmp_path, one_device, monkeypatch, capsys):
  pytest.importorskip("matplotlib")
  text = corpus.python_source(max_bytes=200_000)
  monkeypatch.setattr(corpus, "python_source", lambda: text)
  monkeypatch.setenv("XLA_FLAGS", "")
  assert run(tmp_path, "stages") == 0
  data = json.loads((tmp_path / "report" / "report.json").read_text())
  section, cost = data["sections"]
  assert cost["title"] == "What it cost"
  assert len(section["claims"]) == 3 and section["data"]["suite"] == "stages"
  page = (tmp_path / "report" / "report.md").read_text()
  assert all(claim["text"] in page for claim in section["claims"])
  runs = sorted((tmp_path / "tiny" / "stages" / "runs").glob("*.json"))
  assert len(runs) == 8
  before = [path.stat().st_mtime_ns for path in runs]
  capsys.readouterr()
  assert run(tmp_path, "stages") == 0
  assert [path.stat().st_mtime_ns for path in runs] == before
  seconds = json.loads((tmp_path / "tiny" / "seconds.json").read_text())["stages"]
  assert seconds["starts"] == 2 and seconds["cpu"] > section["data"]["seconds"]["cpu"] > 0
  assert (
    json.loads((tmp_path / "report" / "report.json").read_text())["sections"][0]["claims"]
    == (section["claims"])
  )


@pytest.mark.slow
def test_every_suite_runs(tmp_path, one_device, monkeypatch):
  pytest.importorskip("matplotlib")
  monkeypatch.setenv("XLA_FLAGS", "")
  assert run(tmp_path, "paper") == 0
  data = json.loads((tmp_path / "report" / "report.json").read_text())
  suites = [s["data"].get("suite") for s in data["sections"]]
  assert suites == [*_tunnel_suites.SUITES, None]  # the last is the cost
  assert (tmp_path / "tiny" / "large_run" / "config.py").exists()


def test_the_large_run_is_launched_by_pretrain(tmp_path, monkeypatch):
  """config.py of the suite "plan", shrunk by flags, on data of two documents' worth."""
  pytest.importorskip("matplotlib")
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(corpus, "python_source", lambda: corpus.from_texts({"text": ["a"] * 999}, {}))
  assert run(tmp_path, "plan") == 0
  path = tmp_path / "tiny" / "large_run" / "config.py"
  recipe, planned = _flags.load("minicpm4_0p5b"), _flags.load(str(path))
  assert planned.model == recipe.model and planned.optim.peak_lr == recipe.optim.peak_lr
  schedule = planned.optim.schedule
  assert schedule.total_steps == planned.num_steps == -(-100e9 // (976 * 4096))
  assert planned.data.phases[1].start_step == schedule.decay_start
  source = words.write_source(tmp_path, "a", [words.text_of(range(2, 64))] * 20)
  small = {"num_layers": 1, "model_dim": 32, "mlp_dim": 64, "num_heads": 4, "num_kv_heads": 2}
  small = {f"model.{k}": v for k, v in {**small, "head_dim": 8, "vocab_size": 64}.items()}
  small |= {"model.mtp": "none", "data.seq_len": 32, "data.batch_size": 8, "num_steps": 2}
  command = [sys.executable, "-m", "experiments.pretrain", f"--config={path}"]
  command += [f"--workdir={tmp_path / 'run'}", f"--data=a:{source.path}"]
  command += [f"--set={k}={v}" for k, v in small.items()]
  environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "step 2/2" in done.stdout and (tmp_path / "run" / "checkpoints" / "2").exists()


def test_bad_flags_are_named(tmp_path, capsys):
  assert run(tmp_path, "everything") == 1
  assert "--suite: found ['everything']" in capsys.readouterr().err
  for flag, message in ((f"--data={tmp_path / 'none'}", "none"), ("--jobs=0", "--jobs: found 0")):
    tunnel.VALUES.unparse_flags()
    assert tunnel.main(["tunnel", flag, "--suite=plan"]) == 1
    assert message in capsys.readouterr().err


def test_one_device_a_job(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
  tunnel._set_xla_flags(3)
  found = os.environ["XLA_FLAGS"]
  assert "--xla_x=1" in found and "--xla_force_host_platform_device_count=3" in found


def test_scales_have_what_the_suites_need():
  for scale in _tunnel.SCALES.values():
    assert len(scale.law_widths) >= 3 and len(scale.law_lengths) >= 3
    assert len(scale.batch_rows) >= 3 and len(scale.mup_lrs) >= 3
    assert max(scale.sp_lrs) < min(scale.mup_lrs)
    ratios = {b / a for a, b in zip(scale.mup_lrs, scale.mup_lrs[1:], strict=False)}
    assert len({round(r, 6) for r in ratios}) == 1
  for name in ("toy", "quick"):  # the ground rule of training.md 13: two seeds
    assert _tunnel.SCALES[name].seeds >= 2 and _tunnel.SCALES[name].wsd_seeds >= 2


def test_task_rows_are_translations():
  rows = _tunnel_stages.task_rows(0, 50)
  table = {}
  for row in rows:
    text = bytes(row.astype("uint8")).decode()
    assert text[64] == "Q"
    for i in range(0, 64, 16):
      item = text[i : i + 16]
      assert item[:3] == "Q: " and item[7:11] == " A: " and item[15] == "\n"
      for a, b in zip(item[3:7], item[11:15], strict=True):
        assert table.setdefault(a, b) == b
  assert len(set(table.values())) == len(table) == 26
  mask = _tunnel_stages._answer_mask(1)[0]
  targets = rows[0][1:][mask.astype(bool)]
  text = bytes(rows[0].astype("uint8")).decode()
  answers = "".join(text[i + 11 : i + 15] for i in range(0, 64, 16))
  assert bytes(targets.astype("uint8")).decode() == answers
  shuffled = _tunnel_stages.task_rows(0, 50, is_shuffled=True)
  assert (shuffled[:, 3:7] == rows[:, 3:7]).all() and (shuffled[:, 11:15] != rows[:, 11:15]).any()
