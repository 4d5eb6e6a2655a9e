"""Reading raw files that may be damaged: what cannot be read is a `Dropped`, never an exception.

`documents.read` refuses the first bad line; a crawl has many, so here each is counted and the
rest is read. Memory stays bounded by `max_bytes` whatever the length of a line.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator

from minicpm_jax.config import validate
from minicpm_jax.core import extras, files
from minicpm_jax.data import documents, warc

SCHEMA_KEY = b"minicpm_jax.documents"  # marks Parquet files written by `parquet_schema`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
  """Reads one file of any kind that `documents` knows; picklable, so it can go to workers."""

  text_field: str = "text"  # JSON key or Parquet column
  text_split: documents.TextSplit = "file"  # how plain text is cut
  max_bytes: int = 16 * 2**20  # of one JSON line or one text, UTF-8; longer is dropped
  name: str | None = None  # what ids are made from (`documents.name_files`); None: the file name

  def __post_init__(self):
    validate.require_hints(self, "reader.", least=1)

  def named(self, name: str) -> "Reader":
    """The same reader for the file that has this name among the inputs."""
    return dataclasses.replace(self, name=name)

  def __call__(self, path: str | os.PathLike) -> Iterator[documents.Doc | documents.Dropped]:
    """Documents with ids unique in the file, in file order, and a Dropped for what is bad."""
    kind = documents.kind_of(pathlib.Path(path))
    if kind == "jsonl":
      items = self._jsonl(str(path))
    elif kind == "parquet":
      items = self._parquet(str(path))
    elif kind == "warc":
      items = self._warc(str(path))
    else:
      items = self._text(path)
    return unique_ids(self._limited(items))

  def _jsonl(self, path: str) -> Iterator[documents.Doc | documents.Dropped]:
    number = 0
    try:
      with documents.open_stream(path) as stream:
        for number, line in _bounded_lines(stream, self.max_bytes):
          item = self._json_line(path, number, line)
          if item is not None:
            yield item
    except Exception as error:
      if not _is_read_error(error):
        raise
      yield documents.Dropped(path, "unreadable", f"after line {number}: {error}")

  def _json_line(self, path: str, number: int, line: bytes | None):
    where = f"{path}: line {number}"
    doc_id = documents.stable_id(self._name(path), number)
    if line is None:
      return documents.Dropped(doc_id, "line_too_long", f"{where}: over {self.max_bytes} bytes")
    if not line.strip():
      return None
    try:
      row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
      return documents.Dropped(doc_id, "invalid_utf8", f"{where}: {error.reason}")
    except (ValueError, RecursionError) as error:
      return documents.Dropped(doc_id, "not_json", f"{where}: {error}")
    if not isinstance(row, dict):
      found = type(row).__name__
      return documents.Dropped(doc_id, "not_json", f"{where}: found {found}, expected an object")
    return _doc(row, self.text_field, path, number, where, self._name(path))

  def _name(self, path: str) -> str:
    return os.path.basename(path) if self.name is None else self.name

  def _parquet(self, path: str) -> Iterator[documents.Doc | documents.Dropped]:
    number = 0
    try:
      file = documents.open_parquet(path)
      is_ours = SCHEMA_KEY in (file.schema_arrow.metadata or {})
      for batch in file.iter_batches(batch_size=512):
        for row in batch.to_pylist():
          if is_ours:
            yield documents.Doc(**{**row, "meta": json.loads(row["meta"])})
          else:
            where = f"{path}: row {number}"
            yield _doc(row, self.text_field, path, number, where, self._name(path))
          number += 1
    except Exception as error:
      if not _is_read_error(error):
        raise
      yield documents.Dropped(path, "unreadable", f"after row {number}: {error}")

  def _warc(self, path: str) -> Iterator[documents.Doc | documents.Dropped]:
    """A damaged page costs that page; damage to the file itself ends it."""
    errors: list[documents.CorpusError] = []
    for doc in warc.read_warc(path, on_error=errors.append):
      yield from _damaged(path, errors)
      yield doc
    yield from _damaged(path, errors)

  def _text(self, path) -> Iterator[documents.Doc | documents.Dropped]:
    try:
      yield from documents.read_text(path, text_split=self.text_split, name=self.name)
    except documents.CorpusError as error:
      reason = "invalid_utf8" if "expected UTF-8" in str(error) else "unreadable"
      yield documents.Dropped(str(path), reason, str(error))

  def _limited(self, items):
    for item in items:
      if isinstance(item, documents.Doc) and 4 * len(item.text) > self.max_bytes:
        size = len(item.text.encode())
        if size > self.max_bytes:
          yield documents.Dropped(item.id, "text_too_long", f"{size} bytes of {item.source}")
          continue
      yield item


def _damaged(path: str, errors: list[documents.CorpusError]) -> Iterator[documents.Dropped]:
  while errors:
    yield documents.Dropped(path, "unreadable", str(errors.pop(0)))


def unique_ids(
  items: Iterable[documents.Doc | documents.Dropped],
) -> Iterator[documents.Doc | documents.Dropped]:
  """Makes ids unique: a repeated id with equal text is dropped, with other text renamed.

  The new id is "OLD~HASH" with a hash of the text (a pure function of the document), and
  meta["original_id"] keeps the old one.
  """
  seen = {}
  for item in items:
    if isinstance(item, documents.Doc):
      digest = hashlib.sha1(item.text.encode()).digest()
      first = seen.get(item.id)
      if first is not None and first != digest:
        meta = {**item.meta, "original_id": item.id}
        item = dataclasses.replace(item, id=f"{item.id}~{digest.hex()[:12]}", meta=meta)
        first = seen.get(item.id)
      if first is not None:
        yield documents.Dropped(item.id, "duplicate_id", f"same id and text in {item.source}")
        continue
      seen[item.id] = digest
    yield item


def parquet_schema():
  """The Arrow schema of documents on disk: the fields of `Doc`, `meta` as JSON text."""
  pyarrow = extras.require_extra("pyarrow", extra="data")
  text, score = pyarrow.string(), pyarrow.float64()
  fields = {"id": text, "text": text, "source": text, "lang": text, "meta": text, "score": score}
  return pyarrow.schema(list(fields.items()), metadata={SCHEMA_KEY: b"1"})


def to_row(doc: documents.Doc) -> dict:
  """The row of `parquet_schema` that holds a document."""
  meta = files.as_json(doc.meta, default=str)
  return {**vars(doc), "meta": meta}


def _doc(row: dict, text_field: str, path: str, number: int, where: str, name: str):
  """Document of a foreign row: id, text, lang and score by name, every other field in `meta`."""
  try:
    doc = documents.row_doc(row, text_field, path, number, where, name)
  except documents.CorpusError as error:
    return documents.Dropped(documents.stable_id(name, number), "bad_row", str(error))
  lang, score = row.get("lang"), row.get("score")
  return dataclasses.replace(
    doc,
    lang=lang if isinstance(lang, str) else "",
    score=float(score) if isinstance(score, int | float) else None,
    meta={k: v for k, v in row.items() if k not in ("id", text_field, "lang", "score")},
  )


def _bounded_lines(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
  """(number, line), with None for a line over `max_bytes`, which is skipped in pieces."""
  number = 0
  while line := stream.readline(max_bytes + 1):
    number += 1
    if len(line) <= max_bytes:
      yield number, line
      continue
    yield number, None
    while line and not line.endswith(b"\n"):
      line = stream.readline(max_bytes)


def _is_read_error(error: Exception) -> bool:
  is_known = isinstance(error, OSError | EOFError | zlib.error | documents.CorpusError)
  return is_known or type(error).__module__.startswith(("zstandard", "pyarrow"))
