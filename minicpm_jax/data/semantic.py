"""Semantic duplicates of short texts (prompts) with semhash (data.md section 4).

semhash's default encoder is a download, so the encoder here is hashed character n-grams; any object
with `encode(texts) -> float32 [n, width]` can take its place.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.core import extras
from minicpm_jax.data import ngrams
from minicpm_jax.data.dedup import Removal
from minicpm_jax.data.documents import Doc


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashedNGrams:
  """Texts as unit vectors of signed, hashed character n-gram counts (square root damped)."""

  width: int = 512
  sizes: tuple[int, ...] = (2, 3, 4)

  def __post_init__(self):
    validate.require_hints(self, "HashedNGrams.", least=1)
    ok = len(self.sizes) > 0 and min(self.sizes) >= 1
    validate.require(ok, "HashedNGrams.sizes", self.sizes, "sizes >= 1")

  def encode(self, sentences: Sequence[str], **unused: Any) -> np.ndarray:
    """float32 [sentences, width]; semhash passes options of its own encoder, which are ignored."""
    rows = [self._encode(text) for text in sentences]
    return np.asarray(rows, np.float32).reshape(len(rows), self.width)

  def _encode(self, text: str) -> np.ndarray:
    chars = ngrams.char_hashes(" ".join(ngrams.words(text.lower())))
    vector = np.zeros(self.width)
    for size in self.sizes:
      grams, count = np.unique(ngrams.ngram_hashes(chars, size), return_counts=True)
      sign = 1.0 - 2.0 * (grams >> np.uint64(63)).astype(np.float64)
      np.add.at(vector, (grams % np.uint64(self.width)).astype(np.int64), sign * np.sqrt(count))
    return vector / max(np.linalg.norm(vector), 1e-12)


def semantic(
  docs: Iterable[Doc],
  *,
  encoder: Any = None,
  threshold: float = 0.9,
  against: Iterable[Doc] | None = None,
) -> Iterator[Removal]:
  """Documents whose cosine similarity to a kept one is at least `threshold`.

  With `against` (for instance the SFT set) documents close to one of those are removed instead,
  and duplicates among `docs` stay.
  """
  semhash = extras.require_extra("semhash", extra="dedup")
  encoder = encoder or HashedNGrams()
  records = [_record(doc) for doc in docs]
  if not records:
    return
  base = records if against is None else [_record(doc) for doc in against]
  if not base:
    return
  index = semhash.SemHash.from_records(base, columns=["text"], model=encoder)
  if against is None:
    result = index.self_deduplicate(threshold=threshold)
  else:
    result = index.deduplicate(records, threshold=threshold)
  for duplicate in result.filtered:
    record, kept = duplicate.record, duplicate.duplicate_of
    yield Removal(
      source=record["source"],
      id=record["id"],
      reason="semantic_duplicate",
      detail=f"{kept['id']} {duplicate.score:.3f}",
    )


def _record(doc: Doc) -> dict[str, str]:
  return {"text": doc.text, "id": doc.id, "source": doc.source}
