"""Readers of raw text: JSONL (.gz, .zst), Parquet, WARC, plain text (.gz), an iterable of strings.

All yield `Doc` (data.md section 1) in a fixed order: files sorted by path, then file order.
Bad input raises CorpusError naming file and line. Cleaning is left to later stages.

A document without an id of its own gets one from its file's name and its place in the file (see
`name_files`), so that splits by the hash of the id survive a move of the folder.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import numbers
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Literal

from minicpm_jax.core import extras

TextSplit = Literal["file", "line", "paragraph"]
META_FIELDS = ("url", "title", "date", "kind", "label")  # of JSON rows, kept where strings
_TEXT_SUFFIXES = (".txt", ".md", ".text")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".warc": "warc"}
_COMPRESSION = (".gz", ".zst")


class CorpusError(ValueError):
  """Input text that cannot be used; the message names file, line, found and expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doc:
  """One document; `id` is stable over runs (default: sha1 of file name and offset)."""

  id: str
  text: str
  source: str = ""
  lang: str = ""
  meta: dict = dataclasses.field(default_factory=dict)
  score: float | None = None

  def __post_init__(self):
    for name in ("id", "text", "source", "lang"):  # not by hints: there are millions of these
      if not isinstance(getattr(self, name), str):
        found = getattr(self, name)
        raise CorpusError(f"document {self.id!r}: {name}: found {found!r}, expected text")
    if not isinstance(self.meta, dict) or not isinstance(self.score, numbers.Real | None):
      found = f"{self.meta!r}, {self.score!r}"
      raise CorpusError(f"document {self.id!r}: meta, score: found {found}, expected dict, number")


@dataclasses.dataclass(frozen=True)
class Dropped:
  """A document that a reader or stage left out: its id, why, and what was found."""

  id: str
  reason: str
  detail: str = ""


def stable_id(name: str, offset: int) -> str:
  """The default document id: sha1 of the name of its file and the position in it."""
  return hashlib.sha1(f"{name}\0{offset}".encode()).hexdigest()


def bucket(key: str) -> int:
  """0..999 by the sha1 of the key: splits by it are the same in every run."""
  return int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") % 1000


def is_heldout(key: str, permille: int = 20) -> bool:
  """True for a fixed `permille` of all keys."""
  return bucket(key) < permille


def deduplicate(docs: Iterable[Doc]) -> Iterator[Doc]:
  """Keeps the first of documents with equal NFC text up to white space (data.md section 4)."""
  seen = set()
  for doc in docs:
    normal = " ".join(unicodedata.normalize("NFC", doc.text).split())
    key = hashlib.sha1(normal.encode()).digest()
    if key not in seen:
      seen.add(key)
      yield doc


def from_texts(texts: Iterable[str], *, source: str = "texts") -> Iterator[Doc]:
  """Documents from a Python iterable of strings."""
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      raise CorpusError(f"{source}: item {i}: found {type(text).__name__}, expected str")
    yield Doc(id=stable_id(source, i), text=_encodable(text, f"{source}: item {i}"), source=source)


def head(texts: Iterable[str], num_chars: int) -> Iterator[str]:
  """Texts from the front until they hold `num_chars` characters (what a tokenizer learns from)."""
  size = 0
  for text in texts:
    yield text
    size += len(text)
    if size >= num_chars:
      return


def read(
  paths: Sequence[str | os.PathLike],
  *,
  text_field: str = "text",
  text_split: TextSplit = "file",
) -> Iterator[Doc]:
  """Documents of files and folders (searched recursively), by suffix.

  `text_field` is the JSON key or Parquet column. `text_split` cuts plain text files into
  documents: the whole file, its lines, or blocks between blank lines. A file of unknown suffix
  named directly is read as plain text; in folders it is left out.
  """
  for path, name in name_files(paths):
    kind = kind_of(path) or "text"
    if kind == "jsonl":
      yield from read_jsonl(path, text_field=text_field, name=name)
    elif kind == "parquet":
      yield from read_parquet(path, text_field=text_field, name=name)
    elif kind == "warc":
      from minicpm_jax.data import warc  # imports this module

      yield from warc.read_warc(path)
    else:
      yield from read_text(path, text_split=text_split, name=name)


