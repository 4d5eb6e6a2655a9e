"""Triton body of the k largest logits. A number and its place make one integer of 64 bits, so that
the largest is the one to take: the number first, of equal ones the lower place."""

import triton
import triton.language as tl


@triton.jit
def ranked(x, place):
  """int64 in the order of the floats, of equal ones of falling places."""
  bits = x.to(tl.float32).to(tl.int32, bitcast=True)
  return placed(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), place)


@triton.jit
def placed(order, place):
  return (order.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def best(
  x_ptr,  # [N, V]
  maxima_ptr,  # [N, C] of chunks, int32 in the order of the floats
  values_ptr,  # [N, NUM]
  ids_ptr,  # [N, NUM] int32
  V: tl.constexpr,
  C: tl.constexpr,
  CP: tl.constexpr,
  CHUNK: tl.constexpr,
  CHUNKP: tl.constexpr,
  NUM: tl.constexpr,
  NUMP: tl.constexpr,
):
  row = tl.program_id(0).to(tl.int64)
  nothing: tl.constexpr = -(2**63)
  c, i, j = tl.arange(0, CP), tl.arange(0, NUMP), tl.arange(0, CHUNKP)
  left_C = placed(tl.load(maxima_ptr + row * C + c, mask=c < C, other=0), c)
  left_C = tl.where(c < C, left_C, nothing)
  chunks_i = tl.zeros([NUMP], tl.int32)
  for n in range(NUM):
    first = tl.max(left_C, axis=0)
    left_C = tl.where(left_C == first, nothing, left_C)
    chunks_i = tl.where(i == n, 0x7FFFFFFF - (first & 0x7FFFFFFF).to(tl.int32), chunks_i)
  ids_ij = chunks_i[:, None] * CHUNK + j[None, :]
  is_here = (i < NUM)[:, None] & (j < CHUNK)[None, :] & (ids_ij < V)
  left_ij = ranked(tl.load(x_ptr + row * V + ids_ij, mask=is_here, other=0.0), ids_ij)
  left_E = tl.reshape(tl.where(is_here, left_ij, nothing), [NUMP * CHUNKP])
  taken_i = tl.zeros([NUMP], tl.int64)
  for n in range(NUM):
    first = tl.max(left_E, axis=0)
    left_E = tl.where(left_E == first, nothing, left_E)
    taken_i = tl.where(i == n, first, taken_i)
  bits_i = (taken_i >> 32).to(tl.int32)
  bits_i = tl.where(bits_i < 0, bits_i ^ 0x7FFFFFFF, bits_i)
  values_i = bits_i.to(tl.float32, bitcast=True)
  at = row * NUM + i
  tl.store(values_ptr + at, values_i.to(values_ptr.dtype.element_ty), mask=i < NUM)
  tl.store(ids_ptr + at, 0x7FFFFFFF - (taken_i & 0x7FFFFFFF).to(tl.int32), mask=i < NUM)
