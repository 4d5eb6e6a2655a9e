"""Damaged files: what is bad is counted, everything else is read, once."""

import gzip
import json
import random
import tracemalloc

import pytest

from minicpm_jax.data import documents, executor, tolerant

NUM_ROWS = 200


def _lines():
  draw = random.Random(0)
  words = [f"w{draw.randrange(10**6)}" for _ in range(5000)]
  rows = [{"id": f"d{i}", "text": " ".join(draw.sample(words, 40))} for i in range(NUM_ROWS)]
  return [json.dumps(row).encode() + b"\n" for row in rows]


def _split(items):
  items = list(items)
  docs = [item for item in items if isinstance(item, documents.Doc)]
  return docs, [item for item in items if isinstance(item, documents.Dropped)]


@pytest.mark.smoke
@pytest.mark.parametrize("damage", ["cut", "flip", "not gzip"])
def test_corrupted_gzip_keeps_what_comes_before(tmp_path, damage):
  data = bytearray(gzip.compress(b"".join(_lines()), mtime=0))
  if damage == "cut":
    data = data[: len(data) // 2]
  elif damage == "flip":
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
  else:
    data = bytearray(b"plain text")
  (tmp_path / "x.jsonl.gz").write_bytes(data)
  docs, drops = _split(tolerant.Reader()(tmp_path / "x.jsonl.gz"))
  assert [d.id for d in docs] == [f"d{i}" for i in range(len(docs))]  # a prefix, in order
  assert 0 < len(docs) < NUM_ROWS if damage != "not gzip" else not docs
  assert [d.reason for d in drops if d.reason == "unreadable"] == ["unreadable"]
  assert drops[-1].id == str(tmp_path / "x.jsonl.gz") and "after line" in drops[-1].detail


@pytest.mark.parametrize(
  "bad, reason",
  [
    (b'{"id": "b", "text": "\xff\xfe"}\n', "invalid_utf8"),
    (b'{"id": "b", "text": "cut\n', "not_json"),
    (b'["a", "list"]\n', "not_json"),
    (b"[" * 100_000 + b"\n", "not_json"),
    (b'{"id": "b", "body": "no text"}\n', "bad_row"),
    (b'{"id": "b", "text": 5}\n', "bad_row"),
    (b'{"id": "b", "text": "\\ud800"}\n', "bad_row"),
    (b'{"id": "b", "text": "' + b"x" * 5000 + b'"}\n', "line_too_long"),
  ],
)
def test_a_bad_line_is_one_drop(tmp_path, bad, reason):
  lines = _lines()[:10]
  (tmp_path / "x.jsonl").write_bytes(b"".join([*lines[:4], bad, b"\n", *lines[4:]]))
  max_bytes = 200_000 if bad.startswith(b"[[") else 4000
  docs, drops = _split(tolerant.Reader(max_bytes=max_bytes)(tmp_path / "x.jsonl"))
  assert [d.id for d in docs] == [f"d{i}" for i in range(10)]
  assert [d.reason for d in drops] == [reason]
  assert "line 5" in drops[0].detail and drops[0].detail.startswith(str(tmp_path))


def test_a_line_of_50_mb_is_skipped_in_bounded_memory(tmp_path):
  lines = _lines()[:3]
  with gzip.open(tmp_path / "x.jsonl.gz", "wb", compresslevel=1) as file:
    file.write(lines[0] + b'{"id": "big", "text": "')
    for _ in range(50):
      file.write(b"x" * 10**6)
    file.write(b'"}\n' + lines[1] + lines[2][:-1])  # the last line has no line feed
  tracemalloc.start()
  docs, drops = _split(tolerant.Reader(max_bytes=2**20)(tmp_path / "x.jsonl.gz"))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert [d.id for d in docs] == ["d0", "d1", "d2"]
  assert [(d.reason, "line 2" in d.detail) for d in drops] == [("line_too_long", True)]
  assert peak < 8 * 2**20


def test_duplicate_ids(tmp_path):
  rows = [("a", "one"), ("a", "one"), ("a", "two"), ("a", "two"), ("b", "one"), ("a", "three")]
  text = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows)
  (tmp_path / "x.jsonl").write_text(text)
  docs, drops = _split(tolerant.Reader()(tmp_path / "x.jsonl"))
  assert [d.text for d in docs] == ["one", "two", "one", "three"]  # every text of an id, once
  assert [d.reason for d in drops] == ["duplicate_id"] * 2
  assert len({d.id for d in docs}) == 4 and docs[0].id == "a" and docs[2].id == "b"
  assert [d.meta.get("original_id") for d in docs] == [None, "a", None, "a"]
  pytest.importorskip("pyarrow")
  counts = executor.run([tmp_path / "x.jsonl"], [], tmp_path / "out", num_workers=0).counts
  assert (counts["renamed_ids"], counts["kept"]) == (2, 4)
  assert counts["dropped"] == {"read/duplicate_id": 2}


def test_empty_and_unreadable_files_of_other_kinds(tmp_path):
  pytest.importorskip("pyarrow")
  for name in ("x.jsonl", "x.txt", "x.parquet"):
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
  (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really PAR1")
  found = {p.name: _split(tolerant.Reader()(p)) for p in sorted(tmp_path.iterdir())}
  assert all(not docs for docs, _ in found.values())
  reasons = {name: [d.reason for d in drops] for name, (_, drops) in found.items()}
  assert reasons == {
    "x.jsonl": [],
    "x.txt": [],
    "x.parquet": ["unreadable"],
    "bad.txt": ["invalid_utf8"],
    "bad.parquet": ["unreadable"],
  }


def test_foreign_fields_go_to_meta(tmp_path):
  row = {"id": "a", "text": "t", "lang": "en", "score": 1, "source": "site", "n": [1]}
  (tmp_path / "x.jsonl").write_text(json.dumps(row))
  (doc,) = tolerant.Reader()(tmp_path / "x.jsonl")
  assert doc == documents.Doc(
    id="a",
    text="t",
    lang="en",
    score=1.0,
    source=str(tmp_path / "x.jsonl"),
    meta={"source": "site", "n": [1]},
  )


def test_text_over_the_limit_in_a_parquet_file(tmp_path):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  pq.write_table(pa.table({"text": ["é" * 60, "é" * 40], "id": ["a", "b"]}), tmp_path / "x.parquet")
  docs, drops = _split(tolerant.Reader(max_bytes=100)(tmp_path / "x.parquet"))
  assert [d.id for d in docs] == ["b"]
  assert [(d.id, d.reason) for d in drops] == [("a", "text_too_long")]
