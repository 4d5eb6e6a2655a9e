"""Readers: what they yield, and that bad input is refused with file and line."""

import gzip
import json

import pytest

from minicpm_jax.data import documents

LINES = [{"id": "a", "text": "first\nsecond"}, {"text": "漢字 é"}, {"text": ""}]


def _write_jsonl(path, opener=open):
  with opener(path, "wb") as file:
    for row in LINES:
      file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _zstd_open(path, mode):
  zstandard = pytest.importorskip("zstandard")
  return zstandard.open(path, mode)


@pytest.mark.smoke
@pytest.mark.parametrize(
  "name, opener", [("x.jsonl", open), ("x.jsonl.gz", gzip.open), ("x.jsonl.zst", _zstd_open)]
)
def test_jsonl_plain_and_compressed(tmp_path, name, opener):
  _write_jsonl(tmp_path / name, opener)
  docs = list(documents.read([tmp_path / name]))
  assert [d.text for d in docs] == [row["text"] for row in LINES]
  assert docs[0].id == "a"
  assert docs[1].id == documents.stable_id(name, 2)


def test_parquet(tmp_path):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  texts = [f"document {i}" for i in range(1200)]
  pq.write_table(pa.table({"body": texts, "id": texts}), tmp_path / "x.parquet")
  docs = list(documents.read([tmp_path], text_field="body"))
  assert [d.text for d in docs] == texts
  assert docs[7].id == "document 7"
  with pytest.raises(documents.CorpusError, match=r"x\.parquet.*'body', 'id'.*'text'"):
    list(documents.read([tmp_path]))


@pytest.mark.parametrize(
  "split, expected",
  [
    ("file", ["a\nb\n\n\nc\n"]),
    ("line", ["a\n", "b\n", "c\n"]),
    ("paragraph", ["a\nb\n", "c\n"]),
  ],
)
def test_plain_text_splits(tmp_path, split, expected):
  (tmp_path / "x.txt").write_text("a\nb\n\n\nc\n")
  with gzip.open(tmp_path / "y.txt.gz", "wb") as file:
    file.write(b"\xef\xbb\xbfa\nb\n\n\nc\n")  # a byte-order mark is no text
  docs = list(documents.read([tmp_path], text_split=split))
  assert [d.text for d in docs] == expected * 2
  assert len({d.id for d in docs}) == len(docs)


def test_folders_are_read_in_order_of_path_and_unknown_files_left_out(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "1.txt").write_text("b1")
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "c.bin").write_bytes(b"\xff")
  assert [d.text for d in documents.read([tmp_path])] == ["a", "b1"]


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path):
  """A split by the hash of the id must survive a move; equal names must not collide."""
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

  def make(root):
    (root / "sub").mkdir(parents=True)
    for folder in (root, root / "sub"):
      (folder / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
      (folder / "y.txt").write_text("c\n\nd\n")
      pq.write_table(pa.table({"text": ["e", "f"]}), folder / "z.parquet")
    return [d.id for d in documents.read([root], text_split="paragraph")]

  here, there = make(tmp_path / "one" / "corpus"), make(tmp_path / "another" / "name")
  assert here == there and len(set(here)) == len(here) == 12
  first = documents.stable_id("sub/x.jsonl", 1)  # sha1 of "sub/x.jsonl", NUL, "1"
  assert first == "5fa4ce7ffca64a94fc9585ed37e265d189e6177c" and first in here


def test_equal_names_of_several_inputs_get_numbers(tmp_path):
  for folder in "ab":
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "x.jsonl").write_text('{"text": "t"}\n')
  a, b = tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"
  assert documents.name_files([a, b]) == [(a, "x.jsonl"), (b, "x.jsonl#2")]
  assert documents.name_files([tmp_path / "a", b, a])[2] == (a, "x.jsonl")  # the same file again
  assert len({d.id for d in documents.read([a, b])}) == 2


def test_from_texts():
  docs = list(documents.from_texts(iter(["x", "y"])))
  assert [d.text for d in docs] == ["x", "y"]
  assert docs[0].id != docs[1].id
  with pytest.raises(documents.CorpusError, match="item 1: found int, expected str"):
    list(documents.from_texts(iter(["x", 3])))


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl: line 2: not JSON"),
    ("x.jsonl", b'{"text": "a"}\n\n[1]\n', r"x\.jsonl: line 3: found list, expected a JSON obj"),
    ("x.jsonl", b'{"txt": "a"}\n', r"line 1: found keys \['txt'\], expected a string under 'text'"),
    ("x.jsonl", b'{"text": 3}\n', r"line 1: found int, expected a string"),
    ("x.jsonl", b'{"text": "\\ud800"}\n', r"line 1: text cannot be encoded as UTF-8"),
    ("x.txt", b"good\nbad \xff byte\n", r"x\.txt: line 2: found byte 0xff at column 5, expected U"),
    ("x.txt.gz", b"no gzip", r"x\.txt\.gz: after line 0: cannot be read"),
    ("x.jsonl.zst", b"no zstd", r"x\.jsonl\.zst: after line 0: cannot be read"),
    ("x.parquet", b"no parquet", r"x\.parquet: not a readable Parquet file"),
  ],
)
def test_bad_input_names_file_and_line(tmp_path, name, content, message):
  if name.endswith(".zst"):
    pytest.importorskip("zstandard")
  (tmp_path / name).write_bytes(content)
  with pytest.raises(documents.CorpusError, match=message):
    list(documents.read([tmp_path / name]))


def test_truncated_gzip_names_the_line(tmp_path):
  data = gzip.compress("\n".join(str(i) * 50 for i in range(5000)).encode())
  (tmp_path / "x.txt.gz").write_bytes(data[: len(data) // 2])
  with pytest.raises(documents.CorpusError, match=r"after line \d+: cannot be read"):
    list(documents.read([tmp_path / "x.txt.gz"], text_split="line"))


def test_missing_path_and_empty_folder(tmp_path):
  with pytest.raises(documents.CorpusError, match="nowhere: no such file"):
    list(documents.read([tmp_path / "nowhere"]))
  with pytest.raises(documents.CorpusError, match="found no readable file"):
    list(documents.read([tmp_path]))


def test_deduplicate_ignores_white_space_and_composition():
  texts = ["caf\u00e9  x", "cafe\u0301 x\n", "cafe x"]
  kept = list(documents.deduplicate(documents.from_texts(texts)))
  assert [d.text for d in kept] == [texts[0], texts[2]]


def test_heldout_share():
  share = sum(documents.is_heldout(f"doc{i}", 50) for i in range(20_000)) / 20_000
  assert abs(share - 0.05) < 0.006  # four standard deviations of the binomial
  assert not any(documents.is_heldout(str(i), 0) for i in range(100))
  assert all(documents.is_heldout(str(i), 1000) for i in range(100))


def test_head_ends_with_the_text_that_fills_it():
  assert list(documents.head(iter(["abc", "de", "f", "g"]), 5)) == ["abc", "de"]
  assert list(documents.head(["abc"], 5)) == ["abc"]
