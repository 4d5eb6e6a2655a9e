"""Named shapes of the search, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  rows: int
  vocab_size: int
  k: int = 10  # children of a node of the draft tree


TINY = {
  "tiny": Case(rows=3, vocab_size=3000),
  "tiny_short": Case(rows=3, vocab_size=100),
}
REAL = {  # a draft tree's root and one of its levels; FR-Spec's head of a quarter of the vocabulary
  "minicpm4_8b_root": Case(rows=1, vocab_size=73448),
  "minicpm4_8b_level": Case(rows=10, vocab_size=73448),
  "minicpm4_8b_level_fr": Case(rows=10, vocab_size=18362),
}
