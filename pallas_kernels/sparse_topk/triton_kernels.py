"""Triton bodies of block selection (infllm_v2.md sections 5 to 7, K1 and K2).

`block_scores` makes two passes over compressed keys for a few queries at a time: the normaliser
(fine or coarse keys), then the scores, summed over the query heads of a key head and pooled to
blocks in registers. Each score is computed once, so that neighbouring blocks which share their
best window tie exactly, as in the reference. `choose` takes one row of block scores: down from
the best and bisection on the bits of the scores (they are >= 0, so bits order like the numbers),
ties to the lower block.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # below every real score
BLIND = tl.constexpr(1e30)  # normaliser of a row that sees no window: all its scores are 0
CLAMP = tl.constexpr(115.0)  # largest exponent (base 2), 80 in base e (section 5)
NOWHERE = tl.constexpr(2**30)  # start of a row that is padding


@triton.jit
def visible(pos, start, SIZE: tl.constexpr, STRIDE: tl.constexpr, NUM: tl.constexpr):
  """(first, end) of the windows in the past of positions and in their documents (section 5)."""
  end = tl.minimum(NUM, tl.maximum(pos + 1 - SIZE + STRIDE, 0) // STRIDE)
  return tl.where(start <= pos, (start + STRIDE - 1) // STRIDE, NOWHERE), end


@triton.jit
def load_keys(
  keys_ptr, n, NUM: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr
):  # fmt: skip
  """[KEYS, HP] of the windows n; the last one again beyond the end, which nobody sees."""
  n = tl.minimum(n, max(NUM - 1, 0))
  h = tl.arange(0, HP)
  offsets = n[:, None] * (K * H) + h[None, :]
  if H == HP:
    keys = tl.load(keys_ptr + offsets)
  else:
    keys = tl.load(keys_ptr + offsets, mask=(h < H)[None, :], other=0.0)
  return keys


@triton.jit
def normalise(
  top_r,
  sum_r,
  q_rH,
  keys_cH,  # windows from n on
  n,
  begin_r,
  end_r,
  scale: tl.constexpr,
  KEYS: tl.constexpr,
  IS_MASKED: tl.constexpr,  # false where every row sees every window of the tile
  PRECISION: tl.constexpr,
):
  """(largest logit, sum of exponentials relative to it) of each row with one more tile."""
  logits_rc = tl.dot(q_rH, tl.trans(keys_cH), input_precision=PRECISION)
  if IS_MASKED:
    c = n + tl.arange(0, KEYS)
    seen = (c[None, :] >= begin_r[:, None]) & (c[None, :] < end_r[:, None])
    logits_rc = tl.where(seen, logits_rc, float("-inf"))
  new_top_r = tl.maximum(top_r, tl.max(logits_rc, axis=1) * (scale * LOG2E))
  exps_rc = tl.exp2(logits_rc * (scale * LOG2E) - new_top_r[:, None])
  return new_top_r, sum_r * tl.exp2(top_r - new_top_r) + tl.sum(exps_rc, axis=1)


@triton.jit
def group_scores(
  q_rH,
  norm_r,
  keys_fH,
  scale: tl.constexpr,
  GP: tl.constexpr,
  QUERIES: tl.constexpr,
  KEYS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """[KEYS, QUERIES], summed over the heads of the group."""
  logits_fr = tl.dot(keys_fH, tl.trans(q_rH), input_precision=PRECISION)
  exponents_fr = logits_fr * (scale * LOG2E) - norm_r[None, :]
  probs_fr = tl.exp2(tl.minimum(exponents_fr, CLAMP))
  return tl.sum(tl.reshape(probs_fr, [KEYS, GP, QUERIES]), axis=1)


@triton.jit
def block_scores(
  q_ptr,  # [B, T, K*G, H]
  fine_ptr,  # [B, F, K, H]
  norm_ptr,  # [B, C, K, H] fine keys, or coarse keys
  offset_ptr,  # [B] position of query 0
  start_ptr,  # [B, T] position of the first token of the query's document
  first_ptr,  # [1] first query of this launch
  out_ptr,  # [B, K, ROWS, M] float32; M a multiple of KEYS
  scale: tl.constexpr,
  T: tl.constexpr,
  F: tl.constexpr,
  C: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  GP: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  M: tl.constexpr,
  ROWS: tl.constexpr,  # queries of this launch, a multiple of QUERIES
  SIZE: tl.constexpr,  # tokens of a fine window
  STRIDE: tl.constexpr,
  NORM_SIZE: tl.constexpr,
  NORM_STRIDE: tl.constexpr,
  PER_BLOCK: tl.constexpr,  # fine windows that start in one block
  LOCAL: tl.constexpr,  # forced blocks at the end, the current one included
  QUERIES: tl.constexpr,  # queries of one program
  KEYS: tl.constexpr,  # windows of one product
  PRECISION: tl.constexpr,
):
  tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  tile = tl.num_programs(0) - 1 - tile  # the longest first
  first = tl.load(first_ptr) + tile * QUERIES
  offset = tl.load(offset_ptr + batch)
  h = tl.arange(0, HP)
  lane = tl.arange(0, KEYS)
  # Rows of the first product, columns of the second: (head, query).
  row = tl.arange(0, GP * QUERIES)
  t_r, g_r = first + row % QUERIES, row // QUERIES
  t_q = first + tl.arange(0, QUERIES)
  pos_q = offset + t_q
  start_q = tl.load(start_ptr + batch * T + t_q, mask=t_q < T, other=NOWHERE)
  is_query = start_q <= pos_q  # not padding
  last = tl.max(tl.where(is_query, pos_q, -1), axis=0)
  begin = tl.min(tl.where(is_query, start_q, NOWHERE), axis=0)

  q_ptr += ((batch * T + first) * K + head) * G * H
  q_offsets = (row % QUERIES * (K * G) + g_r)[:, None] * H + h[None, :]
  is_q = ((t_r < T) & (g_r < G))[:, None] & (h < H)[None, :]
  q_rH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
  norm_ptr += (batch * C * K + head) * H
  fine_ptr += (batch * F * K + head) * H

  begin_q, end_q = visible(pos_q, start_q, NORM_SIZE, NORM_STRIDE, C)
  norm_begin = begin // NORM_STRIDE // KEYS * KEYS
  norm_end = tl.max(tl.where(is_query, end_q, 0), axis=0)
  # Tiles of which every query sees every window come first, and need no mask.
  full_begin = tl.cdiv(tl.max(tl.where(is_query, begin_q, 0), axis=0), KEYS) * KEYS
  full_end = tl.min(tl.where(is_query, end_q, norm_end), axis=0) // KEYS * KEYS
  num_full = tl.maximum(full_end - full_begin, 0)
  top_r = tl.full([GP * QUERIES], FLOOR, tl.float32)
  sum_r = tl.zeros([GP * QUERIES], tl.float32)
  for n in range(full_begin, full_begin + num_full, KEYS):
    keys_cH = load_keys(norm_ptr, n + lane, C, K, H, HP)
    top_r, sum_r = normalise(
      top_r, sum_r, q_rH, keys_cH, n, row, row, scale, KEYS, False, PRECISION
    )
  start_r = tl.load(start_ptr + batch * T + t_r, mask=t_r < T, other=NOWHERE)
  begin_r, end_r = visible(offset + t_r, start_r, NORM_SIZE, NORM_STRIDE, C)
  for i in range(norm_begin, norm_end - num_full, KEYS):
    n = tl.where(i < full_begin, i, i + num_full)
    keys_cH = load_keys(norm_ptr, n + lane, C, K, H, HP)
    top_r, sum_r = normalise(
      top_r, sum_r, q_rH, keys_cH, n, begin_r, end_r, scale, KEYS, True, PRECISION
    )
  is_seeing = (begin_r < end_r) & (g_r < G) & (sum_r > 0)
  norm_r = tl.where(is_seeing, top_r + tl.log2(tl.where(is_seeing, sum_r, 1.0)), BLIND)

  # A step is one window of KEYS blocks (the first of each, the second, ...), so that pooling is a
  # maximum of steps.
  LEFT: tl.constexpr = SIZE // STRIDE - 1  # windows of the block before that reach into a block
  begin_q, end_q = visible(pos_q, start_q, SIZE, STRIDE, F)
  tile_begin = begin // (PER_BLOCK * STRIDE) // KEYS
  # Local blocks are taken whatever they score.
  num_ranked = tl.maximum(last // (PER_BLOCK * STRIDE) + 1 - LOCAL, 0)
  tile_end = tl.minimum(tl.cdiv(num_ranked, KEYS), M // KEYS)
  out_ptr += ((batch * K + head) * ROWS + tile * QUERIES) * M
  out_q = tl.arange(0, QUERIES) * M
  before = tl.broadcast_to(tl.maximum(lane - 1, 0)[:, None], [KEYS, QUERIES])
  best_bq = tl.zeros([KEYS, QUERIES], tl.float32)
  right_bq = best_bq
  carry_q = tl.zeros([QUERIES], tl.float32)
  for step in range(tile_begin * PER_BLOCK, tile_end * PER_BLOCK):
    i = step % PER_BLOCK
    block = step // PER_BLOCK * KEYS + lane
    f = block * PER_BLOCK + i
    keys_fH = load_keys(fine_ptr, f, F, K, H, HP)
    scores_bq = group_scores(q_rH, norm_r, keys_fH, scale, GP, QUERIES, KEYS, PRECISION)
    seen = (f[:, None] >= begin_q[None, :]) & (f[:, None] < end_q[None, :])
    scores_bq = tl.where(seen, scores_bq, 0.0)
    best_bq = tl.maximum(tl.where(i == 0, 0.0, best_bq), scores_bq)
    if LEFT > 0:
      right_bq = tl.maximum(tl.where(i <= PER_BLOCK - LEFT, 0.0, right_bq), scores_bq)
    if i == PER_BLOCK - 1:
      pooled_bq = best_bq
      if LEFT > 0:
        left_bq = tl.gather(right_bq, before, axis=0)
        left_bq = tl.where((lane == 0)[:, None], carry_q[None, :], left_bq)
        pooled_bq = tl.maximum(best_bq, left_bq)
        carry_q = tl.max(tl.where((lane == KEYS - 1)[:, None], right_bq, 0.0), axis=0)
      tl.store(out_ptr + out_q[None, :] + block[:, None], pooled_bq)


@triton.jit
def reaching(bits, low):
  """How many of bits >= -1 are at least low >= 0; two instructions a number."""
  return -tl.sum((low - 1 - bits) >> 31, axis=0)


@triton.jit
def count_bits(words):
  """How many bits of each 32-bit word are set."""
  x = words.to(tl.uint32, bitcast=True)
  x -= (x >> 1) & 0x55555555
  x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
  return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def store_best(scores_ptr, ids_ptr, begin, end, need, M: tl.constexpr, SIZE: tl.constexpr):
  """Stores the `need` best blocks of [begin, end), which holds more, by ascending id."""
  block = tl.multiple_of(begin // 16 * 16, 16) + tl.arange(0, SIZE)
  scores = tl.load(scores_ptr + block, mask=block < M, other=0.0)
  bits = scores.to(tl.int32, bitcast=True)
  bits = tl.where((block >= begin) & (block < end), bits, -1)
  # `low` is reached by num >= need blocks, `high` by num_high < need: down from the best score in
  # growing steps (2**23 halves a score), then by bisection until one block is missing.
  step = 1 << 22
  high, num_high = tl.max(bits, axis=0) + 1, 0
  low = tl.maximum(high - step, 0)
  num = reaching(bits, low)
  while (num < need) & (low > 0):
    high, num_high = low, num
    step += step
    low = tl.maximum(low - step, 0)
    num = reaching(bits, low)
  while (num > need) & (num_high < need - 1) & (high - low > 1):
    middle = low + (high - low) // 2
    num_middle = reaching(bits, middle)
    is_low = num_middle >= need
    low, high = tl.where(is_low, middle, low), tl.where(is_low, high, middle)
    num, num_high = tl.where(is_low, num_middle, num), tl.where(is_low, num_high, num_middle)
  if num > need:
    low = tl.max(tl.where(bits < high, bits, -1), axis=0)
    num = reaching(bits, low)
  is_taken = bits >= low
  if num > need:  # of equal scores the lower blocks
    is_tie = (bits == low).to(tl.int32)
    room = need - (num - tl.sum(is_tie, axis=0))
    is_taken = is_taken & ((bits > low) | (tl.cumsum(is_tie, axis=0) <= room))
  # A bit a block, in words that then give their lowest bit at a time. The gather only changes where
  # words are kept: each in one place, not in all the threads that summed its bits.
  GROUP: tl.constexpr = min(SIZE, 32)
  bit = tl.arange(0, GROUP)[None, :]
  words = tl.sum(tl.reshape(is_taken.to(tl.int32), [SIZE // GROUP, GROUP]) << bit, axis=1)
  words = tl.gather(words, tl.arange(0, SIZE // GROUP), axis=0)
  rank = count_bits(words)
  rank = tl.cumsum(rank, axis=0) - rank
  first = begin // 16 * 16 + GROUP * tl.arange(0, SIZE // GROUP)
  while tl.max((words != 0).to(tl.int32), axis=0) > 0:
    lowest = (words & -words).to(tl.uint32, bitcast=True)
    place = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    tl.store(ids_ptr + rank, first + place, mask=words != 0)
    words &= words - 1
    rank += 1


@triton.jit
def choose(
  scores_ptr,  # [B, K, ROWS, M] float32
  offset_ptr,  # [B]
  start_ptr,  # [B, T]
  first_ptr,  # [1]
  ids_ptr,  # [B, K, ROWS, W] int32
  counts_ptr,  # [B, K, ROWS] int32
  T: tl.constexpr,
  K: tl.constexpr,
  M: tl.constexpr,
  MP: tl.constexpr,
  ROWS: tl.constexpr,
  W: tl.constexpr,
  WP: tl.constexpr,
  BLOCK: tl.constexpr,
  INIT: tl.constexpr,
  LOCAL: tl.constexpr,  # forced blocks at the end, the current one included
  TOPK: tl.constexpr,
  JOINT: tl.constexpr,
):
  i, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  t = tl.load(first_ptr) + i
  pos = tl.load(offset_ptr + batch) + t
  start = tl.load(start_ptr + batch * T + t, mask=t < T, other=NOWHERE)
  row = (batch * K + head) * ROWS + i
  scores_ptr += row * M
  ids_ptr += row * W
  # In order: initial blocks, free ones [begin, end), local ones.
  first = start // BLOCK
  num_blocks = tl.where(pos >= start, pos // BLOCK + 1 - first, 0)
  num_init = tl.minimum(num_blocks, INIT)
  num_local = tl.minimum(num_blocks - num_init, LOCAL)
  begin, end = first + num_init, first + num_blocks - num_local
  num_forced = num_init + num_local
  need = tl.maximum(W - num_forced if JOINT else TOPK - num_init, 0)
  num_free = tl.minimum(end - begin, need)
  count = tl.minimum(num_forced + num_free, W)
  num_chosen = tl.where(end - begin > need, need, 0)  # else all are taken, a run of blocks
  if num_chosen > 0:
    span = end - begin // 16 * 16
    if span <= MP // 4:
      store_best(scores_ptr, ids_ptr + num_init, begin, end, need, M, MP // 4)
    elif span <= MP // 2:
      store_best(scores_ptr, ids_ptr + num_init, begin, end, need, M, MP // 2)
    else:
      store_best(scores_ptr, ids_ptr + num_init, begin, end, need, M, MP)
  w = tl.arange(0, WP)
  ids = tl.where(w < num_init + num_free, first + w, end + (w - num_init - num_free))
  is_stored = (w < num_init) | (w >= num_init + num_chosen)
  tl.store(ids_ptr + w, tl.where(w < count, ids, -1), mask=is_stored & (w < W))
  tl.store(counts_ptr + row, count)


@triton.jit
def few_rows(
  q_ptr,
  offset_ptr,
  start_ptr,
  batch,
  head,
  T: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  QUERIES: tl.constexpr,
  HEADS: tl.constexpr,
  STEP: tl.constexpr,
):
  """(q [HEADS * QUERIES, HP], positions and starts of the rows, which rows are queries' heads)."""
  row, h = tl.arange(0, HEADS * QUERIES), tl.arange(0, HP)
  t_r, g_r = row % QUERIES, row // QUERIES
  is_row = (t_r < T) & (g_r < G)
  offsets = ((batch * T + t_r) * (K * G) + head * G + g_r)[:, None] * H + h[None, :]
  q_rH = tl.load(q_ptr + offsets, mask=is_row[:, None] & (h < H)[None, :], other=0.0)
  start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
  return q_rH, tl.load(offset_ptr + batch) + STEP * t_r, start_r, is_row


@triton.jit
def few_norms(
  q_ptr,  # [B, T, K*G, H]
  keys_ptr,  # [B, C, K, H] fine keys, or coarse keys
  offset_ptr,  # [B]
  start_ptr,  # [B, T]
  tops_ptr,  # [B, K, TILES, HEADS * QUERIES] float32: largest logit of a tile, base 2
  sums_ptr,  # the same: sum of exponentials relative to it
  scale: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  SIZE: tl.constexpr,
  STRIDE: tl.constexpr,
  QUERIES: tl.constexpr,  # at least T
  HEADS: tl.constexpr,  # at least G
  STEP: tl.constexpr,  # of positions from query to query
  KEYS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """The normaliser's share of one tile of keys: few queries leave no other work to share out."""
  tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  q_rH, pos_r, start_r, is_row = few_rows(
    q_ptr, offset_ptr, start_ptr, batch, head, T, K, G, H, HP, QUERIES, HEADS, STEP
  )
  c = tile * KEYS + tl.arange(0, KEYS)
  keys_cH = load_keys(keys_ptr + (batch * C * K + head) * H, c, C, K, H, HP)
  logits_rc = tl.dot(q_rH, tl.trans(keys_cH), input_precision=PRECISION) * (scale * LOG2E)
  begin_r, end_r = visible(pos_r, start_r, SIZE, STRIDE, C)
  seen = (c[None, :] >= begin_r[:, None]) & (c[None, :] < end_r[:, None]) & is_row[:, None]
  logits_rc = tl.where(seen, logits_rc, float("-inf"))
  top_r = tl.maximum(tl.max(logits_rc, axis=1), FLOOR)
  at = ((batch * K + head) * tl.num_programs(0) + tile) * (HEADS * QUERIES)
  at += tl.arange(0, HEADS * QUERIES)
  tl.store(tops_ptr + at, top_r)
  tl.store(sums_ptr + at, tl.sum(tl.exp2(logits_rc - top_r[:, None]), axis=1))


@triton.jit
def few_scores(
  q_ptr,  # [B, T, K*G, H]
  keys_ptr,  # [B, F, K, H] fine keys
  tops_ptr,  # [B, K, TILES, HEADS * QUERIES]
  sums_ptr,
  offset_ptr,  # [B]
  start_ptr,  # [B, T]
  out_ptr,  # [B, K, T, F] float32: of windows
  scale: tl.constexpr,
  T: tl.constexpr,
  F: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  SIZE: tl.constexpr,
  STRIDE: tl.constexpr,
  QUERIES: tl.constexpr,
  HEADS: tl.constexpr,
  STEP: tl.constexpr,
  KEYS: tl.constexpr,
  TILES: tl.constexpr,
  TOGETHER: tl.constexpr,  # tiles read in one step
  PRECISION: tl.constexpr,
):
  tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  q_rH, pos_r, start_r, is_row = few_rows(
    q_ptr, offset_ptr, start_ptr, batch, head, T, K, G, H, HP, QUERIES, HEADS, STEP
  )
  f = tile * KEYS + tl.arange(0, KEYS)
  keys_fH = load_keys(keys_ptr + (batch * F * K + head) * H, f, F, K, H, HP)
  ROWS: tl.constexpr = HEADS * QUERIES
  row, i = tl.arange(0, ROWS), tl.arange(0, TOGETHER)
  top_r = tl.full([ROWS], FLOOR, tl.float32)
  sum_r = tl.zeros([ROWS], tl.float32)
  for first in range(0, TILES, TOGETHER):
    is_tile = (first + i < TILES)[:, None] & (row >= 0)[None, :]
    at = ((batch * K + head) * TILES + first + i)[:, None] * ROWS + row[None, :]
    tops_ir = tl.load(tops_ptr + at, mask=is_tile, other=FLOOR)
    sums_ir = tl.load(sums_ptr + at, mask=is_tile, other=0.0)
    new_r = tl.maximum(top_r, tl.max(tops_ir, axis=0))
    sum_r *= tl.exp2(top_r - new_r)
    sum_r += tl.sum(sums_ir * tl.exp2(tops_ir - new_r[None, :]), axis=0)
    top_r = new_r
  is_seeing = is_row & (sum_r > 0)
  norm_r = tl.where(is_seeing, top_r + tl.log2(tl.where(is_seeing, sum_r, 1.0)), BLIND)
  logits_fr = tl.dot(keys_fH, tl.trans(q_rH), input_precision=PRECISION)
  probs_fr = tl.exp2(tl.minimum(logits_fr * (scale * LOG2E) - norm_r[None, :], CLAMP))
  scores_fq = tl.sum(tl.reshape(probs_fr, [KEYS, HEADS, QUERIES]), axis=1)
  t_q = tl.arange(0, QUERIES)
  start_q = tl.load(start_ptr + batch * T + t_q, mask=t_q < T, other=NOWHERE)
  begin_q, end_q = visible(tl.load(offset_ptr + batch) + STEP * t_q, start_q, SIZE, STRIDE, F)
  seen = (f[:, None] >= begin_q[None, :]) & (f[:, None] < end_q[None, :])
  rows_q = ((batch * K + head) * T + t_q) * F
  is_out = (f < F)[:, None] & (t_q < T)[None, :]
  tl.store(out_ptr + rows_q[None, :] + f[:, None], tl.where(seen, scores_fq, 0.0), mask=is_out)
