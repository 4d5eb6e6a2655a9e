"""Triton bodies of sparse decoding (infllm_v2.md 19.2, K5): the block list is cut into splits.

A decode step has few queries, so a query's list is shared out to SPLITS programs; `merge` joins
their softmaxes in a fixed order. A block is a page where there is a page table.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # below every real score


@triton.jit
def decode(
  q_ptr,  # [B, T, K*G, H]
  k_ptr,  # [B, S, K, H], or [P, BLOCK, K, H] with a page table
  v_ptr,
  ids_ptr,  # [B, K, T, W] int32, -1 = none, at the end
  pos_ptr,  # [B, T]
  start_ptr,  # [B, T]
  base_ptr,  # [B] slot of position 0
  table_ptr,  # [B, M] page of each block
  out_ptr,  # [B, T, SPLITS, K*G, H] float32
  lse_ptr,  # [B, T, SPLITS, K*G] float32, base 2
  scale: tl.constexpr,
  T: tl.constexpr,
  S: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  GP: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  W: tl.constexpr,
  WP: tl.constexpr,
  M: tl.constexpr,
  BLOCK: tl.constexpr,
  PAGED: tl.constexpr,
  SPLITS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
  batch, t = (row // T).to(tl.int64), row % T
  pos = tl.load(pos_ptr + batch * T + t)
  start = tl.load(start_ptr + batch * T + t)
  base = tl.load(base_ptr + batch)
  list_ptr = ids_ptr + ((batch * K + head) * T + t) * W
  g, h, lane = tl.arange(0, GP), tl.arange(0, HP), tl.arange(0, BLOCK)
  q_row = (batch * T + t) * (K * G) + head * G
  is_q = (g < G)[:, None] & (h < H)[None, :]
  q_GH = tl.load(q_ptr + (q_row + g)[:, None] * H + h[None, :], mask=is_q, other=0.0)
  top_G = tl.full([GP], FLOOR, tl.float32)
  sum_G = tl.zeros([GP], tl.float32)
  acc_GH = tl.zeros([GP, HP], tl.float32)
  if SPLITS < W:
    w = tl.arange(0, WP)
    count = tl.sum((tl.load(list_ptr + w, mask=w < W, other=-1) >= 0).to(tl.int32), axis=0)
    per_split = tl.cdiv(count, SPLITS)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, count)
  else:  # a block at most, known without the others
    is_block = tl.load(list_ptr + split, mask=split < W, other=-1) >= 0
    begin, end = split, split + is_block.to(tl.int32)
  for j in range(begin, end):
    block = tl.load(list_ptr + j)
    spot = block * BLOCK + lane
    if PAGED:
      first = tl.load(table_ptr + batch * M + block).to(tl.int64) * BLOCK
      is_slot = lane >= 0
    else:
      first = batch * S + base + block * BLOCK
      is_slot = base + spot < S
    seen_s = (spot <= pos) & (spot >= start) & is_slot
    offsets = ((first + lane) * K + head)[:, None] * H + h[None, :]
    is_kv = seen_s[:, None] & (h < H)[None, :]
    k_sH = tl.load(k_ptr + offsets, mask=is_kv, other=0.0)
    v_sH = tl.load(v_ptr + offsets, mask=is_kv, other=0.0)
    scores_Gs = tl.dot(q_GH, tl.trans(k_sH), input_precision=PRECISION) * (scale * LOG2E)
    scores_Gs = tl.where(seen_s[None, :], scores_Gs, float("-inf"))
    new_top_G = tl.maximum(top_G, tl.max(scores_Gs, axis=1))
    shrink_G = tl.exp2(top_G - new_top_G)
    probs_Gs = tl.exp2(scores_Gs - new_top_G[:, None])
    sum_G = sum_G * shrink_G + tl.sum(probs_Gs, axis=1)
    acc_GH = acc_GH * shrink_G[:, None]
    acc_GH = tl.dot(probs_Gs.to(v_sH.dtype), v_sH, acc_GH, input_precision=PRECISION)
    top_G = new_top_G
  safe_G = tl.where(sum_G > 0, sum_G, 1.0)
  lse_G = tl.where(sum_G > 0, top_G + tl.log2(safe_G), float("-inf"))
  out_row = ((batch * T + t) * SPLITS + split) * (K * G) + head * G
  out_offsets = (out_row + g)[:, None] * H + h[None, :]
  tl.store(out_ptr + out_offsets, acc_GH / safe_G[:, None], mask=is_q)
  tl.store(lse_ptr + out_row + g, lse_G, mask=g < G)


@triton.jit
def merge(
  parts_ptr,  # [B, T, SPLITS, N, H] float32
  lses_ptr,  # [B, T, SPLITS, N] float32, base 2
  out_ptr,  # [B, T, N, H]
  lse_ptr,  # [B, T, N] float32, base e
  N: tl.constexpr,
  H: tl.constexpr,
  HB: tl.constexpr,  # channels of a program
  SPLITS: tl.constexpr,
):
  n, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
  i, h = tl.arange(0, SPLITS), tl.program_id(2) * HB + tl.arange(0, HB)
  rows_i = (row * SPLITS + i) * N + n
  lse_i = tl.load(lses_ptr + rows_i)
  top = tl.maximum(tl.max(lse_i, axis=0), FLOOR)
  weight_i = tl.exp2(lse_i - top)
  total = tl.sum(weight_i, axis=0)
  safe = tl.where(total > 0, total, 1.0)
  is_part = (weight_i > 0)[:, None] & (h < H)[None, :]  # others saw nothing
  parts_iH = tl.load(parts_ptr + rows_i[:, None] * H + h[None, :], mask=is_part, other=0.0)
  out_H = tl.sum(parts_iH * (weight_i / safe)[:, None], axis=0)
  tl.store(out_ptr + (row * N + n) * H + h, out_H.to(out_ptr.dtype.element_ty), mask=h < H)
  lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2E, float("-inf"))
  tl.store(lse_ptr + row * N + n, lse, mask=tl.program_id(2) == 0)
