"""The recall task is what it says; the experiment runs, resumes by seed and refuses bad sizes."""

import json

import numpy as np
import pytest

from experiments import _bench_sparse as bench
from experiments import _short_to_long as toy
from experiments import bench_sparse, short_to_long


def test_every_answer_stands_in_its_document():
  """By a second reading of the tokens: the value of the last record of the asked key."""
  tokens, kinds = toy.documents(np.random.default_rng(0), 6, 512, with_needles=True)
  assert tokens.shape == kinds.shape == (6, 513)
  depths = []
  for row, kind in zip(tokens, kinds, strict=True):
    records, asked = {}, {}
    for t, (token, what) in enumerate(zip(row, kind, strict=True)):
      if token < toy.ASK:
        key, value = divmod(int(token) - toy.RECORD, toy.VALUES)
        assert key not in records  # one record a key
        records[key] = (value, t)
      if what != toy.PLAIN:
        key = int(row[t - 1]) - toy.ASK
        assert records[key][0] == token - toy.ANSWER
        asked.setdefault(key, []).append((t, what))
    needles = {key: times for key, times in asked.items() if times[-1][1] == toy.NEEDLE}
    assert len(needles) == toy.NEEDLES and all(len(times) == 1 for times in needles.values())
    places = [records[key][1] for key in needles]
    depths += places
    # Beyond what every query sees anyway: the first block and the local window.
    assert min(places) >= toy.SPARSE.block_size - 1
    assert max(places) < 513 - 2 * toy.NEEDLES - toy.SPARSE.window_size - toy.SPARSE.block_size
  assert max(depths) - min(depths) > 200


def test_equal_seeds_give_equal_batches_and_answers_weigh_more():
  plan = toy.Plan()
  first, again = (toy.batch(np.random.default_rng(3), plan, 128) for _ in range(2))
  assert first["tokens"].shape == (32, 128)
  for name, value in first.items():
    np.testing.assert_array_equal(value, again[name])
  is_answer = (first["targets"] >= toy.ANSWER) & (first["targets"] < toy.FILLER)
  np.testing.assert_array_equal(first["loss_mask"] == 1, is_answer)


@pytest.mark.slow
def test_the_experiment_runs_and_keeps_finished_seeds(tmp_path, monkeypatch, capsys):
  """Six steps each: both arms see the same rows from the same weights, and the files are there."""
  pytest.importorskip("matplotlib")
  flags = ["--short_steps=6", "--long_steps=6", "--long=256", "--tokens=512", "--eval_rows=8"]
  args = ["short_to_long", f"--out={tmp_path}", "--every=6", *flags]
  assert short_to_long.main([*args, "--seeds=1"]) == 0
  found = json.loads((tmp_path / "short_to_long.json").read_text())
  (run,) = found["seeds"]
  assert (tmp_path / "short_to_long.png").stat().st_size > 0
  assert len(run["losses"]["full"]) == len(run["losses"]["sparse"]) == 6
  jumps = np.divide(run["losses"]["sparse"], run["losses"]["full"]) - 1
  assert found["summary"]["mean_loss_jump_at_the_switch"] == round(float(jumps.mean()), 4)
  assert 0 < abs(jumps[0]) < 0.05  # other attention, same weights and rows
  assert run["losses"]["short"][-1] < run["losses"]["short"][0]
  starts = [run["curves"][name][0] for name in ("full", "sparse")]
  assert starts[0] == starts[1]  # both begin with the short model
  monkeypatch.setattr(toy, "run_seed", lambda plan, seed, say: run | {"seed": seed})
  assert short_to_long.main([*args, "--seeds=2"]) == 0
  found = json.loads((tmp_path / "short_to_long.json").read_text())
  assert [s["seed"] for s in found["seeds"]] == [0, 1]
  capsys.readouterr()
  for bad, message in (("--long=100", "twice 64 visible"), ("--short=31", "an even length")):
    assert short_to_long.main([*args, bad]) == 1
    assert message in capsys.readouterr().err


def test_bench_rows_are_medians_of_all_recorded_runs(tmp_path):
  setting = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
  first, second = bench.measure(256, 2, setting)
  assert len(second["runs"]) == 2 and second["runs"][0] == first["runs"][0]
  (third,) = bench.measure(256, 1, setting, second)
  ratios = [run["dense_cpu_s"] / run["sparse_cpu_s"] for run in third["runs"]]
  assert len(ratios) == 3 and third["speedup_cpu"] == sorted(ratios)[1]
  path = tmp_path / "sparse_cpu.json"
  bench.write(path, setting | {"rows": [third]})
  assert bench.recorded(path, setting) == [third]
  assert bench.recorded(path, setting | {"head_dim": 16}) == []
  assert bench_sparse.LENGTHS.default == ["8192", "16384", "32768", "65536"]
