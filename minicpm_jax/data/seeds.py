"""Seed pools of the classifier: positives, negatives, their split (data.md 2.5).

A document belongs to train, dev or test by the hash of its id, so its pieces never part. Every
choice is by hash: the same pools give the same rows in any order of reading.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.data import dedup, documents
from minicpm_jax.data.documents import Doc

Kind = Literal["llm_scored", "instruction", "textbook", "synthetic", "web"]
Split = Literal["train", "dev", "test"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedPool:
  """Candidate positives; `accepted` and `deltas` are what verification said of them."""

  name: str
  path: str  # file or folder that `documents.read` knows
  lang: str
  kind: Kind
  accepted: bool | None = None  # None: not verified yet
  deltas: Mapping[str, float] = dataclasses.field(default_factory=dict)
  question_field: str = "question"  # instruction pools: keys of the JSON rows
  answer_field: str = "answer"

  def __post_init__(self):
    validate.require_hints(self, f"seed pool {self.name}: ")


def read_pool(pool: SeedPool) -> Iterator[Doc]:
  """Documents of a pool; instructions become "question LF LF answer"."""
  meta = {"pool": pool.name, "pool_kind": pool.kind}
  docs = _instructions(pool) if pool.kind == "instruction" else documents.read([pool.path])
  for doc in docs:
    yield dataclasses.replace(doc, lang=doc.lang or pool.lang, meta=doc.meta | meta)


def _instructions(pool: SeedPool) -> Iterator[Doc]:
  for path, file_name in documents.name_files([pool.path]):
    for number, row in documents.json_rows(path):
      parts = [row.get(name) for name in (pool.question_field, pool.answer_field)]
      if not all(isinstance(part, str) for part in parts):
        raise documents.CorpusError(
          f"{path}: line {number}: found keys {sorted(row)}, expected strings under "
          f"{pool.question_field!r} and {pool.answer_field!r}"
        )
      own = row.get("id")
      doc_id = own if isinstance(own, str) else documents.stable_id(file_name, number)
      yield Doc(id=doc_id, text="\n\n".join(parts), source=str(path))


# --- Sampling ------------------------------------------------------------------------------------


def hash_order(docs: Iterable[Doc], seed: int = 0) -> list[Doc]:
  """The documents in a random order that depends on their ids and file names only."""

  def key(doc: Doc) -> bytes:
    name = f"{seed}\0{doc.id}\0{os.path.basename(doc.source)}"
    return hashlib.sha1(name.encode()).digest()

  return sorted(docs, key=key)


def split_of(doc_id: str, *, dev_permille: int = 100, test_permille: int = 100) -> Split:
  """Where a document belongs, by the hash of its id."""
  number = documents.bucket("split\0" + doc_id)
  if number < test_permille:
    return "test"
  return "dev" if number < test_permille + dev_permille else "train"


def pieces(docs: Iterable[Doc], piece_chars: int = 0) -> Iterator[Doc]:
  """Documents cut to pieces of `piece_chars` characters, ids "ID#k"; 0 = whole documents."""
  if piece_chars < 0:
    raise ValueError(f"piece_chars: found {piece_chars}, expected >= 0")
  for doc in docs:
    if piece_chars == 0 or len(doc.text) <= piece_chars:
      yield doc
      continue
    for k, start in enumerate(range(0, len(doc.text), piece_chars)):
      text = doc.text[start : start + piece_chars]
      yield dataclasses.replace(doc, id=f"{doc.id}#{k}", text=text)


def sample_positives(
  pools: Mapping[str, Iterable[Doc]], *, pool_cap: int | None = None, seed: int = 0
) -> list[Doc]:
  """At most `pool_cap` documents of each pool, uniform in it, then all in hash order."""
  chosen = []
  for docs in pools.values():
    chosen += hash_order(docs, seed)[:pool_cap]
  return hash_order(chosen, seed)


def sample_negatives(
  sources: Mapping[str, Iterable[Doc]], total: int, *, seed: int = 0
) -> list[Doc]:
  """`total` documents in equal shares from every source, as far as they reach.

  What a small source lacks is made up by the others. Fewer than `total` come back when all end.
  """
  validate.require(total >= 0, "total", total, "a number of documents >= 0")
  queues = {name: hash_order(docs, seed) for name, docs in sources.items()}
  taken = dict.fromkeys(queues, 0)
  open_names = [name for name in queues if queues[name]]
  missing = total
  while missing > 0 and open_names:
    share = max(missing // len(open_names), 1)
    for name in list(open_names):
      count = min(share, len(queues[name]) - taken[name], missing)
      taken[name] += count
      missing -= count
      if taken[name] == len(queues[name]):
        open_names.remove(name)
  return hash_order((d for name, n in taken.items() for d in queues[name][:n]), seed)


def without_near(
  negatives: Iterable[Doc], positives: Iterable[Doc], cfg: dedup.MinHash | None = None
) -> tuple[list[Doc], list[tuple[str, str]]]:
  """(negatives unlike every positive, [(id of one left out, id of the positive)]).

  Alike: MinHash similarity of at least `cfg.threshold` (0.8).
  """
  cfg = cfg or dedup.MinHash()
  positives = list(positives)
  signatures = _signatures(positives, cfg)
  buckets: dict[tuple[int, int], list[int]] = {}
  for row, bands in enumerate(dedup.band_hashes(signatures, cfg)):
    for band, value in enumerate(bands.tolist()):
      buckets.setdefault((band, value), []).append(row)
  kept, removed = [], []
  for doc in negatives:
    own = dedup.signature(doc.text, cfg)
    near = _nearest(own, signatures, buckets, cfg)
    if near is None:
      kept.append(doc)
    else:
      removed.append((doc.id, positives[near].id))
  return kept, removed


def _signatures(docs: Sequence[Doc], cfg: dedup.MinHash) -> np.ndarray:
  width = cfg.num_bands * cfg.band_size
  rows = [dedup.signature(doc.text, cfg) for doc in docs]
  return np.stack(rows) if rows else np.zeros((0, width), np.uint32)


def _nearest(
  own: np.ndarray,
  signatures: np.ndarray,
  buckets: Mapping[tuple[int, int], list[int]],
  cfg: dedup.MinHash,
) -> int | None:
  if (own == dedup.EMPTY).all():  # nothing to compare
    return None
  bands = dedup.band_hashes(own[None, :], cfg)[0].tolist()
  rows = sorted({r for band, value in enumerate(bands) for r in buckets.get((band, value), ())})
  for row in rows:
    if (signatures[row] == own).mean() >= cfg.threshold:
      return row
  return None
