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
def block_scores(
  q_ptr,  # [B, T, K*G, H]
  fine_ptr,  # [B, F, K, H]
  norm_ptr,  # [B, C, K, H] fine keys, or coarse keys
  offset_ptr,  # [B] position of query 0
  start_ptr,  # [B, T] position of the first token of the query's document
  first_ptr,  # [1] first query of this launch
  out_ptr,  # [B, K, ROWS, M] float32
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
  ROWS: tl.constexpr,  # queries of this launch
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
  first = tl.load(first_ptr)
  offset = tl.load(offset_ptr + batch)
  h = tl.arange(0, HP)
  # Rows of the matmuls: (query, head of the group). The same facts again by query, for pooling.
  row = tl.arange(0, QUERIES * GP)
  t_r, g_r = first + tile * QUERIES + row // GP, row % GP
  is_row = (t_r < T) & (g_r < G)
  pos_r = offset + t_r
  start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
  t_q = first + tile * QUERIES + tl.arange(0, QUERIES)
  pos_q = offset + t_q
  start_q = tl.load(start_ptr + batch * T + t_q, mask=t_q < T, other=NOWHERE)
  last = tl.max(tl.where(start_q < NOWHERE, pos_q, -1), axis=0)  # -1: nothing here but padding
  begin = tl.min(start_q, axis=0)

  q_row = (batch * T + t_r) * (K * G) + head * G + g_r
  is_q = is_row[:, None] & (h < H)[None, :]
  q_rH = tl.load(q_ptr + q_row[:, None] * H + h[None, :], mask=is_q, other=0.0)
  lane = tl.arange(0, KEYS)

  top_r = tl.full([QUERIES * GP], FLOOR, tl.float32)
  sum_r = tl.zeros([QUERIES * GP], tl.float32)
  norm_begin = begin // NORM_STRIDE // KEYS * KEYS
  norm_end = tl.minimum(C, tl.maximum(last + 1 - NORM_SIZE + NORM_STRIDE, 0) // NORM_STRIDE)
  for n in range(norm_begin, norm_end, KEYS):
    c = n + lane
    offsets = ((batch * C + c) * K + head)[:, None] * H + h[None, :]
    is_key = (c < C)[:, None] & (h < H)[None, :]
    keys_cH = tl.load(norm_ptr + offsets, mask=is_key, other=0.0)
    logits_rc = tl.dot(q_rH, tl.trans(keys_cH), input_precision=PRECISION) * (scale * LOG2E)
    x = c * NORM_STRIDE
    seen = (x + NORM_SIZE - 1)[None, :] <= pos_r[:, None]
    seen = seen & (x[None, :] >= start_r[:, None])
    logits_rc = tl.where(seen, logits_rc, float("-inf"))
    new_top_r = tl.maximum(top_r, tl.max(logits_rc, axis=1))
    exps_rc = tl.exp2(logits_rc - new_top_r[:, None])
    sum_r = sum_r * tl.exp2(top_r - new_top_r) + tl.sum(exps_rc, axis=1)
    top_r = new_top_r
  norm_r = tl.where(sum_r > 0, top_r + tl.log2(tl.where(sum_r > 0, sum_r, 1.0)), BLIND)

  TILE_BLOCKS: tl.constexpr = KEYS // PER_BLOCK
  LEFT: tl.constexpr = SIZE // STRIDE - 1  # windows of the block before that reach into a block
  column = tl.arange(0, TILE_BLOCKS)
  in_block = tl.arange(0, PER_BLOCK)
  carry_q = tl.zeros([QUERIES], tl.float32)
  fine_begin = begin // STRIDE // KEYS * KEYS
  fine_end = (last // (PER_BLOCK * STRIDE) + 1) * PER_BLOCK
  fine_end = tl.where(last < 0, 0, fine_end)
  out_row = (batch * K + head) * ROWS + tile * QUERIES + tl.arange(0, QUERIES)
  is_out = tile * QUERIES + tl.arange(0, QUERIES) < ROWS
  for n in range(fine_begin, fine_end, KEYS):
    f = n + lane
    offsets = ((batch * F + f) * K + head)[:, None] * H + h[None, :]
    is_key = (f < F)[:, None] & (h < H)[None, :]
    keys_fH = tl.load(fine_ptr + offsets, mask=is_key, other=0.0)
    logits_rf = tl.dot(q_rH, tl.trans(keys_fH), input_precision=PRECISION) * (scale * LOG2E)
    probs_rf = tl.exp2(tl.minimum(logits_rf - norm_r[:, None], CLAMP))
    scores_qf = tl.sum(tl.reshape(probs_rf, [QUERIES, GP, KEYS]), axis=1)
    x = f * STRIDE
    seen = (x + SIZE - 1)[None, :] <= pos_q[:, None]
    seen = seen & (x[None, :] >= start_q[:, None]) & (f < F)[None, :]
    scores_qf = tl.where(seen, scores_qf, 0.0)
    scores_qbi = tl.reshape(scores_qf, [QUERIES, TILE_BLOCKS, PER_BLOCK])
    best_qb = tl.max(scores_qbi, axis=2)
    if LEFT > 0:
      reach = (in_block >= PER_BLOCK - LEFT)[None, None, :]
      right_qb = tl.max(tl.where(reach, scores_qbi, 0.0), axis=2)
      before = tl.broadcast_to(tl.maximum(column - 1, 0)[None, :], [QUERIES, TILE_BLOCKS])
      left_qb = tl.gather(right_qb, before, axis=1)
      left_qb = tl.where((column == 0)[None, :], carry_q[:, None], left_qb)
      best_qb = tl.maximum(best_qb, left_qb)
      carry_q = tl.max(tl.where((column == TILE_BLOCKS - 1)[None, :], right_qb, 0.0), axis=1)
    block = n // PER_BLOCK + column
    is_stored = is_out[:, None] & (block < M)[None, :]
    tl.store(out_ptr + out_row[:, None] * M + block[None, :], best_qb, mask=is_stored)


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
  first_block = start // BLOCK
  cur = tl.where(pos >= start, pos // BLOCK, -1)
  out_row = (batch * K + head) * ROWS + i
  b = tl.arange(0, MP)
  is_candidate = (b >= first_block) & (b <= cur)
  is_init = is_candidate & (b < first_block + INIT)
  is_forced = is_candidate & (is_init | (b > cur - LOCAL))
  is_free = is_candidate & (~is_forced)
  if JOINT:
    need = W - tl.sum(is_forced.to(tl.int32), axis=0)
  else:
    need = TOPK - tl.sum(is_init.to(tl.int32), axis=0)
  need = tl.maximum(need, 0)
  num_free = tl.sum(is_free.to(tl.int32), axis=0)
  scores = tl.load(scores_ptr + out_row * M + b, mask=is_free, other=0.0)
  bits = tl.where(is_free, scores.to(tl.int32, bitcast=True), -1)
  # The need-th largest: the highest threshold that at least `need` free blocks reach.
  cut = tl.zeros([], tl.int32)
  if num_free > need:
    for step in range(0, 31):
      probe = cut | (1 << (30 - step))
      reach = tl.sum((bits >= probe).to(tl.int32), axis=0)
      cut = tl.where(reach >= need, probe, cut)
  is_above = is_free & (bits > cut)
  is_tie = is_free & (bits == cut)
  room = need - tl.sum(is_above.to(tl.int32), axis=0)
  tie_rank = tl.cumsum(is_tie.to(tl.int32), axis=0)
  is_taken = is_forced | is_above | (is_tie & (tie_rank <= room))
  rank = tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
  count = tl.sum(is_taken.to(tl.int32), axis=0)
  tl.store(ids_ptr + out_row * W + rank, b, mask=is_taken & (rank < W))
  w = tl.arange(0, WP)
  none = tl.full([WP], -1, tl.int32)
  tl.store(ids_ptr + out_row * W + w, none, mask=(w >= count) & (w < W))
  tl.store(counts_ptr + out_row, tl.minimum(count, W))
