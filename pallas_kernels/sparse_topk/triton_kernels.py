"""Triton bodies of block selection (infllm_v2.md sections 5 to 7, K1 and K2).

`block_scores` makes two passes over compressed keys for a few queries at a time: the normaliser
(fine or coarse keys), then the scores, summed over the query heads of a key head and pooled to
blocks in registers. Each score is computed once, so that neighbouring blocks which share their
best window tie exactly, as in the reference. `choose` takes one row of block scores: bisection on
the bits of the scores (they are >= 0, so bits order like the numbers), ties to the lower block.
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
  keys_ptr, n, NUM: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
  KEYS: tl.constexpr,
):  # fmt: skip
  """[KEYS, HP] from window n on; the last window again beyond the end, which nobody sees."""
  n = tl.minimum(n + tl.arange(0, KEYS), max(NUM - 1, 0))
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
  keys_ptr,  # of the batch row and key head
  n,
  begin_r,
  end_r,
  scale: tl.constexpr,
  C: tl.constexpr,
  K: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  KEYS: tl.constexpr,
  IS_MASKED: tl.constexpr,  # false where every row sees every window of the tile
  PRECISION: tl.constexpr,
):
  """(largest logit, sum of exponentials relative to it) of every row with one more tile."""
  keys_cH = load_keys(keys_ptr, n, C, K, H, HP, KEYS)
  logits_rc = tl.dot(q_rH, tl.trans(keys_cH), input_precision=PRECISION)
  if IS_MASKED:
    c = n + tl.arange(0, KEYS)
    seen = (c[None, :] >= begin_r[:, None]) & (c[None, :] < end_r[:, None])
    logits_rc = tl.where(seen, logits_rc, float("-inf"))
  new_top_r = tl.maximum(top_r, tl.max(logits_rc, axis=1) * (scale * LOG2E))
  exps_rc = tl.exp2(logits_rc * (scale * LOG2E) - new_top_r[:, None])
  return new_top_r, sum_r * tl.exp2(top_r - new_top_r) + tl.sum(exps_rc, axis=1)


@triton.jit
def block_scores(
  q_ptr,  # [B, T, K*G, H]
  fine_ptr,  # [B, F, K, H]
  norm_ptr,  # [B, C, K, H] fine keys, or coarse keys
  offset_ptr,  # [B] position of query 0
  start_ptr,  # [B, T] position of the first token of the query's document
  first_ptr,  # [1] first query of this launch
  out_ptr,  # [B, K, ROWS, M] float32; M a multiple of the blocks of a tile
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
  QUERIES: tl.constexpr,  # queries of one program
  KEYS: tl.constexpr,  # windows of one tile, a multiple of PER_BLOCK
  PRECISION: tl.constexpr,
):
  tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  tile = tl.num_programs(0) - 1 - tile  # the longest first
  first = tl.load(first_ptr) + tile * QUERIES
  offset = tl.load(offset_ptr + batch)
  h = tl.arange(0, HP)
  # Rows of the first product, columns of the second: (head of the group, query).
  row = tl.arange(0, GP * QUERIES)
  t_r, g_r = first + row % QUERIES, row // QUERIES
  is_row = (t_r < T) & (g_r < G)
  t_q = first + tl.arange(0, QUERIES)
  pos_q = offset + t_q
  start_q = tl.load(start_ptr + batch * T + t_q, mask=t_q < T, other=NOWHERE)
  is_query = start_q <= pos_q  # not padding
  last = tl.max(tl.where(is_query, pos_q, -1), axis=0)
  begin = tl.min(tl.where(is_query, start_q, NOWHERE), axis=0)

  q_ptr += ((batch * T + first) * K + head) * G * H
  q_row = row % QUERIES * (K * G) + g_r
  is_q = is_row[:, None] & (h < H)[None, :]
  q_rH = tl.load(q_ptr + q_row[:, None] * H + h[None, :], mask=is_q, other=0.0)
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
    top_r, sum_r = normalise(
      top_r, sum_r, q_rH, norm_ptr, n, row, row,
      scale, C, K, H, HP, KEYS, False, PRECISION,
    )  # fmt: skip
  start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
  begin_r, end_r = visible(offset + t_r, start_r, NORM_SIZE, NORM_STRIDE, C)
  for i in range(norm_begin, norm_end - num_full, KEYS):
    n = tl.where(i < full_begin, i, i + num_full)
    top_r, sum_r = normalise(
      top_r, sum_r, q_rH, norm_ptr, n, begin_r, end_r,
      scale, C, K, H, HP, KEYS, True, PRECISION,
    )  # fmt: skip
  is_seeing = (begin_r < end_r) & (sum_r > 0)
  norm_r = tl.where(is_seeing, top_r + tl.log2(tl.where(is_seeing, sum_r, 1.0)), BLIND)

  TILE_BLOCKS: tl.constexpr = KEYS // PER_BLOCK
  LEFT: tl.constexpr = SIZE // STRIDE - 1  # windows of the block before that reach into a block
  begin_q, end_q = visible(pos_q, start_q, SIZE, STRIDE, F)
  lane = tl.arange(0, KEYS)
  column = tl.arange(0, TILE_BLOCKS)
  in_block = tl.arange(0, PER_BLOCK)
  carry_q = tl.zeros([QUERIES], tl.float32)
  fine_begin = begin // STRIDE // KEYS * KEYS
  fine_end = (last // (PER_BLOCK * STRIDE) + 1) * PER_BLOCK
  fine_end = tl.where(last < 0, 0, tl.minimum(fine_end, M * PER_BLOCK))
  out_ptr += ((batch * K + head) * ROWS + tile * QUERIES) * M
  out_q = tl.arange(0, QUERIES) * M
  for n in range(fine_begin, fine_end, KEYS):
    f = n + lane
    keys_fH = load_keys(fine_ptr, n, F, K, H, HP, KEYS)
    logits_fr = tl.dot(keys_fH, tl.trans(q_rH), input_precision=PRECISION)
    exponents_fr = logits_fr * (scale * LOG2E) - norm_r[None, :]
    probs_fr = tl.exp2(tl.minimum(exponents_fr, CLAMP))
    scores_fq = tl.sum(tl.reshape(probs_fr, [KEYS, GP, QUERIES]), axis=1)
    seen = (f[:, None] >= begin_q[None, :]) & (f[:, None] < end_q[None, :])
    scores_fq = tl.where(seen, scores_fq, 0.0)
    scores_biq = tl.reshape(scores_fq, [TILE_BLOCKS, PER_BLOCK, QUERIES])
    best_bq = tl.max(scores_biq, axis=1)
    if LEFT > 0:
      reach = (in_block >= PER_BLOCK - LEFT)[None, :, None]
      right_bq = tl.max(tl.where(reach, scores_biq, 0.0), axis=1)
      before = tl.broadcast_to(tl.maximum(column - 1, 0)[:, None], [TILE_BLOCKS, QUERIES])
      left_bq = tl.gather(right_bq, before, axis=0)
      left_bq = tl.where((column == 0)[:, None], carry_q[None, :], left_bq)
      best_bq = tl.maximum(best_bq, left_bq)
      carry_q = tl.max(tl.where((column == TILE_BLOCKS - 1)[:, None], right_bq, 0.0), axis=0)
    block = n // PER_BLOCK + column
    tl.store(out_ptr + out_q[None, :] + block[:, None], best_bq)


@triton.jit
def reaching(bits, low):
  """How many of bits >= -1 are at least low >= 0; two instructions a number."""
  return -tl.sum((low - 1 - bits) >> 31, axis=0)


@triton.jit
def store_best(scores_ptr, ids_ptr, begin, end, need, SIZE: tl.constexpr):
  """Stores the `need` best blocks of [begin, end), which holds more, by ascending id."""
  block = tl.multiple_of(begin // 16 * 16, 16) + tl.arange(0, SIZE)
  is_free = (block >= begin) & (block < end)
  scores = tl.load(scores_ptr + block, mask=is_free, other=0.0)
  bits = tl.where(is_free, scores.to(tl.int32, bitcast=True), -1)
  # `low` is reached by num >= need blocks, `high` by fewer. First down from the best score in
  # growing steps (2**23 halves a score), then by bisection until need blocks are above.
  low = tl.max(bits, axis=0)
  high = low + 1
  num = reaching(bits, low)
  step = 1 << 22
  while (num < need) & (low > 0):
    high = low
    low = tl.maximum(low - step, 0)
    step += step
    num = reaching(bits, low)
  while (num > need) & (high - low > 1):
    middle = low + (high - low) // 2
    num_middle = reaching(bits, middle)
    is_low = num_middle >= need
    low, high = tl.where(is_low, middle, low), tl.where(is_low, high, middle)
    num = tl.where(is_low, num_middle, num)
  is_taken = bits >= low
  if num > need:  # of equal scores the lower blocks
    is_tie = (bits == low).to(tl.int32)
    room = need - (num - tl.sum(is_tie, axis=0))
    is_taken = is_taken & ((bits > low) | (tl.cumsum(is_tie, axis=0) <= room))
  rank = tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
  tl.store(ids_ptr + rank, block, mask=is_taken)


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
      store_best(scores_ptr, ids_ptr + num_init, begin, end, need, MP // 4)
    elif span <= MP // 2:
      store_best(scores_ptr, ids_ptr + num_init, begin, end, need, MP // 2)
    else:
      store_best(scores_ptr, ids_ptr + num_init, begin, end, need, MP)
  w = tl.arange(0, WP)
  ids = tl.where(w < num_init + num_free, first + w, end + (w - num_init - num_free))
  is_stored = (w < num_init) | (w >= num_init + num_chosen)
  tl.store(ids_ptr + w, tl.where(w < count, ids, -1), mask=is_stored & (w < W))
  tl.store(counts_ptr + row, count)
