"""Statistics of a corpus: counts, lengths, languages, sources, scores; mergeable over workers.

Histograms have fixed bins, so statistics of parts add up to those of the whole exactly, in any
order (integers only; means come from exact sums).
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from minicpm_jax.data.documents import Doc

SCORE_BINS = 20


@dataclasses.dataclass
class Stats:
  """Sums over documents; `add` one, `merge` another Stats."""

  documents: int = 0
  empty: int = 0
  characters: int = 0
  bytes: int = 0  # UTF-8
  words: int = 0  # between white space; meaningless for Chinese
  lines: int = 0
  by_lang: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  by_source: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  lengths: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  scores: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, doc: Doc) -> None:
    """Length bin b holds documents of 2^b to 2^(b+1) - 1 characters (0: one; -1: none)."""
    self.documents += 1
    self.empty += not doc.text.strip()
    self.characters += len(doc.text)
    self.bytes += len(doc.text.encode())
    self.words += len(doc.text.split())
    self.lines += doc.text.count("\n") + (doc.text[-1:] not in ("", "\n"))
    self.by_lang[doc.lang or "unknown"] += 1
    self.by_source[doc.source or "unknown"] += 1
    self.lengths[len(doc.text).bit_length() - 1] += 1
    if doc.score is not None:
      self.scores[score_bin(doc.score)] += 1

  def merge(self, other: "Stats") -> "Stats":
    """The statistics of both."""
    values = {}
    for field in dataclasses.fields(self):
      values[field.name] = getattr(self, field.name) + getattr(other, field.name)
    return Stats(**values)

  def median_characters(self) -> int | None:
    """Lower bound of the bin that holds the median length; None without documents."""
    seen = 0
    for b, count in sorted(self.lengths.items()):
      seen += count
      if 2 * seen >= self.documents:
        return 2**b if b >= 0 else 0
    return None

  def as_dict(self) -> dict[str, Any]:
    """Ready for JSON: the sums, means, and histograms as {lower bound: documents}."""
    n = max(self.documents, 1)
    return {
      "documents": self.documents,
      "empty": self.empty,
      "characters": self.characters,
      "bytes": self.bytes,
      "words": self.words,
      "lines": self.lines,
      "mean_characters": self.characters / n,
      "median_characters_at_least": self.median_characters(),
      "by_lang": dict(sorted(self.by_lang.items())),
      "by_source": dict(sorted(self.by_source.items())),
      "characters_histogram": {
        str(2**b if b >= 0 else 0): count for b, count in sorted(self.lengths.items())
      },
      "score_histogram": {
        f"{b / SCORE_BINS:.2f}": self.scores[b] for b in range(SCORE_BINS) if self.scores
      },
    }


def score_bin(score: float) -> int:
  """Which of SCORE_BINS equal bins of [0, 1]; 1.0 is in the last."""
  return min(max(int(score * SCORE_BINS), 0), SCORE_BINS - 1)


def collect(docs: Iterable[Doc]) -> Stats:
  """Statistics of a stream."""
  stats = Stats()
  for doc in docs:
    stats.add(doc)
  return stats
