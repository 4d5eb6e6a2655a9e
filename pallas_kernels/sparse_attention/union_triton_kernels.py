"""Triton body of `tiles.union`: lists of a few queries into their union, without a sort.

A program goes over every PROGRAMS-th tile. It sets the bit of each entry's query in a word a block,
in global memory of its own that stays in the L2 cache, then reads the words in order, keeps those
that are not 0 and clears them. Atomic ors commute: deterministic.
"""

import triton
import triton.language as tl


@triton.jit
def union(
  lists_ptr,  # [B, K, T, W] int32, -1 = none
  ids_ptr,  # [X, U]
  members_ptr,  # [X, U]
  counts_ptr,  # [X]
  words_ptr,  # [PROGRAMS, MP]
  X: tl.constexpr,  # tiles, (row, tile of the row, key head)
  TILES: tl.constexpr,  # of a row
  T: tl.constexpr,
  K: tl.constexpr,
  W: tl.constexpr,
  U: tl.constexpr,
  QUERIES: tl.constexpr,  # of a tile
  QP: tl.constexpr,
  WIDE: tl.constexpr,  # entries of a list that are taken together
  MP: tl.constexpr,  # blocks, a multiple of PART
  PART: tl.constexpr,
  PROGRAMS: tl.constexpr,
):
  program = tl.program_id(0).to(tl.int64)
  words_ptr += program * MP
  block = tl.arange(0, PART)
  for m in range(0, MP, PART):
    tl.store(words_ptr + m + block, tl.zeros([PART], tl.int32))
  t, w = tl.arange(0, QP), tl.arange(0, WIDE)
  bit = (tl.full([QP], 1, tl.int32) << t)[:, None]
  for i in range(0, tl.cdiv(X - program, PROGRAMS)):
    x = program + i * PROGRAMS
    head, y = x % K, x // K
    query = y % TILES * QUERIES + t
    row = (y // TILES * K + head) * T + query
    is_query = (t < QUERIES) & (query < T)
    tl.debug_barrier()  # the words are clear
    for begin in range(0, W, WIDE):
      is_entry = is_query[:, None] & (begin + w < W)[None, :]
      ids = tl.load(lists_ptr + row[:, None] * W + begin + w[None, :], mask=is_entry, other=-1)
      is_entry = (ids >= 0) & (ids < MP)
      words = words_ptr + tl.where(is_entry, ids, 0)
      tl.atomic_or(words, tl.broadcast_to(bit, ids.shape), mask=is_entry, sem="relaxed")
    tl.debug_barrier()  # the words are complete
    out = x * U
    count = tl.zeros([], tl.int32)
    for m in range(0, MP, PART):
      members = tl.load(words_ptr + m + block, cache_modifier=".cg")
      tl.store(words_ptr + m + block, tl.zeros([PART], tl.int32))
      is_listed = members != 0
      rank = count + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
      tl.store(ids_ptr + out + rank, m + block, mask=is_listed)
      tl.store(members_ptr + out + rank, members, mask=is_listed)
      count += tl.sum(is_listed.to(tl.int32), axis=0)
    tl.store(counts_ptr + x, count)
    for u in range(0, U, PART):
      is_rest = (u + block >= count) & (u + block < U)
      tl.store(ids_ptr + out + u + block, 0, mask=is_rest)
      tl.store(members_ptr + out + u + block, 0, mask=is_rest)
