"""Named shapes of sparse decoding, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  batch: int = 1
  num_queries: int = 1
  num_slots: int
  num_heads: int
  num_kv_heads: int = 2
  head_dim: int
  block_size: int = 64
  num_listed: int = 96
  is_paged: bool = False


TINY = {
  f"tiny_{'paged' if is_paged else 'row'}": Case(
    batch=3,
    num_queries=2,
    num_slots=160,
    num_heads=6,
    head_dim=8,
    block_size=16,
    num_listed=5,
    is_paged=is_paged,
  )
  for is_paged in (False, True)
}
REAL = {
  f"{name}_{length // 1024}k_batch{batch}": Case(
    batch=batch, num_slots=length, num_heads=heads, head_dim=width, is_paged=batch > 1
  )
  for name, heads, width in (("minicpm4_0p5b", 16, 64), ("minicpm4_8b", 32, 128))
  for length, batch in ((8192, 1), (32768, 1), (131072, 1), (131072, 8), (131072, 32))
}
