"""Named shapes of stage 2: those of the selection."""

from pallas_kernels.sparse_topk import cases

Case = cases.Case
TINY = cases.TINY
REAL = cases.REAL
