"""Duplicates: exact, MinHash (near), and the stage that takes them out (data.md section 4).

Deduplication is global, so it runs in two passes: a function here reads all documents once and
returns the `Removal`s, then `DropListed` is a stage of a second `executor.run`. Documents are known
by (source, id). Signatures are our own numpy code (no dependency; `semantic.py` uses semhash).
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.core import files
from minicpm_jax.data import ngrams
from minicpm_jax.data.documents import Doc, Dropped

EMPTY = np.uint32(2**32 - 1)  # a row of the signature of a text without shingles
_BLOCK = 1024  # shingles hashed at once: the block stays in the cache
_PAIR_BLOCK = 20_000  # candidate pairs compared at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
  """A document to take out: its key, why, and the id of the one that stays."""

  source: str
  id: str
  reason: str
  detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinHash:
  """FineWeb's setting: 14 bands of 8 rows over 64-bit hashes of 5-grams.

  Two documents become candidates when a band is equal (even odds near Jaccard 0.72) and duplicates
  when the share of equal rows is at least `threshold`.
  """

  shingle_size: int = 5  # words; characters where the text is Chinese or Japanese
  num_bands: int = 14
  band_size: int = 8
  threshold: float = 0.8
  seed: int = 0
  max_bucket: int = 100  # a larger bucket is compared with its first members only

  def __post_init__(self):
    validate.require_hints(self, "MinHash.", least=0)
    for name in ("shingle_size", "num_bands", "band_size", "max_bucket"):
      if getattr(self, name) < 1:
        raise ValueError(f"MinHash.{name}: found {getattr(self, name)}, expected at least 1")
    if not 0 < self.threshold <= 1:
      raise ValueError(f"MinHash.threshold: found {self.threshold}, expected in (0, 1]")


def exact_key(text: str) -> bytes:
  """sha1 of the NFC text with runs of white space collapsed."""
  return hashlib.sha1(" ".join(unicodedata.normalize("NFC", text).split()).encode()).digest()


def exact(
  docs: Iterable[Doc], *, priority: Callable[[str], int] | None = None
) -> Iterator[Removal]:
  """All but the first of equal documents; first by (priority of the source, id), then order."""
  rank = priority or (lambda source: 0)
  best, losers = {}, []
  for doc in docs:
    key = exact_key(doc.text)
    mine = (rank(doc.source), doc.id, doc.source)
    other = best.get(key)
    if other is None:
      best[key] = mine
    elif mine[:2] < other[:2]:
      best[key] = mine
      losers.append((other, key))
    else:
      losers.append((mine, key))
  for (_, doc_id, source), key in losers:
    yield Removal(source=source, id=doc_id, reason="exact_duplicate", detail=best[key][1])


# ------------------------------------------------------------------------------------- MinHash


def shingles(text: str, size: int) -> np.ndarray:
  """uint64 hashes of the n-grams of a text: words, lower case; characters where it is CJK.

  A text with fewer units than `size` is one shingle; a text without any has none.
  """
  if ngrams.is_cjk(text):
    hashes = ngrams.char_hashes("".join(ngrams.words(text.lower())))
  else:
    hashes = ngrams.word_hashes(ngrams.words(text.lower()))
  return ngrams.ngram_hashes(hashes, min(size, len(hashes)) or 1)


def signature(text: str, cfg: MinHash) -> np.ndarray:
  """uint32 [num_bands * band_size]: the least value of each hash function over the shingles.

  A function orders the 64-bit shingles by (multiplier * low half + high half) mod 2**32. Any two
  functions are independent; in a text of a million shingles the least value is shared by chance
  with odds 2**-12.
  """
  multipliers = _multipliers(cfg.num_bands * cfg.band_size, cfg.seed)
  least = np.full(len(multipliers), EMPTY)
  values = shingles(text, cfg.shingle_size)
  low, high = values.astype(np.uint32), (values >> np.uint64(32)).astype(np.uint32)
  for start in range(0, len(values), _BLOCK):
    block = multipliers[:, None] * low[None, start : start + _BLOCK]
    block += high[None, start : start + _BLOCK]
    np.minimum(least, block.min(axis=1), out=least)
  return least


@functools.cache
def _multipliers(count: int, seed: int) -> np.ndarray:
  draw = ngrams.mix(np.arange(count, dtype=np.uint64) + np.uint64(seed * 2**32 + 1))
  return draw.astype(np.uint32) | np.uint32(1)


def minhash(docs: Iterable[Doc], cfg: MinHash | None = None) -> Iterator[Removal]:
  """All but the best of near duplicates: the highest score, then the longest text, then first.

  Memory is one signature (448 bytes by default) and one key a document; texts are not held.
  """
  cfg = cfg or MinHash()
  keys, blocks, block, quality = [], [], [], []
  for doc in docs:
    keys.append((doc.source, doc.id))
    quality.append((float("-inf") if doc.score is None else doc.score, len(doc.text)))
    block.append(signature(doc.text, cfg))
    if len(block) == 4096:
      blocks.append(np.stack(block))
      block = []
  if block:
    blocks.append(np.stack(block))
  if not blocks:
    return
  signatures = np.concatenate(blocks)
  del blocks
  yield from removals(keys, quality, clusters(signatures, cfg))


def removals(
  keys: Sequence[tuple[str, str]], quality: Sequence[tuple[float, int]], group: np.ndarray
) -> Iterator[Removal]:
  """All rows of each group but the first of the best `quality` (score, length)."""
  best = {}
  for row, root in enumerate(group.tolist()):
    if root not in best or quality[row] > quality[best[root]]:
      best[root] = row
  for row, root in enumerate(group.tolist()):
    if best[root] != row:
      source, doc_id = keys[row]
      detail = keys[best[root]][1]
      yield Removal(source=source, id=doc_id, reason="near_duplicate", detail=detail)


def clusters(signatures: np.ndarray, cfg: MinHash) -> np.ndarray:
  """The lowest row of each row's cluster, from signatures [rows, bands * band size]."""
  parent = np.arange(len(signatures))
  is_empty = (signatures == EMPTY).all(axis=1)
  whole = ngrams.mix(_combine(signatures))
  _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
  parent = np.where(is_empty, parent, first[inverse])
  distinct = np.flatnonzero((parent == np.arange(len(parent))) & ~is_empty)
  pairs = candidate_pairs(band_hashes(signatures[distinct], cfg), cfg.max_bucket)
  for start in range(0, len(pairs), _PAIR_BLOCK):
    rows = distinct[pairs[start : start + _PAIR_BLOCK]]
    equal = (signatures[rows[:, 0]] == signatures[rows[:, 1]]).mean(axis=1)
    for a, b in rows[equal >= cfg.threshold].tolist():
      _union(parent, a, b)
  for row in range(len(parent)):  # parents have lower rows, so one pass is enough
    parent[row] = parent[parent[row]]
  return parent


