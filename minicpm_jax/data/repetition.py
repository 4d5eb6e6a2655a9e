"""Gopher's repetition filter (Rae et al. 2021, table A1), vectorised over n-grams."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from minicpm_jax.config import validate
from minicpm_jax.data import ngrams
from minicpm_jax.data.documents import Doc, Dropped

_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GopherRepetition:
  """Drops documents in which lines, paragraphs or n-grams repeat.

  Shares are of all lines, paragraphs or characters of the document. Units are words and symbols,
  or single characters with `by_character` (Chinese).
  """

  name: ClassVar[str] = "gopher_repetition"
  max_line_share: float = 0.30
  max_paragraph_share: float = 0.30
  max_line_chars: float = 0.20
  max_paragraph_chars: float = 0.20
  top: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
  repeated: tuple[tuple[int, float], ...] = (
    (5, 0.15),
    (6, 0.14),
    (7, 0.13),
    (8, 0.12),
    (9, 0.11),
    (10, 0.10),
  )
  by_character: bool = False

  def __post_init__(self):
    validate.require_hints(self, "gopher_repetition.", least=0)
    for name in ("top", "repeated"):
      found = getattr(self, name)
      ok = all(n >= 1 and share >= 0 for n, share in found)
      validate.require(ok, f"gopher_repetition.{name}", found, "(size >= 1, share >= 0) pairs")

  @classmethod
  def chinese(cls) -> "GopherRepetition":
    """Two characters stand for one word; the shares are Gopher's (our choice)."""
    top = tuple((2 * n, share) for n, share in cls.top)
    repeated = tuple((2 * n, share) for n, share in cls.repeated)
    return cls(top=top, repeated=repeated, by_character=True)

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    for doc in docs:
      reason = self.reason(doc.text)
      yield Dropped(doc.id, *reason) if reason else doc

  def reason(self, text: str) -> tuple[str, str] | None:
    """(reason, detail) when the text is to be dropped."""
    if not text.strip():
      return "empty", ""
    parts = (
      ("paragraph", _PARAGRAPHS.split(text.strip()), self.max_paragraph_share),
      ("line", _LINES.split(text), self.max_line_share),
    )
    chars = {"paragraph": self.max_paragraph_chars, "line": self.max_line_chars}
    for kind, pieces, max_share in parts:
      count, length = duplicates(pieces)
      if count / len(pieces) > max_share:
        return f"repeated_{kind}s", f"{count}/{len(pieces)}"
      if length / len(text) > chars[kind]:
        return f"repeated_{kind}_chars", f"{length}/{len(text)}"
    return self._ngram_reason(text)

  def _ngram_reason(self, text: str) -> tuple[str, str] | None:
    if self.by_character:
      units = "".join(text.split())
      hashes, lengths, gap = ngrams.char_hashes(units), np.ones(len(units), np.int64), 0
    else:
      units = ngrams.tokens(text)
      hashes, gap = ngrams.word_hashes(units), 1
      lengths = np.fromiter(map(len, units), np.int64, count=len(units))
    for size, max_share in self.top:
      share = top_share(hashes, lengths, size, gap) / len(text)
      if share > max_share:
        return f"top_{size}_gram", f"{share:.3f}"
    for index, (size, max_share) in enumerate(self.repeated):
      grams = ngrams.ngram_hashes(hashes, size)
      bound = _covered(ngrams.repeats(grams), lengths, size) / len(text)
      if bound > max_share:
        share = repeated_chars(grams, lengths, size) / len(text)
        if share > max_share:
          return f"repeated_{size}_gram", f"{share:.3f}"
      # What longer repeated n-grams cover, shorter ones cover too.
      if bound <= min((s for _, s in self.repeated[index + 1 :]), default=1.0):
        break
    return None


def duplicates(pieces: Sequence[str]) -> tuple[int, int]:
  """How many pieces were seen before, and their characters."""
  seen, count, chars = set(), 0, 0
  for piece in pieces:
    if piece in seen:
      count += 1
      chars += len(piece)
    seen.add(piece)
  return count, chars


def top_share(hashes: np.ndarray, lengths: np.ndarray, size: int, gap: int) -> int:
  """Characters in all occurrences of the most frequent n-gram (the first of several); 0 if none
  occurs twice. `gap` characters are counted between units."""
  grams = ngrams.ngram_hashes(hashes, size)
  if not len(grams):
    return 0
  _, first, count = np.unique(grams, return_index=True, return_counts=True)
  if count.max() < 2:
    return 0
  start = first[count == count.max()].min()
  return int(count.max()) * (int(lengths[start : start + size].sum()) + gap * (size - 1))


def repeated_chars(grams: np.ndarray, lengths: np.ndarray, size: int) -> int:
  """Characters of n-grams that occurred before, left to right without overlaps."""
  seen, chars, position = set(), 0, 0
  ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
  hashes = grams.tolist()
  while position < len(hashes):
    if hashes[position] in seen:
      chars += ends[position + size] - ends[position]
      position += size
    else:
      seen.add(hashes[position])
      position += 1
  return chars


def _covered(is_repeat: np.ndarray, lengths: np.ndarray, size: int) -> int:
  """Characters of the units that lie in a repeated n-gram: an upper bound of `repeated_chars`."""
  if not is_repeat.any():
    return 0
  steps = np.zeros(len(lengths) + 1, np.int64)
  starts = np.flatnonzero(is_repeat)
  np.add.at(steps, starts, 1)
  np.add.at(steps, starts + size, -1)
  return int(lengths[np.cumsum(steps[:-1]) > 0].sum())
