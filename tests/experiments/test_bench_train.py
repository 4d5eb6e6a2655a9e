"""bench_train's suites: refusals here, every suite at its smallest under `slow`."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import _bench_decode, _bench_mfu, _bench_train, _results

ROOT = pathlib.Path(__file__).parents[2]


def run(script, *args):
  command = [sys.executable, "-m", f"experiments.{script}", *args]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # the tests' eight devices
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, env=env)


def test_mfu_wants_an_accelerator():
  with pytest.raises(ValueError, match="--suite=mfu: found device cpu, expected a GPU or TPU"):
    _bench_mfu.rows("mfu", "0p5b", 1, budget=1.0)


def test_a_failed_part_leaves_its_error_and_the_others_go_on(capsys, monkeypatch):
  """Whole steps at test size: a packed row is another batch of the same program."""
  real = _bench_mfu.Step

  def breaks(cfg, *args):
    if cfg.sparse is not None:
      raise RuntimeError("no such kernel")
    return real(cfg, *args)

  monkeypatch.setattr(_bench_mfu, "Step", breaks)
  found = _bench_mfu.rows("mfu", "tiny", 1, budget=math.inf, only=("dense, 64", "sparse"))
  assert [row["part"] for row in found] == [
    "dense, 64",
    "dense, 64, 4 documents a row",
    "sparse, 128, remat dots",
  ]
  assert [row.get("error") for row in found] == [None, None, "RuntimeError: no such kernel"]
  assert found[0]["compile s"] == found[1]["compile s"] and found[0]["loss"] != found[1]["loss"]
  assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
  assert "| error |" in _results.table(found).splitlines()[0]
  late = _bench_mfu.rows("qat", "tiny", 1, budget=-1.0)
  assert [row["error"] for row in late] == ["not begun: -1 s are over"] * 5


def test_a_part_alone_makes_what_it_is_measured_against(monkeypatch):
  """FP8 steps three times as long as plain ones; a packed row of a program that no part made."""
  made = []

  class Step:
    def __init__(self, cfg, tokens, seq_len):
      self.cfg, self.name = cfg, "plain" if cfg.quant is None else "quantised"
      self.documents = 1
      made.append((self.name, seq_len, cfg.remat))

    def pack(self, documents):
      self.documents = documents

    def run(self, num_steps):
      return 3.0 if self.name == "quantised" else 1.0

    def row(self, seconds):
      return {"seconds": seconds, "documents": self.documents}

  monkeypatch.setattr(_bench_mfu, "Step", Step)
  (row,) = _bench_mfu.rows("qat", "tiny", 1, budget=math.inf, only=("FP8",))
  assert "error" not in row and row["part"] == "FP8, blocks of 128"
  assert (row["time to plain"], row["seconds"]) == (3.0, 3.0)
  assert made == [("plain", 64, "none"), ("quantised", 64, "none")]
  both = _bench_mfu.rows("qat", "tiny", 1, budget=math.inf, only=("plain", "int4"))
  assert [row["time to plain"] for row in both] == [1.0, 3.0] and len(made) == 4
  (row,) = _bench_mfu.rows("mfu", "tiny", 1, budget=math.inf, only=("dense, 64, 4 documents",))
  assert row["documents"] == 4 and "error" not in row and made[4:] == [("plain", 64, "none")]
  with pytest.raises(ValueError, match="--parts: found .'typo'., expected beginnings of"):
    _bench_mfu.rows("qat", "tiny", 1, budget=math.inf, only=("FP8", "typo"))


def test_every_row_is_its_own_measurement():
  """Forms x cache, forms x remat, devices; unrolled means all layers."""
  assert len(_bench_train.specs("compile", "20m")) == 6
  policies = [s["remat"] for s in _bench_train.specs("memory", "20m")]
  assert policies == ["none", "dots", "full"] * 2
  assert [s["devices"] for s in _bench_train.specs("scaling", "20m")] == [1, 2, 4, 8]
  cfg = _bench_train.with_layers(_bench_train.SIZES["20m"], 7)
  assert cfg.scan_layers and cfg.scan_unroll == cfg.num_layers == 7
  assert not _bench_train.with_layers(cfg, 0).scan_layers


def test_sides_of_absent_packages_are_left_out(monkeypatch):
  monkeypatch.setattr(_bench_decode.importlib.util, "find_spec", lambda name: None)
  names, missing = _bench_decode.available(_bench_decode.SUITES["plain"])
  assert names == ["ours, 1 token a dispatch", "ours, 16 tokens a dispatch"]
  assert missing["llama.cpp, float32"] == "llama_cpp is not installed"


@pytest.mark.slow
@pytest.mark.parametrize("suite, rows", [("compile", 6), ("memory", 6), ("scaling", 4)])
def test_suites_run(tmp_path, suite, rows):
  small = ["--sizes=tiny", "--seq_len=32", f"--output={tmp_path}"]
  small += [] if suite == "compile" else ["--repeats=1"]
  done = run("bench_train", f"--suite={suite}", *small)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / f"bench_train_{suite}_tiny.json").read_text())["rows"]
  assert len(found) == rows
  if suite == "compile":  # the second process finds the program of the first
    for empty, filled in zip(found[::2], found[1::2], strict=True):
      assert filled["compile s"] < empty["compile s"] / 2


@pytest.mark.slow
@pytest.mark.oracle
def test_decoding_sides_agree(tmp_path):
  pytest.importorskip("transformers")
  from minicpm_jax.core import fetch

  if fetch.cached() is None:
    pytest.skip(f"SmolLM2-135M-Instruct is not in {fetch.cache_dir()}: run `{fetch.COMMAND}`")
  small = ("--prompt_tokens=16", "--new_tokens=6", "--repeats=1", f"--output={tmp_path}")
  done = run("bench_decode", *small)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "bench_decode_plain.json").read_text())["rows"]
  float32 = [row for row in found if row["side"] != "llama.cpp"]
  assert [row["equal tokens"] for row in float32] == [6, 6, 6]
