"""Named shapes of FP8 products, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  rows: int
  num_in: int
  num_out: int


TINY = {
  "tiny_whole": Case(rows=64, num_in=256, num_out=128),
  "tiny_edges": Case(rows=5, num_in=200, num_out=130),
  "tiny_short": Case(rows=17, num_in=48, num_out=144),
}
# Forward products of the feed-forward block at M tokens a step; the input gradients' shapes are
# those of the other way.
REAL = {
  f"{name}_{way}_m{rows}": Case(rows=rows, num_in=sizes[0], num_out=sizes[1])
  for name, hidden, inner in (("minicpm4_0p5b", 1024, 4096), ("minicpm4_8b", 4096, 16384))
  for way, sizes in (("up", (hidden, inner)), ("down", (inner, hidden)))
  for rows in (4096, 16384)
}
