"""Triton bodies of the packed matmuls (quantization.md section 10), 4 or 2 bits a code.

A tile of bytes holds f = 8 / BITS inputs a row. Instead of interleaving weights, the tile of x is
split into its f residues (neighbours in one thread), and f products are summed.

`matvec` serves one row of activations without tensor cores: every thread owns 16 outputs and a
share of the inputs ("lane"), and adds in float32. A word of four bytes holds codes of four
neighbouring outputs. A code c becomes a float by writing it into the mantissa of 1.0 behind a shift
that serves the whole word: 1 + c 2^-e with e = 8 - BITS j for field j of a byte, which x times 2^e
undoes. What the 1 and LOW add is the same for every output, so it is summed apart and taken off at
the end: up to 8 of float32's 24 bits go.
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


@triton.jit
def _mantissa(bits, field):
  """1.0 with the bits of `field` in its mantissa."""
  return ((bits & field) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def matvec(
  x_ptr,  # [K]
  codes_ptr,  # [R, N] uint8
  scale_ptr,  # [Q, N]
  zero_ptr,  # [Q, N] int8, or anything where HAS_ZERO is False
  out_ptr,  # [SPLITS, N]
  N: tl.constexpr,  # a multiple of BN
  K: tl.constexpr,
  R: tl.constexpr,
  GROUP: tl.constexpr,  # a multiple of the inputs of a lane
  HAS_ZERO: tl.constexpr,
  BITS: tl.constexpr,
  LOW: tl.constexpr,
  BN: tl.constexpr,
  LANES: tl.constexpr,
  UNROLL: tl.constexpr,  # divides the rows of a lane
  STAGES: tl.constexpr,
  INPUTS: tl.constexpr,  # of a lane, or the next power of two
  SPLITS: tl.constexpr,
):
  """y = x W; LANES lanes of R / SPLITS / LANES rows of bytes each in a program."""
  PER_BYTE: tl.constexpr = 8 // BITS
  ROWS: tl.constexpr = R // (SPLITS * LANES)
  MASK: tl.constexpr = (1 << BITS) - 1
  POWER: tl.constexpr = 256
  unity = tl.num_programs(2)  # 1, but no constant: a constant mask is loaded again for every use
  split = tl.program_id(1)
  lane = split * LANES + tl.arange(0, LANES)
  word = tl.program_id(0) * (BN // 4) + tl.arange(0, BN // 4)
  words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
  rows = words_ptr + (lane * ROWS).to(tl.int64)[:, None] * (N // 4) + word[None, :]
  inputs = x_ptr + (lane * (ROWS * PER_BYTE))[:, None]
  acc0 = tl.zeros([LANES, BN // 4], tl.float32)
  acc1 = tl.zeros([LANES, BN // 4], tl.float32)
  acc2 = tl.zeros([LANES, BN // 4], tl.float32)
  acc3 = tl.zeros([LANES, BN // 4], tl.float32)
  for start in tl.range(0, ROWS, UNROLL, num_stages=STAGES):
    loaded = ()
    for u in tl.static_range(UNROLL):
      loaded = loaded + (tl.load(rows + (start + u) * (N // 4)),)
    for u in tl.static_range(UNROLL):
      w = loaded[u]
      byte0, byte1, byte2, byte3 = w << 15, w << 7, w >> 1, w >> 9
      for j in tl.static_range(PER_BYTE):
        x = tl.load(inputs + (start + u) * PER_BYTE + j).to(tl.float32) * (POWER >> (BITS * j))
        field = unity * (MASK << (15 + BITS * j))
        acc0 += x * _mantissa(byte0, field)
        acc1 += x * _mantissa(byte1, field)
        acc2 += x * _mantissa(byte2, field)
        acc3 += x * _mantissa(byte3, field)
  k = tl.arange(0, INPUTS)
  x = tl.load(inputs + k[None, :], mask=(k < ROWS * PER_BYTE)[None, :], other=0.0).to(tl.float32)
  total = tl.sum(x, axis=1)[:, None]
  shared = tl.sum(x * (POWER >> (BITS * (k % PER_BYTE)))[None, :], axis=1)[:, None] - LOW * total
  n = tl.program_id(0) * BN + tl.arange(0, BN)
  at = ((lane * (ROWS * PER_BYTE)) // GROUP)[:, None] * N + n[None, :]
  words = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))  # [..., i, j] is byte 2 i + j
  acc = tl.reshape(words, [LANES, BN]) - shared
  if HAS_ZERO:
    acc -= total * tl.load(zero_ptr + at).to(tl.float32)
  y = tl.sum(acc * tl.load(scale_ptr + at).to(tl.float32), axis=0)
  tl.store(out_ptr + split * N + n, y.to(out_ptr.dtype.element_ty))
