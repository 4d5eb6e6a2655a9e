"""`experiments.ultraclean`: raw files to shards in one command, again, and with bad input."""

import gzip
import json
import random

import pytest

from experiments import _flags, ultraclean
from minicpm_jax.data import executor, iterator

pytest.importorskip("fasttext")
pytest.importorskip("pyarrow")

GOOD = "theorem proof lemma implies because therefore energy cell history method".split()
BAD = "buy cheap click casino bonus free now offer winner viagra".split()
COMMON = "the of and to in is a that it for".split()


def write(path, kinds, seed):
  """JSON lines of planted documents; the id says of which kind."""
  rng = random.Random(seed)
  with gzip.open(path, "wt") as file:
    for i, is_good in enumerate(kinds):
      own = GOOD if is_good else BAD
      words = [rng.choice(own if rng.random() < 1 / 3 else COMMON) for _ in range(60)]
      row = {"id": f"{'good' if is_good else 'bad'}/{seed}/{i}", "text": " ".join(words)}
      file.write(json.dumps(row | {"lang": "en"}) + "\n")


@pytest.fixture()
def command(tmp_path):
  (tmp_path / "raw").mkdir()
  write(tmp_path / "raw" / "a.jsonl.gz", [False] * 100 + [True] * 20, 1)
  write(tmp_path / "raw" / "b.jsonl.gz", [False] * 60 + [True] * 15, 2)
  write(tmp_path / "good.jsonl.gz", [True] * 120, 3)
  return [
    "ultraclean",
    f"--input={tmp_path / 'raw'}",
    f"--good=en:{tmp_path / 'good.jsonl.gz'}",
    f"--output={tmp_path / 'out'}",
    "--noheuristics",
    "--vocab=300",
    "--heldout_permille=200",
    "--workers=0",
  ]


def test_one_command_from_raw_files_to_batches(command, tmp_path, capsys):
  assert ultraclean.main(command) == 0
  out = tmp_path / "out"
  ids = [doc.id for doc in executor.read_kept(out / "clean")]
  good = [i for i in ids if i.startswith("good/")]
  # of 35 good pages about 30 % were negatives; hardly a bad one among 160 survives
  assert len(good) >= 15 and len(ids) - len(good) <= 3
  report = json.loads((out / "report.json").read_text())
  assert report["read"] == 195 and report["clean"] == len(ids)
  assert report["clean"] + sum(report["dropped"].values()) == report["read"]
  histogram = report["score_histogram"]["en"]
  assert sum(histogram[10:]) == report["scored_kept"] and sum(histogram[:10]) > 50
  assert report["statistics"]["raw"]["documents"] == 195
  assert {"best", "just_kept", "just_dropped", "worst"} <= report["examples"].keys()
  assert (out / "scores.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  # the printed command's data flags make batches
  words = capsys.readouterr().out.strip().splitlines()[-1].split()
  flags = [word.removeprefix("--data=") for word in words if word.startswith("--data=")]
  cfg = _flags.with_sources(_flags.load("nano"), flags)
  batches = iterator.make_iterator(cfg.data, batch_size_per_host=2)
  assert next(batches)["tokens"].shape == (2, cfg.data.seq_len)
  batches.close()
  assert cfg.eval_sources == ("heldout",)
  assert words[-2:] == ["--set", f"model.vocab_size={batches.vocab_size}"]
  # again: nothing is made anew, the result is the same
  done = {p: p.stat().st_mtime_ns for p in (out / "scored").glob("*.parquet")}
  assert ultraclean.main(command) == 0
  assert {p: p.stat().st_mtime_ns for p in (out / "scored").glob("*.parquet")} == done
  assert [doc.id for doc in executor.read_kept(out / "clean")] == ids


@pytest.mark.slow
def test_workers_keep_the_same_and_a_trained_model_is_taken(command, tmp_path):
  assert ultraclean.main(command) == 0
  first = sorted(doc.id for doc in executor.read_kept(tmp_path / "out" / "clean"))
  model = tmp_path / "out" / "classifier" / "ultraclean_en.bin"
  other = [word for word in command if not word.startswith(("--good", "--output", "--workers"))]
  found = []
  for workers in (1, 2, 3):
    out = tmp_path / f"other{workers}"
    argv = [*other, f"--classifier=en:{model}", f"--output={out}", f"--workers={workers}"]
    assert ultraclean.main(argv) == 0
    found.append({doc.id: doc.score for doc in executor.read_kept(out / "clean")})
  second = found[0]
  assert found == [second] * 3
  # nothing is set aside as negatives now
  assert set(first) <= set(second) and len(second) > len(first)


def test_damaged_files_are_reported(command, tmp_path):
  path = tmp_path / "raw" / "c.jsonl.gz"
  path.write_bytes((tmp_path / "raw" / "a.jsonl.gz").read_bytes()[:-400])
  (tmp_path / "raw" / "d.jsonl").write_bytes(b'{"text": "\xff"}\nnot json\n')
  (tmp_path / "raw" / "e.jsonl").write_bytes(b"")
  assert ultraclean.main(command) == 0
  report = json.loads((tmp_path / "out" / "report.json").read_text())
  bad = report["unreadable"]
  assert bad["read/unreadable"] == bad["read/invalid_utf8"] == bad["read/not_json"] == 1
  assert report["clean"] + sum(report["dropped"].values()) == report["read"] + sum(bad.values())


@pytest.mark.parametrize(
  "change, message",
  [
    (["--input"], "--input: found none"),
    (["--good"], "--good, --classifier: found neither"),
    (["--output"], "--output: found none"),
    (["--good=books"], "--good: found 'books', expected LANG:PATH"),
    (["--classifier=en:/nowhere.bin"], "nowhere.bin"),
    (["--good=en:/nowhere"], "/nowhere: no such file"),
    (["stray"], "arguments: found 'stray'"),
  ],
)
def test_bad_flags(command, capsys, change, message):
  (word,) = change
  name = word.split("=")[0]
  argv = [w for w in command if not w.startswith(name + "=")] + [w for w in change if "=" in w]
  argv += [word] if word == "stray" else []
  assert ultraclean.main(argv) == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
  "word, message",
  [
    ("--threshold=2", "--threshold: found 2.0, expected 0 to 1"),
    ("--threshold=nan", "--threshold: found nan"),
    ("--heldout_permille=1000", "--heldout_permille: found 1000"),
    ("--tokenizer=/nowhere", "--tokenizer: found no tokenizer.json"),
    ("--benchmark=/nowhere.jsonl", "/nowhere.jsonl"),
    ("--input=/nowhere", "/nowhere: no such file"),
  ],
)
def test_bad_values_stop_before_any_work(command, tmp_path, capsys, word, message):
  assert ultraclean.main([*command, word]) == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and message in error
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_shared_demonstration(shared_dir, tmp_path):
  argv = ["ultraclean", f"--shared={shared_dir / 'data'}", f"--output={tmp_path}"]
  assert ultraclean.main(argv) == 0
  report = json.loads((tmp_path / "report.json").read_text())
  scores = report["classifiers"]
  assert scores["en"]["held_out_seeds"]["accuracy"] > 0.7
  assert scores["zh"]["held_out_seeds"]["accuracy"] > 0.9
  assert report["clean"] > 100