def expand(paths: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
  """The files behind `paths`; CorpusError for a missing path or a folder without any."""
  return [path for path, _ in name_files(paths)]


def name_files(paths: Sequence[str | os.PathLike]) -> list[tuple[pathlib.Path, str]]:
  """(file, name) of the files behind `paths`, with names that do not depend on where they lie.

  The name of a file in a folder of `paths` is its path inside that folder, that of a file given
  directly its file name. Another file of an equal name gets "NAME#2", "NAME#3" in input order.
  """
  files: list[tuple[pathlib.Path, str]] = []
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
      if not inside:
        known = ", ".join(sorted([*_KINDS, *_TEXT_SUFFIXES]))
        raise CorpusError(f"{path}: found no readable file, expected {known} (or .gz, .zst)")
      files += [(p, p.relative_to(path).as_posix()) for p in inside]
    elif path.exists():
      files.append((path, path.name))
    else:
      raise CorpusError(f"{path}: no such file or folder")
  seen: dict[str, list[pathlib.Path]] = {}
  named = []
  for path, name in files:
    same = seen.setdefault(name, [])
    if path not in same:
      same.append(path)
    place = same.index(path) + 1
    named.append((path, name if place == 1 else f"{name}#{place}"))
  return named


def read_jsonl(
  path: str | os.PathLike, *, text_field: str = "text", name: str | None = None
) -> Iterator[Doc]:
  """One JSON object a line with the text under `text_field`; an "id" string is kept.

  `name` (default: the file name) is what other ids are made from.
  """
  name = pathlib.Path(path).name if name is None else name
  for number, row in json_rows(path):
    yield row_doc(row, text_field, str(path), number, f"{path}: line {number}", name)


def json_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
  """(line number, object) of a file of JSON lines; CorpusError names file and line."""
  for number, line in enumerate(_lines(path), start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise CorpusError(f"{path}: line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
      found = type(row).__name__
      raise CorpusError(f"{path}: line {number}: found {found}, expected a JSON object")
    yield number, row


def read_parquet(
  path: str | os.PathLike, *, text_field: str = "text", name: str | None = None
) -> Iterator[Doc]:
  """Rows of a Parquet file with the text in column `text_field`; an "id" column is kept."""
  name = pathlib.Path(path).name if name is None else name
  parquet = open_parquet(path)
  names = parquet.schema_arrow.names
  if text_field not in names:
    raise CorpusError(f"{path}: found columns {names}, expected a text column {text_field!r}")
  columns = [n for n in ("id", text_field, "lang", "score", *META_FIELDS) if n in names]
  number = 0
  for batch in parquet.iter_batches(batch_size=512, columns=columns):
    for row in batch.to_pylist():
      yield row_doc(row, text_field, str(path), number, f"{path}: row {number}", name)
      number += 1


def open_parquet(path: str | os.PathLike):
  """pyarrow's ParquetFile, or CorpusError when the file is none."""
  extras.require_extra("pyarrow", extra="data")
  module = extras.require_extra("pyarrow.parquet", extra="data")
  try:
    return module.ParquetFile(path)
  except (OSError, ValueError) as error:
    raise CorpusError(f"{path}: not a readable Parquet file ({error})") from None


def read_text(
  path: str | os.PathLike, *, text_split: TextSplit = "file", name: str | None = None
) -> Iterator[Doc]:
  """Plain UTF-8 text as one document, one a line, or one a block between blank lines."""
  name = pathlib.Path(path).name if name is None else name
  block, count = [], 0

  def flush():
    text = "".join(block)
    block.clear()
    return Doc(id=stable_id(name, count), text=text, source=str(path))

  for line in _lines(path):
    is_blank = not line.strip()
    if text_split == "paragraph" and is_blank and block:
      yield flush()
      count += 1
    if text_split == "file" or not is_blank:
      block.append(line)
    if text_split == "line" and block:
      yield flush()
      count += 1
  if block:
    yield flush()


def kind_of(path: pathlib.Path) -> str | None:
  """The reader of a file by its suffix: "jsonl", "parquet", "text", or None when unknown."""
  name = path.name.lower()
  for suffix in _COMPRESSION:
    name = name.removesuffix(suffix)
  if name.endswith(_TEXT_SUFFIXES):
    return "text"
  return _KINDS.get(os.path.splitext(name)[1])


def row_doc(
  row: dict, text_field: str, source: str, number: int, where: str, name: str | None = None
) -> Doc:
  """One JSON object as a document; CorpusError without a string under `text_field`.

  A list of messages ({"role", "content"} objects) is kept as its JSON text: `shards.prepare` with
  `is_chat` wants it so.
  `name` (default: the file name of `source`) makes the id where the row has none.
  """
  name = pathlib.Path(source).name if name is None else name
  text = row.get(text_field)
  if isinstance(text, list) and text and all(isinstance(m, dict) and "role" in m for m in text):
    text = json.dumps(text, ensure_ascii=False)
  if not isinstance(text, str):
    found = type(text).__name__ if text_field in row else f"keys {sorted(row)}"
    raise CorpusError(f"{where}: found {found}, expected a string under {text_field!r}")
  own_id = row.get("id")
  lang, score = row.get("lang"), row.get("score")
  return Doc(
    id=own_id if isinstance(own_id, str) else stable_id(name, number),
    text=_encodable(text, where),
    source=source,
    lang=lang if isinstance(lang, str) else "",
    meta={name: row[name] for name in META_FIELDS if isinstance(row.get(name), str)},
    score=float(score) if isinstance(score, int | float) else None,
  )


def _encodable(text: str, where: str) -> str:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise CorpusError(f"{where}: text cannot be encoded as UTF-8 ({error.reason})") from None
  return text


@contextlib.contextmanager
def open_stream(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """The decompressed bytes of a file (.gz and .zst by suffix)."""
  with contextlib.ExitStack() as stack:
    raw = stack.enter_context(open(path, "rb"))
    if str(path).endswith(".gz"):
      yield stack.enter_context(gzip.GzipFile(fileobj=raw))
    elif str(path).endswith(".zst"):
      zstandard = extras.require_extra("zstandard", extra="data")
      reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
      yield io.BufferedReader(reader)
    else:
      yield raw


def _lines(path: str | os.PathLike) -> Iterator[str]:
  number = 0
  try:
    with open_stream(path) as stream:
      for number, line in enumerate(stream, start=1):
        try:
          yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
          bad = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
          raise CorpusError(f"{path}: line {number}: found {bad}, expected UTF-8") from None
  except (OSError, EOFError) as error:
    raise CorpusError(f"{path}: after line {number}: cannot be read ({error})") from None
  except Exception as error:
    if type(error).__module__.startswith("zstandard"):
      raise CorpusError(f"{path}: after line {number}: cannot be read ({error})") from None
    raise
