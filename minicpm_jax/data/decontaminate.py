"""Takes out training text that shares an n-gram with an evaluation set (data.md section 4).

Units are words, lower case, without symbols: 13 in a row, or 26 characters where the question is
Chinese or Japanese. A hit found by hash is confirmed on the text itself.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.data import documents, ngrams
from minicpm_jax.data.documents import Doc, Dropped

_CJK_FACTOR = 2  # characters that stand for one word


@dataclasses.dataclass(frozen=True)
class Hit:
  """A shared n-gram: where it comes from and its place in the document's units."""

  benchmark: str
  item: str  # id of the question
  start: int
  end: int


class Index:
  """The n-grams of evaluation sets: word n-grams and character n-grams apart."""

  def __init__(self, benchmarks: Mapping[str, Iterable[tuple[str, str]]], *, size: int = 13):
    """`benchmarks`: name -> (item id, text of the question) pairs."""
    if size < 2:
      raise ValueError(f"size: found {size}, expected at least 2 words")
    self.size = size
    self.num_items = collections.Counter()
    self.num_short = collections.Counter()  # items with less than one n-gram: not protected
    grams = {False: {}, True: {}}
    for name, items in benchmarks.items():
      for item, text in items:
        is_cjk = ngrams.is_cjk(text)
        units, hashes = _units(text, is_cjk)
        length = self._length(is_cjk)
        self.num_items[name] += 1
        self.num_short[name] += len(units) < length
        for start, value in enumerate(ngrams.ngram_hashes(hashes, length).tolist()):
          grams[is_cjk].setdefault(value, (name, item, tuple(units[start : start + length])))
    self._grams = grams
    self._sorted = {kind: np.sort(np.fromiter(g, np.uint64, len(g))) for kind, g in grams.items()}

  def _length(self, is_cjk: bool) -> int:
    return self.size * (_CJK_FACTOR if is_cjk else 1)

  def hits(self, text: str) -> Iterator[Hit]:
    """Every place where the text shares an n-gram with an item, words before characters."""
    for is_cjk in (False, True):
      known = self._sorted[is_cjk]
      if not len(known) or (is_cjk and text.isascii()):
        continue
      units, hashes = _units(text, is_cjk)
      length = self._length(is_cjk)
      values = ngrams.ngram_hashes(hashes, length)
      place = np.minimum(np.searchsorted(known, values), len(known) - 1)
      for start in np.flatnonzero(known[place] == values).tolist():
        name, item, gram = self._grams[is_cjk][int(values[start])]
        if tuple(units[start : start + length]) == gram:
          yield Hit(name, item, start, start + length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decontaminate:
  """Stage that drops a document, or with "passage" the lines of it, that hold a hit.

  `paths` are evaluation files (JSON lines, .gz allowed); the text of an item is its question and
  passage. The detail of a drop is "BENCHMARK ITEM"; `report` counts them.
  """

  name: ClassVar[str] = "decontaminate"
  paths: tuple[str, ...]
  size: int = 13  # words
  remove: Literal["document", "passage"] = "document"
  fields: tuple[str, ...] = ("question", "passage", "prompt")  # those present are joined
  sha256: str = ""  # of the files' bytes, filled in: other questions are another stage

  def __post_init__(self):
    validate.require_hints(self, "decontaminate.", least=1)
    digest = hashlib.sha256()
    for path in self.paths:
      digest.update(hashlib.sha256(pathlib.Path(path).read_bytes()).digest())
    object.__setattr__(self, "sha256", digest.hexdigest())

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    index = load_index(tuple(self.paths), self.size, tuple(self.fields), self.sha256)
    for doc in docs:
      if self.remove == "document":
        hit = next(index.hits(doc.text), None)
        yield Dropped(doc.id, "contaminated", f"{hit.benchmark} {hit.item}") if hit else doc
      else:
        yield remove_passages(doc, index)


def remove_passages(doc: Doc, index: Index) -> Doc | Dropped:
  """The document without the paragraphs (lines) that hold a hit, alone or with the next line.

  meta["contaminated"] lists "BENCHMARK ITEM" of what was taken out. A document whose hit spans
  more than two lines, or of which nothing is left, is dropped.
  """
  lines, bad, found = doc.text.split("\n"), set(), []
  for width in (1, 2):
    for start in range(len(lines) - width + 1):
      rows = range(start, start + width)
      hit = (
        None if bad.intersection(rows) else next(index.hits("\n".join(lines[start:][:width])), None)
      )
      if hit:
        bad.update(rows)
        found.append(f"{hit.benchmark} {hit.item}")
  text = "\n".join(line for i, line in enumerate(lines) if i not in bad)
  rest = next(index.hits(text), None)
  if rest or (bad and not text.strip()):
    return Dropped(doc.id, "contaminated", f"{rest.benchmark} {rest.item}" if rest else found[0])
  if not bad:
    return doc
  return dataclasses.replace(doc, text=text, meta={**doc.meta, "contaminated": found})


def read_items(
  path: str | os.PathLike, fields: Sequence[str] = ("question", "passage", "prompt")
) -> Iterator[tuple[str, str]]:
  """(id, text) of each item of an evaluation file; ValueError when an item has no text."""
  is_empty = True
  for number, row in documents.json_rows(path):
    parts = [row[f] for f in fields if isinstance(row.get(f), str)]
    if not parts:
      raise documents.CorpusError(
        f"{path}: line {number}: found keys {sorted(row)}, expected text under one of "
        f"{list(fields)}"
      )
    is_empty = False
    yield str(row.get("id", number)), "\n".join(parts)
  if is_empty:
    raise documents.CorpusError(f"{path}: found no item, expected JSON lines")


@functools.lru_cache(maxsize=2)
def load_index(
  paths: tuple[str, ...], size: int, fields: tuple[str, ...], sha256: str = ""
) -> Index:
  """The index of evaluation files; a benchmark is named by its file, the second of a name NAME#2.

  `sha256` (`Decontaminate`) makes files whose content has changed another index.
  """
  named: dict[str, str] = {}
  for path in paths:
    stem = pathlib.Path(path).name.split(".")[0]
    free = (f"{stem}#{i}" if i > 1 else stem for i in itertools.count(1))
    named[next(name for name in free if name not in named)] = path
  return Index({name: read_items(path, fields) for name, path in named.items()}, size=size)


def report(drops: Iterable[Mapping[str, str]], index: Index) -> dict[str, dict[str, int]]:
  """Per benchmark: items, items too short to protect, documents dropped, items they hit.

  `drops` are rows of `executor.read_drops`; rows of other stages are left out.
  """
  documents, items = collections.Counter(), collections.defaultdict(set)
  for row in drops:
    if row["reason"] == "contaminated":
      name, item = row["detail"].split(" ", 1)
      documents[name] += 1
      items[name].add(item)
  return {
    name: {
      "items": index.num_items[name],
      "items_too_short": index.num_short[name],
      "documents_dropped": documents[name],
      "items_hit": len(items[name]),
    }
    for name in index.num_items
  }


def _units(text: str, is_cjk: bool) -> tuple[Sequence[str], np.ndarray]:
  words = ngrams.words(text.lower())
  if is_cjk:
    chars = "".join(words)
    return chars, ngrams.char_hashes(chars)
  return words, ngrams.word_hashes(words)
