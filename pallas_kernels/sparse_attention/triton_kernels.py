"""Triton bodies of attention over selected blocks (infllm_v2.md section 9; K3 and K4 of 19.2).

The local blocks of neighbouring queries are the same band of keys: `band_*` kernels take a few
queries at a time, rows (query, head of the group), against ordinary tiles. The other blocks differ
from query to query: one program of `list_forward` and `list_backward_q` is one query with the G
heads that share its list, and goes on from what the band left (one softmax over both). One program
of `list_backward_kv` is a run of queries that selected one key block. Arrays are read in the
model's layout, heads inside tokens. Sizes are compile-time constants; GP and HP are the powers of
two that hold G and H. `NUM_LOCAL` = 0 means that there is no band.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # below every real score
NOWHERE = tl.constexpr(2**30)  # start of a row that is padding


@triton.jit
def _attend(q_RH, k_sH, v_sH, seen_Rs, top_R, sum_R, acc_RH, scale, PRECISION: tl.constexpr):
  """One step of the online softmax, base 2."""
  scores_Rs = tl.dot(q_RH, tl.trans(k_sH), input_precision=PRECISION) * (scale * LOG2E)
  scores_Rs = tl.where(seen_Rs, scores_Rs, float("-inf"))
  new_top_R = tl.maximum(top_R, tl.max(scores_Rs, axis=1))
  shrink_R = tl.exp2(top_R - new_top_R)
  probs_Rs = tl.exp2(scores_Rs - new_top_R[:, None])
  sum_R = sum_R * shrink_R + tl.sum(probs_Rs, axis=1)
  acc_RH = acc_RH * shrink_R[:, None]
  acc_RH = tl.dot(probs_Rs.to(v_sH.dtype), v_sH, acc_RH, input_precision=PRECISION)
  return new_top_R, sum_R, acc_RH


@triton.jit
def _finish(top_R, sum_R, acc_RH):
  """(out, lse in base e); 0 and -inf where nothing was seen."""
  safe_R = tl.where(sum_R > 0, sum_R, 1.0)
  lse_R = tl.where(sum_R > 0, (top_R + tl.log2(safe_R)) / LOG2E, float("-inf"))
  return acc_RH / safe_R[:, None], lse_R


@triton.jit
def _dscores(q_RH, dout_RH, k_sH, v_sH, seen_Rs, lse_R, delta_R, scale, PRECISION: tl.constexpr):
  """P * (dout v^T - delta), without the scale (section 11), in the inputs' type."""
  lse_R = tl.where(lse_R > FLOOR, lse_R, -FLOOR)  # rows that see nothing
  scores_Rs = tl.dot(q_RH, tl.trans(k_sH), input_precision=PRECISION) * (scale * LOG2E)
  probs_Rs = tl.exp2(scores_Rs - (lse_R * LOG2E)[:, None])
  dprobs_Rs = tl.dot(dout_RH, tl.trans(v_sH), input_precision=PRECISION)
  dscores_Rs = probs_Rs * (dprobs_Rs - delta_R[:, None])
  return tl.where(seen_Rs, dscores_Rs, 0.0).to(k_sH.dtype)


@triton.jit
def _add_kv(
  q_rH, dout_rH, k_sH, v_sH, seen_sr, lse_r, delta_r, dk_sH, dv_sH, scale, PRECISION: tl.constexpr
):
  """dk (without the scale) and dv with the share of some query rows."""
  lse_r = tl.where(lse_r > FLOOR, lse_r, -FLOOR)
  scores_sr = tl.dot(k_sH, tl.trans(q_rH), input_precision=PRECISION) * (scale * LOG2E)
  probs_sr = tl.exp2(scores_sr - (lse_r * LOG2E)[None, :])
  probs_sr = tl.where(seen_sr, probs_sr, 0.0)
  dv_sH = tl.dot(probs_sr.to(dout_rH.dtype), dout_rH, dv_sH, input_precision=PRECISION)
  dprobs_sr = tl.dot(v_sH, tl.trans(dout_rH), input_precision=PRECISION)
  dscores_sr = (probs_sr * (dprobs_sr - delta_r[None, :])).to(q_rH.dtype)
  dk_sH = tl.dot(dscores_sr, q_rH, dk_sH, input_precision=PRECISION)
  return dk_sH, dv_sH


