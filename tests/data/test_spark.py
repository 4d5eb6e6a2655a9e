"""Spark: the same kept documents, drops and near duplicates as the local executor."""

import gzip
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

from minicpm_jax.data import (
  classifier,
  dedup,
  documents,
  executor,
  filters,
  pii,
  scoring,
  spark,
  ultraclean,
)
from minicpm_jax.data.documents import Dropped


def test_rows_with_one_id_in_one_batch_go_through_in_turns():
  """Ids are unique in a file only; a batch of Spark can hold rows of many files."""
  docs = [
    documents.Doc(id=i, text=t, source=s, meta={"n": 1})
    for i, t, s in [("a", "x", "1"), ("b", "long", "1"), ("a", "longer", "2"), ("a", "y", "3")]
  ]
  rows = [dict(zip(spark._FIELDS, spark._row(d, "", d.source), strict=True)) for d in docs]
  rows.append(
    dict(zip(spark._FIELDS, spark._row(Dropped("p", "bad", "why"), "read", "path"), strict=True))
  )

  def stage(given):
    for doc in given:
      yield doc if len(doc.text) > 2 else Dropped(doc.id, "short")

  out = list(spark._apply_rows(rows, (stage,)))
  kept = [(r[0], r[1], r[2], json.loads(r[4])) for r in out if not r[6]]
  assert kept == [("b", "long", "1", {"n": 1}), ("a", "longer", "2", {"n": 1})]
  drops = [(r[0], r[2], r[6], r[7], r[8]) for r in out if r[6]]
  assert drops == [
    ("p", "path", "read", "bad", "why"),
    ("a", "1", "stage", "short", ""),
    ("a", "3", "stage", "short", ""),
  ]


@pytest.fixture(scope="module")
def session():
  pytest.importorskip("pyspark", reason="pyspark is not installed (extra spark)")
  pytest.importorskip("pandas", reason="pandas is not installed (extra spark)")
  if shutil.which("java") is None:
    pytest.skip("no java on the PATH: Spark needs Java 17 (openjdk-17-jre-headless)")
  session = spark.session("local[2]", spark_driver_bindAddress="127.0.0.1")
  session.sparkContext.setLogLevel("ERROR")
  yield session
  session.stop()


def _corpus(folder):
  """Text of three sorts, near copies, bad lines, one damaged file and an id used in two files."""
  draw = random.Random(0)
  words = [f"{a}{b}{c}" for a in "bdgklm" for b in "aeiou" for c in ("lin", "ter", "son", "mar")]
  pages = []
  for _ in range(60):
    count = draw.randrange(3, 15)
    lines = [" ".join(draw.choices(words, k=12)) + " of the lot." for _ in range(count)]
    pages.append("\n".join(lines))
  pages += [page + "\nOne more line of the end." for page in pages[:8]] + ["short"] * 4
  folder.mkdir()
  for f in range(3):
    mine = [i for i in range(len(pages)) if i % 3 == f or i == 1]
    rows = [json.dumps({"id": f"p{i}", "text": pages[i]}) for i in mine]
    data = "\n".join([*rows, "not json", ""]).encode()
    data = gzip.compress(data, mtime=0)
    (folder / f"{f}.jsonl.gz").write_bytes(data[:-200] if f == 2 else data)
  return folder


def _score_stage(folder):
  """A classifier of texts rich in "lin" against those rich in "mar"; its folder vanishes later."""
  pytest.importorskip("fasttext")
  draw, rows = random.Random(1), []
  for i in range(200):
    end = "lin" if i % 2 else "mar"
    words = [draw.choice("bdgklm") + draw.choice("aeiou") + end for _ in range(20)]
    rows.append((bool(i % 2), " ".join(words)))
  segmenter = ultraclean.WhitespaceSegmenter()
  model = classifier.train(rows, classifier.preset("test"), segmenter)
  model.save(folder / "model.bin")
  return scoring.score_stage({"": folder / "model.bin"}, {"": segmenter})


@pytest.mark.slow
def test_files_of_stages_go_to_the_workers(session, tmp_path):
  """The original files are gone when the job runs."""
  corpus, stage = _corpus(tmp_path / "in"), _score_stage(tmp_path)
  (tmp_path / "list.jsonl").write_text("")
  listed = dedup.write_removals(tmp_path / "list.jsonl", [])
  shipped = spark.ship(session, [stage, listed])
  for path in [*tmp_path.glob("model.bin*"), tmp_path / "list.jsonl"]:
    path.unlink()
  frame = spark.apply(spark.read(session, [corpus]), shipped)
  stages = {row["stage"]: row["count"] for row in frame.groupBy("stage").count().collect()}
  assert stages[""] > 5 and stages["quality"] > 5


@pytest.mark.slow
def test_same_documents_as_the_local_executor(session, tmp_path):
  corpus = _corpus(tmp_path / "in")
  stages = [pii.MaskPII(), filters.published(), _score_stage(tmp_path)]
  local = executor.run([corpus], stages, tmp_path / "local", num_workers=2)
  counts = spark.run(session, [corpus], stages, tmp_path / "spark", num_partitions=5)
  assert 5 < counts["kept"] == local.counts["kept"]
  assert counts["dropped"] == local.counts["dropped"]
  assert {"read/not_json", "read/unreadable", "quality/score"} <= set(counts["dropped"])
  fields = ("source", "id", "text", "lang", "meta", "score")
  ours = {
    (d.source, d.id, d.text, d.lang or "und", json.dumps(d.meta), d.score)
    for d in executor.read_kept(tmp_path / "local")
  }
  rows = session.read.parquet(str(tmp_path / "spark/kept")).select(*fields).collect()
  assert len(rows) == len(ours) and {tuple(row) for row in rows} == ours
  drops = session.read.json(str(tmp_path / "spark/drops")).select("id", "stage", "reason").collect()
  local_drops = [
    (d["id"], d["stage"], d["reason"]) for d in executor.read_drops(tmp_path / "local")
  ]
  assert sorted(map(tuple, drops)) == sorted(local_drops)


@pytest.mark.slow
def test_same_near_duplicates_as_local(session, tmp_path):
  corpus = _corpus(tmp_path / "in")
  executor.run([corpus], [], tmp_path / "local", num_workers=0)
  docs = sorted(executor.read_kept(tmp_path / "local"), key=lambda d: (d.source, d.id))
  expected = set(dedup.minhash(docs))
  found = spark.minhash(spark.read(session, [corpus]))
  assert len(found) == len(expected) > 5 and set(found) == expected


@pytest.mark.slow
def test_spark_submit(tmp_path):
  """A script of three lines under spark-submit, with the master given there."""
  pytest.importorskip("pyspark", reason="pyspark is not installed (extra spark)")
  if shutil.which("java") is None:
    pytest.skip("no java on the PATH: Spark needs Java 17 (openjdk-17-jre-headless)")
  submit = pathlib.Path(sys.executable).with_name("spark-submit")
  corpus, out = _corpus(tmp_path / "in"), tmp_path / "out"
  (tmp_path / "job.py").write_text(
    "from minicpm_jax.data import filters, spark\n"
    "session = spark.session(app_name='job')\n"
    f"spark.run(session, [{str(corpus)!r}], [filters.published()], {str(out)!r})\n"
  )
  root = pathlib.Path(__file__).parents[2]
  env = {**os.environ, "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(root)}
  command = [str(submit), "--master", "local[1]", str(tmp_path / "job.py")]
  subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
  local = executor.run([corpus], [filters.published()], tmp_path / "local", num_workers=0)
  assert json.loads((out / "report.json").read_text())["kept"] == local.counts["kept"] > 10