def band_hashes(signatures: np.ndarray, cfg: MinHash) -> np.ndarray:
  """uint64 [rows, bands]: one hash for the rows of each band."""
  bands = signatures.reshape(len(signatures), cfg.num_bands, cfg.band_size)
  return ngrams.mix(_combine(bands))


def candidate_pairs(hashes: np.ndarray, max_bucket: int) -> np.ndarray:
  """int64 [pairs, 2] of rows (lower first, unique, sorted) that share the hash of a band."""
  found = [np.zeros((0, 2), np.int64)]
  for band in hashes.T:
    order = np.argsort(band, kind="stable")
    is_same = np.diff(band[order]) == 0
    edges = np.flatnonzero(np.diff(is_same, prepend=False, append=False)).reshape(-1, 2)
    for start, end in edges.tolist():
      rows = order[start : end + 1].tolist()
      found.append(np.array(list(bucket_pairs(rows, max_bucket)), np.int64))
  return np.unique(np.concatenate(found), axis=0)


def bucket_pairs(rows: Sequence[int], max_bucket: int) -> Iterator[tuple[int, int]]:
  """Pairs of ascending rows; over `max_bucket` rows only those with one of the first."""
  for a in range(min(len(rows), max_bucket)):
    for b in range(a + 1, len(rows)):
      yield rows[a], rows[b]


def _combine(values: np.ndarray) -> np.ndarray:
  total = np.zeros(values.shape[:-1], np.uint64)
  for column in range(values.shape[-1]):
    total = ngrams.mix(total * np.uint64(0x100000001B3) + values[..., column].astype(np.uint64))
  return total


def _union(parent: np.ndarray, a: int, b: int) -> None:
  roots = []
  for node in (a, b):
    while parent[node] != node:
      parent[node] = parent[parent[node]]
      node = parent[node]
    roots.append(node)
  parent[max(roots)] = min(roots)


# ------------------------------------------------------------------------------- the second pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropListed:
  """Stage that drops the documents of a file that `write_removals` made."""

  name: ClassVar[str] = "dedup"
  path: str
  sha256: str  # of the file: another list is another stage

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    listed = _read_removals(self.path, self.sha256)
    for doc in docs:
      why = listed.get((doc.source, doc.id))
      yield Dropped(doc.id, *why) if why else doc


def write_removals(path: str | os.PathLike, removals: Iterable[Removal]) -> DropListed:
  """Writes the list (JSON lines) and returns the stage that applies it."""
  digest = hashlib.sha256()
  with files.replacing(path) as partial, open(partial, "wb") as file:
    for removal in removals:
      line = json.dumps(dataclasses.astuple(removal), ensure_ascii=False).encode() + b"\n"
      digest.update(line)
      file.write(line)
  return DropListed(path=str(path), sha256=digest.hexdigest())


@functools.lru_cache(maxsize=2)
def _read_removals(path: str, sha256: str) -> dict[tuple[str, str], tuple[str, str]]:
  data = pathlib.Path(path).read_bytes()
  found = hashlib.sha256(data).hexdigest()
  if found != sha256:
    raise ValueError(f"{path}: found sha256 {found[:12]}, expected {sha256[:12]}")
  rows = map(json.loads, data.splitlines())
  return {(source, doc_id): (reason, detail) for source, doc_id, reason, detail in rows}