@triton.jit
def _list_count(ids_ptr, pos, W: tl.constexpr, WP: tl.constexpr, BLOCK: tl.constexpr, NUM_LOCAL):
  """Entries of an ascending list that do not belong to the band."""
  w = tl.arange(0, WP)
  ids_W = tl.load(ids_ptr + w, mask=w < W, other=-1)
  is_entry = ids_W >= 0
  if NUM_LOCAL > 0:
    is_entry = is_entry & (ids_W <= pos // BLOCK - NUM_LOCAL)
  return tl.sum(is_entry.to(tl.int32), axis=0)


@triton.jit
def list_forward(
  q_ptr,  # [B, T, K*G, H]
  k_ptr,  # [B, S, K, H]
  v_ptr,  # [B, S, K, H]
  ids_ptr,  # [B, K, T, W] int32, ascending, -1 = none
  pos_ptr,  # [B, T] key slot of the query
  start_ptr,  # [B, T] first key slot of the query's document
  band_out_ptr,  # [B, T, K*G, H] what the band left, if there is one
  band_lse_ptr,  # [B, T, K*G] float32
  out_ptr,  # [B, T, K*G, H]
  lse_ptr,  # [B, T, K*G] float32
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
  BLOCK: tl.constexpr,
  NUM_LOCAL: tl.constexpr,
  PRECISION: tl.constexpr,
):
  t, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  pos = tl.load(pos_ptr + batch * T + t)
  start = tl.load(start_ptr + batch * T + t)
  list_ptr = ids_ptr + ((batch * K + head) * T + t) * W
  count = _list_count(list_ptr, pos, W, WP, BLOCK, NUM_LOCAL)
  g, h, lane = tl.arange(0, GP), tl.arange(0, HP), tl.arange(0, BLOCK)
  q_row = (batch * T + t) * (K * G) + head * G
  is_q = (g < G)[:, None] & (h < H)[None, :]
  q_offsets = (q_row + g)[:, None] * H + h[None, :]
  q_GH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
  if NUM_LOCAL > 0:
    lse_G = tl.load(band_lse_ptr + q_row + g, mask=g < G, other=float("-inf"))
    top_G = tl.maximum(lse_G * LOG2E, FLOOR)
    sum_G = tl.where(lse_G > FLOOR, 1.0, 0.0)
    acc_GH = tl.load(band_out_ptr + q_offsets, mask=is_q, other=0.0).to(tl.float32)
  else:
    top_G = tl.full([GP], FLOOR, tl.float32)
    sum_G = tl.zeros([GP], tl.float32)
    acc_GH = tl.zeros([GP, HP], tl.float32)
  for j in range(0, count):
    token = tl.load(list_ptr + j) * BLOCK + lane
    offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
    is_kv = (token < S)[:, None] & (h < H)[None, :]
    k_sH = tl.load(k_ptr + offsets, mask=is_kv, other=0.0)
    v_sH = tl.load(v_ptr + offsets, mask=is_kv, other=0.0)
    seen_s = (token <= pos) & (token >= start)
    top_G, sum_G, acc_GH = _attend(
      q_GH, k_sH, v_sH, seen_s[None, :], top_G, sum_G, acc_GH, scale, PRECISION
    )
  out_GH, lse_G = _finish(top_G, sum_G, acc_GH)
  tl.store(out_ptr + q_offsets, out_GH.to(out_ptr.dtype.element_ty), mask=is_q)
  tl.store(lse_ptr + q_row + g, lse_G, mask=g < G)


@triton.jit
def list_backward_q(
  q_ptr,
  k_ptr,
  v_ptr,
  ids_ptr,
  pos_ptr,
  start_ptr,
  dout_ptr,  # [B, T, K*G, H]
  lse_ptr,  # [B, T, K*G] float32, of the whole softmax
  delta_ptr,  # [B, T, K*G] float32, sum of out * dout
  band_dq_ptr,  # [B, T, K*G, H] float32 share of the band, if there is one
  dq_ptr,  # [B, T, K*G, H]
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
  BLOCK: tl.constexpr,
  NUM_LOCAL: tl.constexpr,
  PRECISION: tl.constexpr,
):
  t, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  pos = tl.load(pos_ptr + batch * T + t)
  start = tl.load(start_ptr + batch * T + t)
  list_ptr = ids_ptr + ((batch * K + head) * T + t) * W
  count = _list_count(list_ptr, pos, W, WP, BLOCK, NUM_LOCAL)
  g, h, lane = tl.arange(0, GP), tl.arange(0, HP), tl.arange(0, BLOCK)
  q_row = (batch * T + t) * (K * G) + head * G
  is_q = (g < G)[:, None] & (h < H)[None, :]
  q_offsets = (q_row + g)[:, None] * H + h[None, :]
  q_GH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
  dout_GH = tl.load(dout_ptr + q_offsets, mask=is_q, other=0.0)
  lse_G = tl.load(lse_ptr + q_row + g, mask=g < G, other=0.0)
  delta_G = tl.load(delta_ptr + q_row + g, mask=g < G, other=0.0)
  dq_GH = tl.zeros([GP, HP], tl.float32)
  for j in range(0, count):
    token = tl.load(list_ptr + j) * BLOCK + lane
    offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
    is_kv = (token < S)[:, None] & (h < H)[None, :]
    k_sH = tl.load(k_ptr + offsets, mask=is_kv, other=0.0)
    v_sH = tl.load(v_ptr + offsets, mask=is_kv, other=0.0)
    seen_s = (token <= pos) & (token >= start)
    dscores_Gs = _dscores(
      q_GH, dout_GH, k_sH, v_sH, seen_s[None, :], lse_G, delta_G, scale, PRECISION
    )
    dq_GH = tl.dot(dscores_Gs, k_sH, dq_GH, input_precision=PRECISION)
  dq_GH = dq_GH * scale
  if NUM_LOCAL > 0:
    dq_GH += tl.load(band_dq_ptr + q_offsets, mask=is_q, other=0.0)
  tl.store(dq_ptr + q_offsets, dq_GH.to(dq_ptr.dtype.element_ty), mask=is_q)


@triton.jit
def list_backward_kv(
  q_ptr,
  k_ptr,
  v_ptr,
  queries_ptr,  # [B, K, T*W] queries sorted by selected block
  run_block_ptr,  # [B, K, R] key block of each run, -1 = no run
  run_begin_ptr,  # [B, K, R] first entry of the run in `queries`
  run_end_ptr,  # [B, K, R]
  pos_ptr,
  start_ptr,
  dout_ptr,
  lse_ptr,
  delta_ptr,
  dk_ptr,  # [B, K, R, BLOCK, H] float32
  dv_ptr,  # [B, K, R, BLOCK, H] float32
  scale: tl.constexpr,
  T: tl.constexpr,
  S: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  GP: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  E: tl.constexpr,  # entries, T * W
  R: tl.constexpr,
  BLOCK: tl.constexpr,
  QUERIES: tl.constexpr,  # queries taken at a time; a matmul has QUERIES * GP rows
  PRECISION: tl.constexpr,
):
  run, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  run_row = (batch * K + head) * R + run
  block = tl.load(run_block_ptr + run_row)
  if block >= 0:
    begin = tl.load(run_begin_ptr + run_row)
    end = tl.load(run_end_ptr + run_row)
    h, lane = tl.arange(0, HP), tl.arange(0, BLOCK)
    token = block * BLOCK + lane
    kv_offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
    is_kv = (token < S)[:, None] & (h < H)[None, :]
    k_sH = tl.load(k_ptr + kv_offsets, mask=is_kv, other=0.0)
    v_sH = tl.load(v_ptr + kv_offsets, mask=is_kv, other=0.0)
    row = tl.arange(0, QUERIES * GP)
    entry_r, g_r = row // GP, row % GP
    dk_sH = tl.zeros([BLOCK, HP], tl.float32)
    dv_sH = tl.zeros([BLOCK, HP], tl.float32)
    for first in range(begin, end, QUERIES):
      is_row = (first + entry_r < end) & (g_r < G)
      entry = (batch * K + head) * E + first + entry_r
      t_r = tl.load(queries_ptr + entry, mask=is_row, other=0)
      q_row = (batch * T + t_r) * (K * G) + head * G + g_r
      q_offsets = q_row[:, None] * H + h[None, :]
      is_q = is_row[:, None] & (h < H)[None, :]
      q_rH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
      dout_rH = tl.load(dout_ptr + q_offsets, mask=is_q, other=0.0)
      lse_r = tl.load(lse_ptr + q_row, mask=is_row, other=0.0)
      delta_r = tl.load(delta_ptr + q_row, mask=is_row, other=0.0)
      pos_r = tl.load(pos_ptr + batch * T + t_r, mask=is_row, other=-1)
      start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
      seen_sr = (token[:, None] <= pos_r[None, :]) & (token[:, None] >= start_r[None, :])
      dk_sH, dv_sH = _add_kv(
        q_rH, dout_rH, k_sH, v_sH, seen_sr, lse_r, delta_r, dk_sH, dv_sH, scale, PRECISION
      )
    out_offsets = (run_row * BLOCK + lane)[:, None] * H + h[None, :]
    is_out = (lane >= 0)[:, None] & (h < H)[None, :]
    tl.store(dk_ptr + out_offsets, dk_sH * scale, mask=is_out)
    tl.store(dv_ptr + out_offsets, dv_sH, mask=is_out)


@triton.jit
def sum_runs(
  runs_ptr,  # [B, K, R, BLOCK, H] float32
  first_run_ptr,  # [B, K, M + 1] first run of every block
  band_ptr,  # [B, S, K, H] float32 share of the band, if there is one
  out_ptr,  # [B, S, K, H]
  S: tl.constexpr,
  K: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  M: tl.constexpr,
  R: tl.constexpr,
  BLOCK: tl.constexpr,
  NUM_LOCAL: tl.constexpr,
):
  """Adds the runs of one block in their order: the result does not depend on timing."""
  block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  bounds_ptr = first_run_ptr + (batch * K + head) * (M + 1) + block
  first, last = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
  lane, h = tl.arange(0, BLOCK), tl.arange(0, HP)
  inside = lane[:, None] * H + h[None, :]
  is_h = (h < H)[None, :] & (lane >= 0)[:, None]
  token = block * BLOCK + lane
  offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
  is_out = is_h & (token < S)[:, None]
  total_sH = tl.zeros([BLOCK, HP], tl.float32)
  if NUM_LOCAL > 0:
    total_sH = tl.load(band_ptr + offsets, mask=is_out, other=0.0)
  for run in range(first, last):
    row = (batch * K + head) * R + run
    total_sH += tl.load(runs_ptr + row * (BLOCK * H) + inside, mask=is_h, other=0.0)
  tl.store(out_ptr + offsets, total_sH.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def _band_bounds(pos_r, start_r, is_row, BLOCK: tl.constexpr, NUM_LOCAL: tl.constexpr):
  """(first local slot of each row, lowest and highest slot that any row sees)."""
  low_r = tl.maximum(start_r, (pos_r // BLOCK - NUM_LOCAL + 1) * BLOCK)
  low_r = tl.where(is_row, low_r, NOWHERE)
  is_seeing = low_r <= pos_r
  return low_r, tl.min(low_r, axis=0), tl.max(tl.where(is_seeing, pos_r, -1), axis=0)


@triton.jit
def band_forward(
  q_ptr,
  k_ptr,
  v_ptr,
  pos_ptr,
  start_ptr,
  out_ptr,
  lse_ptr,
  scale: tl.constexpr,
  T: tl.constexpr,
  S: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  GP: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  BLOCK: tl.constexpr,
  NUM_LOCAL: tl.constexpr,
  QUERIES: tl.constexpr,
  KEYS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  row, h, lane = tl.arange(0, QUERIES * GP), tl.arange(0, HP), tl.arange(0, KEYS)
  t_r, g_r = tile * QUERIES + row // GP, row % GP
  is_row = (t_r < T) & (g_r < G)
  pos_r = tl.load(pos_ptr + batch * T + t_r, mask=is_row, other=-1)
  start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
  low_r, begin, last = _band_bounds(pos_r, start_r, is_row, BLOCK, NUM_LOCAL)
  q_row = (batch * T + t_r) * (K * G) + head * G + g_r
  is_q = is_row[:, None] & (h < H)[None, :]
  q_offsets = q_row[:, None] * H + h[None, :]
  q_rH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
  top_r = tl.full([QUERIES * GP], FLOOR, tl.float32)
  sum_r = tl.zeros([QUERIES * GP], tl.float32)
  acc_rH = tl.zeros([QUERIES * GP, HP], tl.float32)
  for first in range(begin // KEYS * KEYS, tl.minimum(last + 1, S), KEYS):
    token = first + lane
    offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
    is_kv = (token < S)[:, None] & (h < H)[None, :]
    k_sH = tl.load(k_ptr + offsets, mask=is_kv, other=0.0)
    v_sH = tl.load(v_ptr + offsets, mask=is_kv, other=0.0)
    seen_rs = (token[None, :] <= pos_r[:, None]) & (token[None, :] >= low_r[:, None])
    top_r, sum_r, acc_rH = _attend(
      q_rH, k_sH, v_sH, seen_rs, top_r, sum_r, acc_rH, scale, PRECISION
    )
  out_rH, lse_r = _finish(top_r, sum_r, acc_rH)
  tl.store(out_ptr + q_offsets, out_rH.to(out_ptr.dtype.element_ty), mask=is_q)
  tl.store(lse_ptr + q_row, lse_r, mask=is_row)


@triton.jit
def band_backward_q(
  q_ptr,
  k_ptr,
  v_ptr,
  pos_ptr,
  start_ptr,
  dout_ptr,
  lse_ptr,
  delta_ptr,
  dq_ptr,  # [B, T, K*G, H] float32
  scale: tl.constexpr,
  T: tl.constexpr,
  S: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  GP: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  BLOCK: tl.constexpr,
  NUM_LOCAL: tl.constexpr,
  QUERIES: tl.constexpr,
  KEYS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  row, h, lane = tl.arange(0, QUERIES * GP), tl.arange(0, HP), tl.arange(0, KEYS)
  t_r, g_r = tile * QUERIES + row // GP, row % GP
  is_row = (t_r < T) & (g_r < G)
  pos_r = tl.load(pos_ptr + batch * T + t_r, mask=is_row, other=-1)
  start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
  low_r, begin, last = _band_bounds(pos_r, start_r, is_row, BLOCK, NUM_LOCAL)
  q_row = (batch * T + t_r) * (K * G) + head * G + g_r
  is_q = is_row[:, None] & (h < H)[None, :]
  q_offsets = q_row[:, None] * H + h[None, :]
  q_rH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
  dout_rH = tl.load(dout_ptr + q_offsets, mask=is_q, other=0.0)
  lse_r = tl.load(lse_ptr + q_row, mask=is_row, other=0.0)
  delta_r = tl.load(delta_ptr + q_row, mask=is_row, other=0.0)
  dq_rH = tl.zeros([QUERIES * GP, HP], tl.float32)
  for first in range(begin // KEYS * KEYS, tl.minimum(last + 1, S), KEYS):
    token = first + lane
    offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
    is_kv = (token < S)[:, None] & (h < H)[None, :]
    k_sH = tl.load(k_ptr + offsets, mask=is_kv, other=0.0)
    v_sH = tl.load(v_ptr + offsets, mask=is_kv, other=0.0)
    seen_rs = (token[None, :] <= pos_r[:, None]) & (token[None, :] >= low_r[:, None])
    dscores_rs = _dscores(q_rH, dout_rH, k_sH, v_sH, seen_rs, lse_r, delta_r, scale, PRECISION)
    dq_rH = tl.dot(dscores_rs, k_sH, dq_rH, input_precision=PRECISION)
  tl.store(dq_ptr + q_offsets, dq_rH * scale, mask=is_q)


@triton.jit
def band_backward_kv(
  q_ptr,
  k_ptr,
  v_ptr,
  pos_ptr,
  start_ptr,
  dout_ptr,
  lse_ptr,
  delta_ptr,
  dk_ptr,  # [B, S, K, H] float32
  dv_ptr,  # [B, S, K, H] float32
  scale: tl.constexpr,
  T: tl.constexpr,
  S: tl.constexpr,
  K: tl.constexpr,
  G: tl.constexpr,
  GP: tl.constexpr,
  H: tl.constexpr,
  HP: tl.constexpr,
  BLOCK: tl.constexpr,
  NUM_LOCAL: tl.constexpr,
  QUERIES: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """One key block; query t stands at slot pos[0] + t, so its queries are one run."""
  block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
  h, lane = tl.arange(0, HP), tl.arange(0, BLOCK)
  offset = tl.load(pos_ptr + batch * T)
  token = block * BLOCK + lane
  kv_offsets = ((batch * S + token) * K + head)[:, None] * H + h[None, :]
  is_kv = (token < S)[:, None] & (h < H)[None, :]
  k_sH = tl.load(k_ptr + kv_offsets, mask=is_kv, other=0.0)
  v_sH = tl.load(v_ptr + kv_offsets, mask=is_kv, other=0.0)
  row = tl.arange(0, QUERIES * GP)
  dk_sH = tl.zeros([BLOCK, HP], tl.float32)
  dv_sH = tl.zeros([BLOCK, HP], tl.float32)
  begin = tl.maximum(block * BLOCK - offset, 0)
  end = tl.minimum((block + NUM_LOCAL) * BLOCK - offset, T)
  for first in range(begin, end, QUERIES):
    t_r, g_r = first + row // GP, row % GP
    is_row = (t_r < end) & (g_r < G)
    q_row = (batch * T + t_r) * (K * G) + head * G + g_r
    q_offsets = q_row[:, None] * H + h[None, :]
    is_q = is_row[:, None] & (h < H)[None, :]
    q_rH = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
    dout_rH = tl.load(dout_ptr + q_offsets, mask=is_q, other=0.0)
    lse_r = tl.load(lse_ptr + q_row, mask=is_row, other=0.0)
    delta_r = tl.load(delta_ptr + q_row, mask=is_row, other=0.0)
    pos_r = tl.where(is_row, offset + t_r, -1)
    start_r = tl.load(start_ptr + batch * T + t_r, mask=is_row, other=NOWHERE)
    seen_sr = (token[:, None] <= pos_r[None, :]) & (token[:, None] >= start_r[None, :])
    dk_sH, dv_sH = _add_kv(
      q_rH, dout_rH, k_sH, v_sH, seen_sr, lse_r, delta_r, dk_sH, dv_sH, scale, PRECISION
    )
  tl.store(dk_ptr + kv_offsets, dk_sH * scale, mask=is_kv)
  tl.store(dv_ptr + kv_offsets, dv_sH, mask=is_kv)
