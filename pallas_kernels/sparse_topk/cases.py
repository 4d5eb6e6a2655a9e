"""Named shapes of the selection, shared by tests, benchmarks and tuners."""

import dataclasses

from pallas_kernels.sparse_topk import rule as rules

SMALL = dict(kernel_size=8, kernel_stride=4, block_size=16, local_blocks=2, topk=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  num_queries: int
  num_slots: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rule: rules.Rule = rules.Rule(lse="coarse")


TINY = {
  f"tiny_{selection}_{lse}": Case(
    num_queries=200,
    num_slots=200,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rule=rules.Rule(selection=selection, lse=lse, **SMALL),
  )
  for selection in ("joint", "split")
  for lse in ("exact", "coarse")
}
REAL = {
  f"{name}_{length // 1024}k": Case(
    num_queries=length, num_slots=length, num_heads=heads, num_kv_heads=2, head_dim=width
  )
  for name, heads, width in (("minicpm4_0p5b", 16, 64), ("minicpm4_8b", 32, 128))
  for length in (4096, 32768, 131072)
}
