"""Triton bodies of the packed matmuls (quantization.md section 10), 4 or 2 bits a code.

A tile of bytes holds f = 8 / BITS inputs a row. Instead of interleaving weights, the tile of x is
split into its f residues (neighbours in one thread), and f products are summed.

`matvec` serves one row of activations: codes become the left side of tensor-core products in
registers, by PTX of its own (`matvec_ptx`).
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
def _of_lane(sums, q, BYTE: tl.constexpr):
  """Byte BYTE of word q of each lane: the four lanes of a group have the same sums."""
  low = tl.where(q == 0, sums[0][2 * BYTE], sums[1][2 * BYTE])
  high = tl.where(q == 2, sums[2][2 * BYTE], sums[3][2 * BYTE])
  return tl.where(q < 2, low, high)


@triton.jit
def _four(x_T4):
  """The columns of [T, 4], each [T]."""
  even, odd = tl.split(tl.reshape(x_T4, [x_T4.shape[0], 2, 2]))
  x0, x2 = tl.split(even)
  x1, x3 = tl.split(odd)
  return x0, x1, x2, x3


@triton.jit
def _loaded(at, TEXT: tl.constexpr, TYPES: tl.constexpr, COUNT: tl.constexpr):
  """COUNT words of each address, two or four."""
  if COUNT == 2:
    return tl.inline_asm_elementwise(TEXT, TYPES, [at], (tl.int32, tl.int32), is_pure=False, pack=1)
  else:
    return tl.inline_asm_elementwise(
      TEXT, TYPES, [at], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def _total(factor, x, s, BITS: tl.constexpr, TEXT: tl.constexpr, TYPES: tl.constexpr):
  if BITS == 4:
    args = (factor, x[0], x[1], s[0], s[1], s[2], s[3])
  else:
    args = (factor, x[0], x[1], x[2], x[3], s[0], s[1], s[2], s[3])
  return tl.inline_asm_elementwise(
    TEXT, TYPES, args, (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
  )


@triton.jit
def _product(w, v, words, x, s, BITS: tl.constexpr, TEXT: tl.constexpr, TYPES: tl.constexpr):
  if BITS == 4:
    args = (w, v, words[0], words[1], x[0], x[1], s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7])
    return _eight(args, TEXT, TYPES)
  else:
    args = (w, v, words[0], words[1], x[0], x[1], x[2], x[3])
    more = (s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7])
    return _eight(args + more, TEXT, TYPES)


@triton.jit
def _eight(args, TEXT: tl.constexpr, TYPES: tl.constexpr):
  return tl.inline_asm_elementwise(
    TEXT,
    TYPES,
    args,
    (
      tl.float32,
      tl.float32,
      tl.float32,
      tl.float32,
      tl.float32,
      tl.float32,
      tl.float32,
      tl.float32,
    ),
    is_pure=True,
    pack=1,
  )


@triton.jit
def _part(
  y,  # four [T]: the lane's own outputs
  codes_at,
  x_at,
  scale_ptr,  # four of the lane's own outputs, by group
  zero_ptr,
  words,  # mask, magic, factor
  q,
  N: tl.constexpr,
  BITS: tl.constexpr,
  ROWS: tl.constexpr,
  UNROLL: tl.constexpr,
  HAS_ZERO: tl.constexpr,
  FACTOR: tl.constexpr,
  X: tl.constexpr,
  X_TYPES: tl.constexpr,
  WORDS: tl.constexpr,
  WORDS_TYPES: tl.constexpr,
  PRODUCT: tl.constexpr,
  PRODUCT_TYPES: tl.constexpr,
  TOTAL: tl.constexpr,
  TOTAL_TYPES: tl.constexpr,
):
  """y with ROWS rows of bytes of one group."""
  PER_BYTE: tl.constexpr = 8 // BITS
  scale = _four(tl.load(scale_ptr).to(tl.float32))
  zero = tl.zeros_like(y[0])
  none = (zero, zero, zero, zero)
  total = none
  nothing = (zero, zero, zero, zero, zero, zero, zero, zero)
  sums = (nothing, nothing, nothing, nothing)
  for start in tl.static_range(0, ROWS, 8 * UNROLL):
    rows = ()
    xs = ()
    for u in tl.static_range(UNROLL):
      at = codes_at + (start + 8 * u) * N
      rows = rows + (_loaded(at, WORDS, WORDS_TYPES, 4), _loaded(at + N, WORDS, WORDS_TYPES, 4))
    for u in tl.static_range(UNROLL):
      at = x_at + (start + 8 * u) * PER_BYTE * 2
      xs = xs + (_loaded(at, X, X_TYPES, PER_BYTE),)
    for u in tl.static_range(UNROLL):
      total = _total(words[2], xs[u], total, BITS, TOTAL, TOTAL_TYPES)
      new = ()
      for i in tl.static_range(4):
        w, v = rows[2 * u][i], rows[2 * u + 1][i]
        new = new + (_product(w, v, words, xs[u], sums[i], BITS, PRODUCT, PRODUCT_TYPES),)
      sums = new
  if HAS_ZERO:
    none = _four(tl.load(zero_ptr).to(tl.float32) * (total[0] * (1.0 / FACTOR))[:, None])
  new = ()
  for i in tl.static_range(4):
    new = new + (y[i] + (_of_lane(sums, q, i) + total[0] - none[i]) * scale[i],)
  return new


@triton.jit
def matvec(
  x_ptr,  # [K]
  codes_ptr,  # [R, N] uint8
  scale_ptr,  # [Q, N]
  zero_ptr,  # [Q, N] int8, or anything where HAS_ZERO is False
  out_ptr,  # [SPLITS, N]
  N: tl.constexpr,  # a multiple of 16
  HAS_ZERO: tl.constexpr,
  BITS: tl.constexpr,
  MASK: tl.constexpr,
  MAGIC: tl.constexpr,
  FACTOR: tl.constexpr,  # what `total` multiplies inputs with
  FACTOR_PAIR: tl.constexpr,
  ROWS: tl.constexpr,  # of bytes a warp
  GROUP: tl.constexpr,  # rows of bytes of a group
  PART: tl.constexpr,  # rows of bytes that divide both
  WARPS: tl.constexpr,
  UNROLL: tl.constexpr,
  PREFETCH: tl.constexpr,
  PREFETCH_TYPES: tl.constexpr,
  X: tl.constexpr,
  X_TYPES: tl.constexpr,
  WORDS: tl.constexpr,
  WORDS_TYPES: tl.constexpr,
  PRODUCT: tl.constexpr,
  PRODUCT_TYPES: tl.constexpr,
  TOTAL: tl.constexpr,
  TOTAL_TYPES: tl.constexpr,
):
  """y = x W: 128 outputs a program, whose warps share the inputs (`matvec_ptx`)."""
  T: tl.constexpr = WARPS * 32
  PER_BYTE: tl.constexpr = 8 // BITS
  split = tl.program_id(1)
  unity = tl.num_programs(2)  # 1, but no constant: a constant mask is loaded again for every use
  t = tl.arange(0, T)
  g, q = (t % 32) // 4, t % 4
  first = (split * WARPS + t // 32) * ROWS
  n = tl.minimum(tl.program_id(0) * 128 + g * 16, N - 16)
  words = (t * 0 + unity * MASK, t * 0 + unity * MAGIC, t * 0 + unity * FACTOR_PAIR)
  codes_at = (codes_ptr + (first + 2 * q).to(tl.int64) * N + n).to(tl.int64)
  x_at = (x_ptr + (first + 2 * q) * PER_BYTE).to(tl.int64)
  own = (n + 4 * q)[:, None] + tl.arange(0, 4)[None, :]
  PARTS: tl.constexpr = ROWS // PART
  for start in tl.static_range(0, ROWS, PART if PARTS <= 4 else ROWS):
    at = (scale_ptr + (first + start) // GROUP * N + n + 4 * q).to(tl.int64)
    tl.inline_asm_elementwise(PREFETCH, PREFETCH_TYPES, [at], tl.int32, is_pure=False, pack=1)
  zero = tl.zeros([T], tl.float32)
  y0, y1, y2, y3 = zero, zero, zero, zero
  for start in tl.range(0, ROWS, PART, loop_unroll_factor=PARTS if PARTS <= 4 else 1):
    group = ((first + start) // GROUP * N)[:, None] + own
    y0, y1, y2, y3 = _part(
      (y0, y1, y2, y3),
      codes_at + start * N,
      x_at + start * PER_BYTE * 2,
      scale_ptr + group,
      zero_ptr + group,
      words,
      q,
      N,
      BITS,
      PART,
      UNROLL,
      HAS_ZERO,
      FACTOR,
      X,
      X_TYPES,
      WORDS,
      WORDS_TYPES,
      PRODUCT,
      PRODUCT_TYPES,
      TOTAL,
      TOTAL_TYPES,
    )
  y_T4 = tl.join(tl.join(y0, y2), tl.join(y1, y3))  # [T, i, j] is output 2 i + j
  y_N = tl.sum(tl.reshape(y_T4, [WARPS, 128]), axis=0)
  column = tl.program_id(0) * 128 + tl.arange(0, 128)
  tl.store(out_ptr + split * N + column, y_N.to(out_ptr.dtype.element_ty), mask=column < N)
