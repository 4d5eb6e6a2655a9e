"""Triton body of the packed matmuls (quantization.md section 10), 4 or 2 bits a code.

A tile of bytes holds f = 8 / BITS inputs a row. Instead of interleaving weights, the tile of x is
split into its f residues (neighbours in one thread), and f products are summed.
"""

import triton
import triton.language as tl


@triton.jit
def weights(bytes_RN, shift_N, AT: tl.constexpr, MASK: tl.constexpr, dtype: tl.constexpr):
  """code + low - zero of one residue, exact in every float type served."""
  codes_RN = ((bytes_RN >> AT) & MASK).to(tl.int32)
  return (codes_RN + shift_N[None, :]).to(dtype)


@triton.jit
def matmul(
  x_ptr,  # [M, K]
  codes_ptr,  # [R, N] uint8
  scale_ptr,  # [Q, N]
  zero_ptr,  # [Q, N] int8, or anything where HAS_ZERO is False
  out_ptr,  # [SPLITS, M, N]
  M: tl.constexpr,
  N: tl.constexpr,
  K: tl.constexpr,
  R: tl.constexpr,
  GROUP: tl.constexpr,  # a multiple of BK; unused where PER_CHANNEL
  PER_CHANNEL: tl.constexpr,
  HAS_ZERO: tl.constexpr,
  BITS: tl.constexpr,
  LOW: tl.constexpr,
  BM: tl.constexpr,
  BN: tl.constexpr,
  BK: tl.constexpr,
  SPLITS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  PER_BYTE: tl.constexpr = 8 // BITS
  BR: tl.constexpr = BK // PER_BYTE
  MASK: tl.constexpr = (1 << BITS) - 1
  split = tl.program_id(2)
  m = tl.program_id(1) * BM + tl.arange(0, BM)
  n = tl.program_id(0) * BN + tl.arange(0, BN)
  k, r = tl.arange(0, BK), tl.arange(0, BR)
  dtype: tl.constexpr = x_ptr.dtype.element_ty
  x_rows = x_ptr + m.to(tl.int64)[:, None] * K
  steps: tl.constexpr = (K + BK - 1) // BK
  per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
  shift_N = tl.full([BN], LOW, tl.int32)
  if PER_CHANNEL and HAS_ZERO:
    shift_N = LOW - tl.load(zero_ptr + n, mask=n < N, other=0).to(tl.int32)
  acc_MN = tl.zeros([BM, BN], tl.float32)
  for i in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
    at_k, at_r = i * BK + k, i * BR + r
    x_MK = tl.load(x_rows + at_k[None, :], mask=(m < M)[:, None] & (at_k < K)[None, :], other=0.0)
    is_code = (at_r < R)[:, None] & (n < N)[None, :]
    bytes_RN = tl.load(codes_ptr + at_r[:, None] * N + n[None, :], mask=is_code, other=0)
    group = (i * BK) // GROUP
    if HAS_ZERO and not PER_CHANNEL:
      shift_N = LOW - tl.load(zero_ptr + group * N + n, mask=n < N, other=0).to(tl.int32)
    part_MN = acc_MN if PER_CHANNEL else tl.zeros([BM, BN], tl.float32)
    if BITS == 4:
      x0, x1 = tl.split(tl.reshape(x_MK, [BM, BR, 2]))
      w0 = weights(bytes_RN, shift_N, 0, MASK, dtype)
      part_MN = tl.dot(x0, w0, part_MN, input_precision=PRECISION)
      w1 = weights(bytes_RN, shift_N, 4, MASK, dtype)
      part_MN = tl.dot(x1, w1, part_MN, input_precision=PRECISION)
    else:
      even, odd = tl.split(tl.reshape(x_MK, [BM, BR, 2, 2]))
      x0, x2 = tl.split(even)
      x1, x3 = tl.split(odd)
      w0 = weights(bytes_RN, shift_N, 0, MASK, dtype)
      part_MN = tl.dot(x0, w0, part_MN, input_precision=PRECISION)
      w1 = weights(bytes_RN, shift_N, 2, MASK, dtype)
      part_MN = tl.dot(x1, w1, part_MN, input_precision=PRECISION)
      w2 = weights(bytes_RN, shift_N, 4, MASK, dtype)
      part_MN = tl.dot(x2, w2, part_MN, input_precision=PRECISION)
      w3 = weights(bytes_RN, shift_N, 6, MASK, dtype)
      part_MN = tl.dot(x3, w3, part_MN, input_precision=PRECISION)
    if PER_CHANNEL:
      acc_MN = part_MN
    else:
      scale_N = tl.load(scale_ptr + group * N + n, mask=n < N, other=0.0).to(tl.float32)
      acc_MN += part_MN * scale_N[None, :]
  if PER_CHANNEL:
    acc_MN *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
  out_rows = out_ptr + (split.to(tl.int64) * M + m)[:, None] * N
  is_out = (m < M)[:, None] & (n < N)[None, :]
  tl.store(out_rows + n[None, :], acc_MN.to(out_ptr.dtype.element_ty), mask=is_out)
