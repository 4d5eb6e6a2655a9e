"""Named shapes of packed matmuls, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  rows: int
  num_in: int
  num_out: int
  group_size: int = 128
  has_zero: bool = False


TINY = {
  "tiny_groups": Case(rows=5, num_in=256, num_out=48, group_size=64),
  "tiny_zero": Case(rows=3, num_in=192, num_out=40, group_size=96, has_zero=True),
  "tiny_channel": Case(rows=17, num_in=201, num_out=33, group_size=-1),
  "tiny_channel_zero": Case(rows=2, num_in=130, num_out=20, group_size=-1, has_zero=True),
}
# The two ways of the feed-forward block; rows: one token, a batch, a draft tree, prefill.
REAL = {
  f"{name}_{wide}_m{rows}": Case(rows=rows, num_in=sizes[0], num_out=sizes[1])
  for name, hidden, inner in (("minicpm4_0p5b", 1024, 4096), ("minicpm4_8b", 4096, 16384))
  for wide, sizes in (("up", (hidden, inner)), ("down", (inner, hidden)))
  for rows in (1, 16, 64, 4096)
}
