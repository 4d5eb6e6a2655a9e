"""The recall task is what it says; the experiment runs, resumes by seed and refuses bad sizes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import _bench_sparse as bench
from experiments import _recall as recall
from experiments import _results, bench_sparse, short_to_long
from experiments import _selection_probe as selection
from experiments import _short_to_long as toy
from minicpm_jax.core import files
from minicpm_jax.models import transformer


def test_every_answer_stands_in_its_document():
  """By a second reading of the tokens: the value of the last record of the asked key."""
  tokens, kinds = toy.needle_documents(np.random.default_rng(0), toy.Plan(), 6, 512)
  assert tokens.shape == kinds.shape == (6, 513)
  depths = []
  for row, kind in zip(tokens, kinds, strict=True):
    records, asked = {}, {}
    for t, (token, what) in enumerate(zip(row, kind, strict=True)):
      if token < recall.ASK:
        key, value = divmod(int(token) - recall.RECORD, recall.VALUES)
        assert key not in records  # one record a key
        records[key] = (value, t)
      if what != recall.PLAIN:
        key = int(row[t - 1]) - recall.ASK
        assert records[key][0] == token - recall.ANSWER
        asked.setdefault(key, []).append((t, what))
    needles = {key: times for key, times in asked.items() if times[-1][1] == recall.NEEDLE}
    assert len(needles) == recall.NEEDLES and all(len(times) == 1 for times in needles.values())
    places = [records[key][1] for key in needles]
    depths += places
    # Beyond what every query sees anyway: the first block and the local window.
    assert min(places) >= toy.SPARSE.block_size
    assert max(places) < 513 - 2 * recall.NEEDLES - toy.SPARSE.window_size - toy.SPARSE.block_size
  assert max(depths) - min(depths) > 200


def test_equal_seeds_give_equal_batches_and_answers_weigh_more():
  first, again = (toy.batch(np.random.default_rng(3), 4096, 128, 0.2, 0.1) for _ in range(2))
  assert first["tokens"].shape == (32, 128)
  for name, value in first.items():
    np.testing.assert_array_equal(value, again[name])
  is_answer = (first["targets"] >= recall.ANSWER) & (first["targets"] < recall.FILLER)
  np.testing.assert_array_equal(first["loss_mask"] == 1, is_answer)
  assert set(np.unique(first["loss_mask"])) == {np.float32(0.1), 1}


def test_near_questions_ask_for_the_last_records():
  distances = {}
  for near in (0.0, 1.0):
    tokens, kinds = recall.documents(np.random.default_rng(5), 16, 256, near=near)
    found = []
    for row, kind in zip(tokens, kinds, strict=True):
      records = []
      for t, token in enumerate(row):
        if token < recall.ASK:
          records.append(int(token) // recall.VALUES)
        if kind[t] == recall.EASY:
          found.append(len(records) - records.index(int(row[t - 1]) - recall.ASK))
    distances[near] = np.array(found)
  assert distances[1.0].max() <= recall.REACH < distances[0.0].mean()
  with pytest.raises(ValueError, match="expected room for 4"):
    recall.documents(np.random.default_rng(0), 2, 64, near=0.5, edges=(40, 24))


def test_lengths_of_the_long_stage_share_the_tokens():
  plan = toy.Plan(bins=4, long_steps=8)
  assert plan.long_lengths() == [256, 192, 128, 64] * 2
  assert {256, 192} & {n for n in plan.long_lengths() if n > toy.VISIBLE}
  assert toy.Plan(long_steps=2).long_lengths() == [256, 256]
  with pytest.raises(ValueError, match="long: found 96, .* twice the 64 visible"):
    toy.Plan(long=96)


def test_probe_agrees_with_the_definition():
  """Selection and rank of one query and head by loops in float64, from the model's own weights."""
  plan, (K, G, H) = toy.Plan(), (4, 2, 32)
  cfg = toy.model_config(plan, toy.SPARSE)
  params = transformer.init_params(transformer.Transformer(cfg), jax.random.key(1))
  params = jax.tree.map(lambda p: 3 * p, params)  # uneven scores
  tokens, kinds = toy.needle_documents(np.random.default_rng(2), plan, 1, plan.long)
  found = selection.probe(cfg, params, toy.SPARSE, tokens, kinds)
  weights = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  x = 12 * weights["embed"]["embedding"][tokens[0, :-1]]
  attn = weights["layers_0"]["attn"]
  x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + cfg.norm_eps)
  x *= weights["layers_0"]["attn_norm"]["scale"]
  angle = np.arange(plan.long)[:, None] * cfg.rope.theta ** (-np.arange(H // 2) / (H // 2))
  turn = np.exp(1j * angle)[:, None]

  def project(name):
    y = np.einsum("td,dnh->tnh", x, attn[name]["kernel"])
    z = (y[..., : H // 2] + 1j * y[..., H // 2 :]) * turn
    return np.concatenate((z.real, z.imag), axis=-1)

  q, k = project("q"), project("k")
  slots, asks = recall.needle_slots(tokens, kinds)
  chosen, ranks = np.zeros((recall.NEEDLES, K)), np.zeros((recall.NEEDLES, K))
  for n, (slot, ask) in enumerate(zip(slots[0], asks[0], strict=True)):
    assert tokens[0, slot] // recall.VALUES == tokens[0, ask] - recall.ASK
    firsts = [j for j in range(0, plan.long, 2) if j + 4 <= ask + 1]
    for g in range(K):
      means = np.stack([k[j : j + 4, g].mean(axis=0) for j in firsts])
      score = 0
      for h in range(g * G, (g + 1) * G):
        a = np.exp(means @ q[ask, h] / np.sqrt(H))
        score = score + a / a.sum()
      current = ask // 8
      best = {
        b: max(s for j, s in zip(firsts, score, strict=True) if j < 8 * b + 8 and j + 4 > 8 * b)
        for b in range(1, current - 2)
      }
      own = slot // 8
      ranks[n, g] = 1 + sum(value > best[own] for value in best.values())
      ahead = sum((value, -b) > (best[own], -own) for b, value in best.items())
      chosen[n, g] = ahead < 8 - 1 - 3  # of 8 blocks, one initial and three local
  np.testing.assert_allclose(found["selected"][0], chosen.mean(axis=0), atol=1e-3)
  np.testing.assert_allclose(found["median_rank"][0], np.median(ranks, axis=0))
  with pytest.raises(ValueError, match="scan_layers"):
    scanned = dataclasses.replace(cfg, scan_layers=True)
    selection.queries_and_keys(scanned, params, tokens)


@pytest.mark.slow
def test_the_experiment_runs_and_keeps_finished_seeds(tmp_path, monkeypatch, capsys):
  """Six steps each: both arms see the same rows from the same weights, and the files are there."""
  pytest.importorskip("matplotlib")
  flags = ["--short_steps=6", "--long_steps=6", "--bins=4", "--tokens=512", "--eval_rows=8"]
  args = ["short_to_long", f"--out={tmp_path}", "--every=6", *flags]
  assert short_to_long.main([*args, "--first=1", "--seeds=1"]) == 0
  found = json.loads((tmp_path / "short_to_long.json").read_text())
  (run,) = found["seeds"]
  assert (tmp_path / "short_to_long.png").stat().st_size > 0
  assert len(run["losses"]["full"]) == len(run["losses"]["sparse"]) == 6
  jumps = (np.divide(run["losses"]["sparse"], run["losses"]["full"]) - 1)[[0, 1, 2, 4, 5]]
  summary = found["summary"]
  jump = summary["loss_jump_at_the_switch"]  # of the rows beyond 64 tokens
  np.testing.assert_allclose(jump["mean"], [jumps.mean()], atol=1e-4)
  np.testing.assert_allclose(jump["largest"], [jumps.max()], atol=1e-4)
  assert np.shape(run["selection"]["sparse"]["selected"]) == (2, 4)
  assert 0 < abs(jumps[0]) < 0.05  # other attention, same weights and rows
  assert run["losses"]["short"][-1] < run["losses"]["short"][0]
  starts = [run["curves"][name][0] for name in ("full", "sparse")]
  assert starts[0] == starts[1]  # both begin with the short model
  held_out = starts[0]["sparse_nll"] / starts[0]["full_nll"] - 1
  np.testing.assert_allclose(jump["held_out"], [held_out], atol=1e-4)
  final, behind = run["final"], summary["points_behind_full_attention"]
  for name, key in (("long sparse", "sparse"), ("long full, untrained", "full")):
    gap = final["full_trained_full_attention"]["needle"]
    gap -= final[f"{key}_trained_sparse_attention"]["needle"]
    name += ", selection" if key == "sparse" else " selection"
    np.testing.assert_allclose(behind[name], [100 * gap], atol=0.01)
  asked = []
  monkeypatch.setattr(
    toy, "run_seed", lambda plan, seed, say: asked.append(seed) or run | {"seed": seed}
  )
  assert short_to_long.main([*args, "--seeds=3"]) == 0
  found = json.loads((tmp_path / "short_to_long.json").read_text())
  assert [s["seed"] for s in found["seeds"]] == [0, 1, 2]
  assert asked == [0, 2]  # seed 1 stands there already
  monkeypatch.setattr(toy, "SPARSE", dataclasses.replace(toy.SPARSE, topk=5))
  assert short_to_long.main([*args, "--seeds=1"]) == 0
  found = json.loads((tmp_path / "short_to_long.json").read_text())
  assert [s["seed"] for s in found["seeds"]] == [0] and asked == [0, 2, 0]  # another model
  capsys.readouterr()
  for bad, message in (("--long=96", "long / bins: found 24"), ("--short=36", "a multiple of 8")):
    assert short_to_long.main([*args, bad]) == 1
    assert message in capsys.readouterr().err


def test_a_seed_that_diverged_is_kept_and_drawn(tmp_path, monkeypatch):
  """Its losses are null in the file; the next seed joins it."""
  pytest.importorskip("matplotlib")
  scores = {"needle": 0.5, "easy": 0.5, "nll": 1.0}
  names, forms = ("short", "full", "sparse"), ("full", "sparse")
  rows = [{"step": 0} | {f"{form}_{k}": v for form in forms for k, v in scores.items()}]
  finals = [f"{name}_trained_{form}_attention" for name in names for form in forms]

  def run_seed(plan, seed, say):
    losses = [2.0] * 3 + [1.5 if seed else float("nan")]
    return {
      "seed": seed,
      "losses": dict.fromkeys(names, losses),
      "curves": {"full": rows, "sparse": rows},
      "final": dict.fromkeys(finals, scores),
      "selection": dict.fromkeys(names, {"selected": [[0.5] * 4] * 2, "right_if_not": None}),
    }

  monkeypatch.setattr(toy, "run_seed", run_seed)
  args = ["short_to_long", f"--out={tmp_path}", "--long_steps=4"]
  for first in range(2):
    assert short_to_long.main([*args, f"--first={first}", "--seeds=1"]) == 0
    found = json.loads((tmp_path / "short_to_long.json").read_text())
    assert [run["losses"]["full"][-1] for run in found["seeds"]] == [None, 1.5][: first + 1]
    jump = found["summary"]["loss_jump_at_the_switch"]["mean"]
    assert jump == [None, 0.0][: first + 1]
  assert (tmp_path / "short_to_long.png").stat().st_size > 0


def test_bench_rows_are_medians_of_all_recorded_runs(tmp_path):
  setting = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
  first, second = bench.measure(256, 2, setting)
  assert len(second["runs"]) == 2 and second["runs"][0] == first["runs"][0]
  (third,) = bench.measure(256, 1, setting, second)
  ratios = [run["dense_cpu_s"] / run["sparse_cpu_s"] for run in third["runs"]]
  assert len(ratios) == 3 and third["speedup_cpu"] == sorted(ratios)[1]
  path = tmp_path / "sparse_cpu.json"
  files.write_json(path, setting | {"rows": [third]})
  assert _results.recorded(path, setting) == [third]
  assert _results.recorded(path, setting | {"head_dim": 16}) == []
  assert bench_sparse.LENGTHS.default == ["8192", "16384", "32768", "65536"]


def test_a_tree_of_nodes_is_measured(tmp_path):
  """As a command; the row of each length has times and memory of the three forms."""
  sizes = ["--num_heads=4", "--num_kv_heads=2", "--head_dim=8", f"--out={tmp_path}"]
  command = ["bench_sparse", "--nodes=3", "--lengths=100,230", "--repeats=1", *sizes]
  assert bench_sparse.main(command) == 0
  found = json.loads(next(tmp_path.glob("sparse_nodes_*.json")).read_text())
  assert [row["length"] for row in found["rows"]] == [100, 230] and found["num_kv_heads"] == 2
  for row in found["rows"]:
    for form in ("nodes", "one", "dense nodes"):
      assert row[f"{form} wall_ms"] > 0 and row[f"{form} temp_mib"] > 0
