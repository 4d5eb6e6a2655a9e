"""Text for drafts: prompts out of files, answers that the target writes, resumable."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  _bench_drafts,
  _command,
  _compare_drafts,
  _distill_draft,
  _regenerate,
  bench_drafts,
  compare_drafts,
  distill_draft,
  tune_tree,
)
from minicpm_jax import ckpt, config
from minicpm_jax.core import files
from minicpm_jax.data import documents, packing, shards, sources
from minicpm_jax.infer import generate
from minicpm_jax.infer.drafters import ngram
from minicpm_jax.models import draft as draft_lib
from tests.models import common


def jsonl(path, rows):
  opener = gzip.open if path.suffix == ".gz" else open
  with opener(path, "wt") as file:
    file.write("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def parse(argv):
  return _command.parse(distill_draft.VALUES, argv, None)


class ChatIds(_regenerate.Ids):
  """Token ids as text, in a template that surrounds a question with 7 and 8."""

  chat_template = "7 {{ messages[0]['content'] }}{% if add_generation_prompt %} 8{% endif %}"


def test_prompts_of_every_form_of_row(tmp_path):
  rows = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"turns": ["c", "d"]},
    {"question": "e", "text": "f"},
    {"question": "g"},
    {"prompt": "h"},
    {"text": "i"},
  ]
  found = _regenerate.prompt_texts(jsonl(tmp_path / "a.jsonl.gz", rows))
  assert found == ["a", "c", "f\n\ne", "g", "h", "i"]
  with pytest.raises(ValueError, match=r"row 1: found fields \['x'\], expected messages"):
    _regenerate.prompt_texts(jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"x": 1}]))
  for row in ({"messages": []}, {"messages": [{"role": "user"}]}, {"turns": 3}, {"text": None}):
    with pytest.raises(ValueError, match="bad.jsonl: row 0: found .* without a text, expected"):
      _regenerate.prompt_texts(jsonl(tmp_path / "bad.jsonl", [row]))
  with pytest.raises(ValueError, match="line 1: found int, expected a JSON object"):
    _regenerate.prompt_texts(jsonl(tmp_path / "bad.jsonl", [5]))
  with pytest.raises(ValueError, match="found no rows"):
    _regenerate.prompt_texts(jsonl(tmp_path / "c.jsonl", []))


def test_rows_held_out_of_a_file_and_the_rest_are_its_rows(tmp_path):
  path = jsonl(tmp_path / "a:b.jsonl", [{"text": f"{n}"} for n in range(20)])
  held, rest = (_regenerate.prompt_texts(f"{path}:{part}") for part in ("held", "rest"))
  assert held == ["0", "8", "16"] and _regenerate.prompt_texts(path)[0] == "0"
  assert sorted(held + rest, key=int) == [f"{n}" for n in range(20)]


def test_prompts_are_rendered_and_taken_from_the_files_in_turns(tmp_path):
  one = jsonl(tmp_path / "one.jsonl", [{"text": f"{n}"} for n in range(10, 14)])
  two = jsonl(tmp_path / "two.jsonl", [{"text": "30"}, {"text": " ".join(["5"] * 300)}])
  found = _regenerate.chat_prompts([one, two], ChatIds(64), 9)
  assert all(p[0] == 7 and p[-1] == 8 and len(p) == 3 for p in found)  # the long one is left out
  middle = [p[1] for p in found]
  assert sorted(middle) == [10, 11, 12, 13, 30] and 30 in middle[:4]
  assert _regenerate.chat_prompts([one, two], ChatIds(64), 2) == found[:2]
  assert _bench_drafts.prompts_of(one, ChatIds(64), 2, 192) == [[7, 10, 8], [7, 12, 8]]
  assert _bench_drafts.prompts_of(one, _regenerate.Ids(64), 1, 192) == [[10]]


def test_answers_are_the_targets_and_a_stopped_call_goes_on(tmp_path, monkeypatch):
  model, params = common.build(common.config(num_layers=1))
  monkeypatch.setattr(_regenerate, "PART", 2)
  prompts = [[int(t) for t in row] for row in np.random.default_rng(0).integers(0, 256, (3, 5))]
  sampling = config.SamplingConfig(max_new_tokens=6)
  out = tmp_path / "made"
  # A call that was stopped in the middle of a line: the first two documents are whole.
  done = [" ".join(map(str, [*p, 1, 2])) for p in prompts[:2]]
  log = tmp_path / "made.jsonl"
  log.write_text("".join(json.dumps(text) + "\n" for text in done) + '"4 5')
  _regenerate.write_generated(out, (model, params, None), prompts, sampling)
  assert shards.read_index(out).num_documents == 3
  source = sources.open_source("made", str(out))
  stored = [packing.split_mask(source[i]) for i in range(3)]
  expected = generate.generate(model, params, prompts[2:], sampling).tokens[0]
  ids = [list(map(int, row)) for row, _ in stored]
  assert ids == [[*prompts[0], 1, 2], [*prompts[1], 1, 2], [*prompts[2], *expected]]
  # The target's own tokens are trained, the prompt is not; a log of before knew no prompts.
  assert stored[0][1].all() and stored[1][1].all()
  assert stored[2][1].tolist() == [False] * 5 + [True] * 6


def test_held_out_answers_begin_otherwise_than_those_trained_on(tmp_path, monkeypatch):
  texts = [" ".join(map(str, [n, *range(40)])) for n in range(8)]
  docs = documents.from_texts(texts)
  shards.prepare(docs, tmp_path / "t", name="t", tokenizer=_regenerate.Ids(64), add_eos=False)
  written = {}
  monkeypatch.setattr(
    _regenerate,
    "write_generated",
    lambda out, target, prompts, s: written.update({out.name: prompts}),
  )
  monkeypatch.setattr(_regenerate, "HELDOUT", 3)
  model = common.config(num_layers=1)
  cfg = _distill_draft.distill_config(model, "x", "eagle", [f"t:{tmp_path / 't'}"], 4)
  values = parse(["x", f"--workdir={tmp_path}", "--regenerate=4"])
  found = _regenerate.regenerate(cfg, None, tmp_path, values)
  first = {name: {p[0] for p in prompts} for name, prompts in written.items()}
  assert len(first["train"]) == 4 and len(first["heldout"]) == 3
  assert not first["train"] & first["heldout"]
  assert found.eval_sources == ("generated_heldout",)


def test_prompts_that_are_too_few_or_too_short_are_refused(tmp_path, capsys):
  docs = documents.from_texts(["1 2 3"])
  shards.prepare(docs, tmp_path / "t", name="t", tokenizer=_regenerate.Ids(64), add_eos=False)
  with pytest.raises(ValueError, match="--prompts: .*found no document of 32 tokens"):
    _bench_drafts.prompts_of(str(tmp_path / "t"), None, 2, 192)
  for command, flag in ((bench_drafts, "--num_prompts=0"), (tune_tree, "--new_tokens=1")):
    assert command.main(["x", "--target=t", f"--prompts={tmp_path / 't'}", flag]) == 1
    assert flag[2:].split("=")[0] in capsys.readouterr().err


def test_tune_tree_ends_with_status_0_and_writes_its_choice(tmp_path, monkeypatch):
  pytest.importorskip("matplotlib")
  model, params = common.build(common.config(num_layers=1))
  draft_cfg = draft_lib.for_target(model.cfg, "minicpm")
  draft = draft_lib.Draft(draft_cfg, draft_lib.init_params(draft_cfg, jax.random.key(0)))
  ckpt.save_draft(tmp_path / "d", draft, model.cfg)
  np.save(tmp_path / "fr.npy", np.arange(0, 64, 2, dtype=np.int32))
  monkeypatch.setattr(tune_tree._models, "load", lambda path, flag: (model, params, ChatIds(64)))
  path = jsonl(tmp_path / "p.jsonl", [{"prompt": "10"}])
  args = ["x", "--target=t", f"--draft=a:{tmp_path / 'd'}", f"--prompts={path}", "--repeats=1"]
  args += [f"--fr={tmp_path / 'fr.npy'}", "--new_tokens=4", "--length=8", "--sizes=4"]
  more = ["--spec_num_iter=2", "--spec_topk_per_iter=2", f"--output={tmp_path / 'tree.b'}"]
  assert tune_tree.main([*args, *more]) == 0
  found = json.loads((tmp_path / "tree.b.json").read_text())
  assert [row["num_nodes"] for row in found["rows"]] == [1, 4] and found["fr_size"] == 32
  assert found["num_nodes"] in (1, 4) and (tmp_path / "tree.b.png").stat().st_size


def test_few_prompts_are_halved_and_none_is_an_error(tmp_path, monkeypatch):
  model, params = common.build(common.config(num_layers=1))
  target = (model, params, ChatIds(64))
  written = {}
  monkeypatch.setattr(
    _regenerate,
    "write_generated",
    lambda out, target, prompts, s: written.update({out.name: prompts}),
  )
  path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"{n}"} for n in range(10, 15)])
  args = ["x", f"--workdir={tmp_path}", "--regenerate=9", f"--prompts={path}"]
  cfg = _distill_draft.distill_config(model.cfg, "x", "eagle", [], 4, needs_data=False)
  _regenerate.regenerate(cfg, target, tmp_path, parse(args))
  assert (len(written["heldout"]), len(written["train"])) == (2, 3)
  assert {p[1] for p in sum(written.values(), [])} == set(range(10, 15))
  _regenerate.regenerate(cfg, target, tmp_path, parse([*args, "--regenerate=1"]))
  assert len(written["train"]) == 1
  monkeypatch.undo()
  with pytest.raises(ValueError, match="train: found no prompts, expected some"):
    _regenerate.write_generated(tmp_path / "train", target, [], config.SamplingConfig())
  with pytest.raises(ValueError, match="--prompts: found without --regenerate"):
    parse(["x", "--target=t", *args[1::2]])
    distill_draft._run()


def test_trees_and_variants_are_parsed_or_refused():
  sizes = {"num_levels": 3, "top_k": 4, "num_nodes": 12}
  assert _bench_drafts._named("a:dir", sizes) == ("a", "dir", sizes)
  own = {"num_levels": 3, "top_k": 1, "num_nodes": 4}
  assert _bench_drafts._named("a:dir:3/1/4", sizes) == ("a", "dir", own)
  for text in ("a", "a:dir:3/1", "a:dir:3/1/x"):
    with pytest.raises(ValueError, match="expected NAME:FOLDER"):
      _bench_drafts._named(text, sizes)
  found = list(_compare_drafts.variants(["x:eagle3:a.b=1,2+c=3", "eagle:eagle"]))
  assert found == [("x", "eagle3", ["a.b=1,2", "c=3"]), ("eagle", "eagle", [])]
  with pytest.raises(ValueError, match="--variant: found 'x:other'"):
    list(_compare_drafts.variants(["x:other"]))


def test_a_draft_that_diverged_is_read_and_comes_last(tmp_path):
  """Its curve holds null; the other rate is drawn."""
  pytest.importorskip("matplotlib")
  rows = []
  for rate, last in ((4e-3, float("nan")), (1e-3, 0.0)):
    curve = [{"step": s, "acc_1": x, "acc_2": x, "acc_3": x} for s, x in ((0, 0.1), (5, last))]
    curves = {_compare_drafts.HELD_OUT: curve}
    files.write_json(tmp_path / "acceptance.json", {"curves": curves})
    row = {"variant": "a", "rate": rate, "curve": _compare_drafts.read_curve(tmp_path)}
    assert row["curve"][0] == curve[0] and np.isnan(row["curve"][1]["acc_3"]) == np.isnan(last)
    rows.append(row)
  assert max(rows, key=_compare_drafts.score)["rate"] == 1e-3
  values = compare_drafts.VALUES
  values(["compare_drafts", "--target=t", "--workdir=w"])
  _compare_drafts.write(tmp_path / "out.json", values, rows)
  assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["curve"][1]["acc_1"] is None
  assert (tmp_path / "out.png").stat().st_size > 0


def test_rows_of_all_drafters_count_the_tokens_of_every_prompt():
  """2 prompts of 9 tokens: the first of each comes from its prefill, 8 from rounds."""
  model, params = common.build(common.config(num_layers=1))
  named = {"plain": None, "ngram": (ngram.NGramDrafter(num_levels=2), ())}
  sampling = config.SamplingConfig(max_new_tokens=9)
  prompts = [[3, 4, 3, 4], [5, 6]]
  measured = _bench_drafts.measure(model, params, named, prompts, sampling)
  plain, drafted = _bench_drafts.rows(model, params, named, measured)
  assert plain["accepted"] == [16] and plain["mean_accept_length"] == 1
  assert plain["tokens_equal_plain"] is None and drafted["tokens_equal_plain"] is True
  counts = np.arange(1, len(drafted["accepted"]) + 1)
  assert np.dot(counts, drafted["accepted"]) == 16 and sum(drafted["accepted"]) < 16
  assert drafted["mean_accept_length"] == pytest.approx(16 / sum(drafted["accepted"]))
  assert plain["tokens_per_second"] > 0 and drafted["draft_ms"] > 0
  assert plain["round_ms"] * plain["tokens_per_second"] == pytest.approx(1e3)
  ratio = drafted["tokens_per_second"] / plain["tokens_per_second"]
  assert drafted["speedup"] == pytest.approx(ratio)


def test_the_target_as_its_own_second_model_is_accepted_whole(monkeypatch):
  model, params = common.build(common.config(num_layers=1))
  monkeypatch.setattr(_bench_drafts._models, "load", lambda path, num_rows=1: (model, params, None))
  sizes = dict(num_levels=2, top_k=1, num_nodes=3)
  named = {"plain": None} | _bench_drafts.second_models(["own:path"], sizes, min_length=3)
  assert list(named) == ["plain", "own, chain", "own, hier"]
  sampling = config.SamplingConfig(max_new_tokens=10)
  measured = _bench_drafts.measure(model, params, named, [[3, 5, 8]], sampling)
  _, chain, hier = _bench_drafts.rows(model, params, named, measured)
  assert chain["tokens_equal_plain"] and hier["tokens_equal_plain"]
  assert chain["accepted"] == [0, 0, 3]  # nine tokens behind the first, three a round
  assert len(hier["accepted"]) >= 4 and sum(hier["accepted"]) <= 3  # four and more a round
  with pytest.raises(ValueError, match="--second: found 'own', expected NAME:MODEL"):
    _bench_drafts.second_models(["own"], sizes, 3)


def test_a_measurement_in_pieces_goes_on_and_answers_end_at_a_stop_id(tmp_path):
  model, params = common.build(common.config(num_layers=1))
  named, prompts = {"plain": None}, [[3, 4, 3, 4], [5, 6], [7]]
  sampling = config.SamplingConfig(max_new_tokens=6)
  free = generate.generate(model, params, prompts, sampling).tokens
  stop = free[1][2]
  path, about = tmp_path / "x.part.json", {"prompts": "p"}
  pieces = _bench_drafts.Pieces(path, about, seconds=1e-9)
  assert len(_bench_drafts.measure(model, params, named, prompts, sampling, (stop,), pieces)) == 1
  for num in (2, 3):
    pieces = _bench_drafts.Pieces(path, about)
    pieces.is_over = lambda num=num, pieces=pieces: len(pieces.found) == num
    found = _bench_drafts.measure(model, params, named, prompts, sampling, (stop,), pieces)
    assert len(found) == num
  until = [row[: row.index(stop) + 1] if stop in row else row for row in free]
  assert [one["plain"]["tokens"] for one in found] == until
  with pytest.raises(ValueError, match="part.json: prompts: found p, expected q"):
    _bench_drafts.Pieces(path, {"prompts": "q"})
  path.write_text("[]")
  with pytest.raises(ValueError, match="part.json: found no pieces of a measurement"):
    _bench_drafts.Pieces(path, about)


def test_pieces_of_other_weights_or_prompts_are_not_merged(tmp_path):
  model, params = common.build(common.config(num_layers=1))
  named = {"plain": None, "small": (ngram.NGramDrafter(num_levels=2), {"w": np.zeros(3)})}
  about = _bench_drafts.identity(params, named, [[1, 2]])
  _bench_drafts.Pieces(tmp_path / "x.json", about).add({"plain": {}})
  again = _bench_drafts.identity(jax.tree.map(jnp.array, params), named, [[1, 2]])
  assert _bench_drafts.Pieces(tmp_path / "x.json", again).found == [{"plain": {}}]
  changed = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1), params)
  trained = named | {"small": (named["small"][0], {"w": np.array([0, 0, 1e-6])})}
  for what, other in (
    ("target weights", (changed, named, [[1, 2]])),
    ("draft weights", (params, trained, [[1, 2]])),
    ("prompt ids", (params, named, [[1, 3]])),
  ):
    with pytest.raises(ValueError, match=f"x.json: {what}: found .*, expected .*remove it"):
      _bench_drafts.Pieces(tmp_path / "x.json", _bench_drafts.identity(*other))


def test_names_with_a_dot_keep_it(tmp_path):
  pytest.importorskip("matplotlib")
  row = {"drafter": "plain", "mean_accept_length": 1.0, "tokens_per_second": 9.0}
  _bench_drafts.write(tmp_path / "a.b.json", {"title": "t", "rows": [row]})
  assert json.loads((tmp_path / "a.b.json").read_text())["rows"] == [row]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.json", "a.b.png"]


def test_every_logit_scale_is_a_row_of_its_own(tmp_path):
  model, params = common.build(common.config(num_layers=1))
  draft_cfg = draft_lib.for_target(model.cfg, "minicpm")
  draft = draft_lib.Draft(draft_cfg, draft_lib.init_params(draft_cfg, jax.random.key(0)))
  ckpt.save_draft(tmp_path / "d", draft, model.cfg)
  sizes = {"num_levels": 2, "top_k": 2, "num_nodes": 4}

  def scales(*asked):
    found = _bench_drafts.drafters(model, params, [f"a:{tmp_path / 'd'}"], None, sizes, asked)
    return {n: d.cfg.draft_logit_scale for n, (d, _) in found.items() if n.startswith("a")}

  assert scales() == {"a": draft_cfg.draft_logit_scale}
  assert scales(1.0, 0.25) == {"a, scale 1": 1.0, "a, scale 0.25": 0.25}


@pytest.mark.parametrize(
  "argv, match",
  [
    (["--int4=16", "--ternary=16"], "--int4, --ternary: found 16 and 16"),
    (["--kind=bita", "--ternary=16"], "which has no layer"),
    (["--set=loss_temperature=0"], "loss_temperature: found 0.0, expected a number > 0"),
  ],
)
def test_settings_of_training_that_are_refused(argv, match):
  values = parse(["x", "--workdir=w", "--target=t", "--data=a:b", *argv])
  with pytest.raises(ValueError, match=match):
    cfg = _distill_draft.make_config(values, common.config(num_layers=1))
    config.overrides(cfg, values["set"].value)
