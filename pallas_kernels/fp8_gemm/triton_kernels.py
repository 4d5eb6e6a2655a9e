"""Triton body of the block-scaled FP8 product (quantization.md 9)."""

import triton
import triton.language as tl


@triton.jit
def matmul(
  x_ptr,  # [M, K] float8
  x_scale_ptr,  # [M, Q] float32
  w_ptr,  # [N, K] float8
  w_scale_ptr,  # [Q, P] float32
  out_ptr,  # [M, N]
  M: tl.constexpr,
  N: tl.constexpr,
  K: tl.constexpr,
  BLOCK: tl.constexpr,  # inputs and outputs that share a scale
  BM: tl.constexpr,
  BN: tl.constexpr,  # divides BLOCK
  ROWS: tl.constexpr,  # of tiles, walked together column by column: their x stays in L2
):
  Q: tl.constexpr = (K + BLOCK - 1) // BLOCK
  P: tl.constexpr = (N + BLOCK - 1) // BLOCK
  COLUMNS: tl.constexpr = (N + BN - 1) // BN
  first = tl.program_id(0) // (ROWS * COLUMNS) * ROWS
  height = tl.minimum(ROWS, (M + BM - 1) // BM - first)
  rest = tl.program_id(0) % (ROWS * COLUMNS)
  row, tile = first + rest % height, rest // height
  m = row * BM + tl.arange(0, BM)
  n = tile * BN + tl.arange(0, BN)
  k = tl.arange(0, BLOCK)
  x_tile = x_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
  w_tile = w_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
  column = tile * BN // BLOCK
  acc_MN = tl.zeros([BM, BN], tl.float32)
  for q in range(Q):
    is_in = q * BLOCK + k < K
    x_MK = tl.load(x_tile + q * BLOCK, mask=(m < M)[:, None] & is_in[None, :], other=0.0)
    w_KN = tl.load(w_tile + q * BLOCK, mask=is_in[:, None] & (n < N)[None, :], other=0.0)
    x_scale_M = tl.load(x_scale_ptr + m * Q + q, mask=m < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + q * P + column)
    acc_MN += tl.dot(x_MK, w_KN) * (x_scale_M * w_scale)[:, None]
  out_rows = out_ptr + m.to(tl.int64)[:, None] * N
  is_out = (m < M)[:, None] & (n < N)[None, :]
  tl.store(out_rows + n[None, :], acc_MN.to(out_ptr.dtype.element_ty), mask=is_out)
