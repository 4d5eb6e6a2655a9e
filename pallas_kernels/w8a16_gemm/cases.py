"""Named shapes of 8-bit matmuls, shared by tests and benchmarks."""

from pallas_kernels.w4a16_gemm import cases

Case = cases.Case

TINY = {
  "tiny_channel": Case(rows=17, num_in=201, num_out=33, group_size=-1),
  "tiny_groups": Case(rows=3, num_in=256, num_out=40, group_size=32),
  "tiny_row": Case(rows=1, num_in=96, num_out=40, group_size=-1),
}
