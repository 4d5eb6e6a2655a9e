"""Mosaic GPU kernels of block selection (infllm_v2.md sections 5 to 7, K1 and K2).

`block_scores`: the 64 rows of a wgmma are 64 queries of one head, and the heads of a group come one
after the other, so that the sum over the group is a sum of registers. Fine keys come phase by
phase (window i of 64 blocks is one tile), windows of the block before that reach into it included,
so that pooling is a maximum of whole tiles; a shared window's score is the same product in both
blocks. `choose`: one query a program, its block scores in registers; the cut by bisection on the
scores' bits (they are >= 0), ties to the lower block by bisection on the block. Mosaic has no
running count and no scatter, so the ids come out as successive minima.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu
from pallas_kernels.sparse_topk import rule as rules

FLOOR = -1e30  # below every real score
BLIND = 1e30  # normaliser of a row that sees no window: all its scores are 0
CLAMP = 115.0  # largest exponent (base 2), 80 in base e (section 5)
LOG2E = math.log2(math.e)
TILE = 64  # keys of a tile
FORCED = 2**31 - 1  # above the bits of every score
LANES = 128  # numbers of a row of registers of a warpgroup


def shared_bytes(group: int, head_dim: int, itemsize: int) -> int:
  """Of one program of `block_scores`: two tiles of queries and of keys, scores, rows' numbers."""
  tiles = 4 * TILE * head_dim * itemsize + TILE * TILE * 4
  return tiles + (group + 2) * 4 * mgpu.ROWS + 4096


def phases(rule: rules.Rule) -> range:
  """Windows that overlap block b, counted from its first: section 6."""
  return range(1 - rule.kernel_size // rule.kernel_stride, rule.block_size // rule.kernel_stride)


def _across(x_R, width: int):
  """[R, width] of a number a row."""
  return jax.lax.broadcast_in_dim(x_R, (x_R.shape[0], width), (0,))


def _scores_body(
  first_ref,  # [1] first tile of this launch
  begin_ref,  # [B, T / 64] first slot that a query of the tile may use
  last_ref,  # [B, T / 64] last position of the tile, -1 = padding only
  q_ref,  # [B, T, N, H]
  fine_ref,  # [B * phases, M, K, H]
  norm_ref,  # [B, C, K, H]
  pos_ref,  # [B, T]
  start_ref,  # [B, T]
  out_ref,  # [B * K, rows, M]
  q_smem,
  keys_smem,
  out_smem,
  lse_smem,
  pos_smem,
  start_smem,
  q_barriers,
  keys_barriers,
  row_barrier,
  *,
  rule: rules.Rule,
  num_fine,
  num_norm,
  scale,
  interpreted,
):
  tile, head = jax.lax.axis_index("tile"), jax.lax.axis_index("head")
  K, N = fine_ref.shape[2], q_ref.shape[2]
  group = N // K
  batch, k = jax.lax.div(head, K), jax.lax.rem(head, K)
  rows, shape = mgpu.ROWS, (mgpu.ROWS, TILE)
  place = first_ref[0] + tile
  t = place * rows  # a product, so that it is known to be a multiple where tiles are copied
  begin, last = begin_ref[batch, place], last_ref[batch, place]

  def fetch_rows(source, target):
    plgpu.copy_gmem_to_smem(source.at[batch, pl.ds(t, rows)], target, row_barrier)
    plgpu.barrier_wait(row_barrier)

  def fetch_q(g, slot):
    source = q_ref.at[batch, pl.ds(t, rows), k * group + g]
    plgpu.copy_gmem_to_smem(source, q_smem.at[slot], q_barriers.at[slot])

  fetch_rows(pos_ref, pos_smem)
  fetch_rows(start_ref, start_smem)
  as_rows = functools.partial(mgpu.as_rows, interpreted=interpreted)
  as_tile = functools.partial(mgpu.as_tile, interpreted=interpreted)
  pos, start = (_across(as_rows(x[...]), TILE) for x in (pos_smem, start_smem))
  lane = as_tile(jax.lax.broadcasted_iota(jnp.int32, shape, 1))

  def logits(q_slot, keys_slot):
    q, keys = q_smem.at[q_slot], keys_smem.at[keys_slot]
    return mgpu.dot_transposed(q, keys, interpreted) * (scale * LOG2E)

  # Normaliser: log-sum-exp (base 2) of every head over the visible windows of its level.
  level = 1 if rule.lse == "exact" else rules.COARSE
  stride, size = level * rule.kernel_stride, level * rule.kernel_size
  norm_begin = jax.lax.div(jax.lax.div(begin, stride), TILE)
  norm_end = jax.lax.div(jnp.maximum(last + (1 - size + stride), 0), stride)
  norm_end = jax.lax.div(jnp.minimum(norm_end, num_norm) + (TILE - 1), TILE)

  def normalise(g, nothing):
    def fetch(c):
      @pl.when(c < norm_end)
      def _():
        slot = jax.lax.rem(c, 2)
        source = norm_ref.at[batch, pl.ds(c * TILE, TILE), k]
        plgpu.copy_gmem_to_smem(source, keys_smem.at[slot], keys_barriers.at[slot])

    def step(c, carry):
      top_R, sum_R = carry
      slot = jax.lax.rem(c, 2)
      plgpu.barrier_wait(keys_barriers.at[slot])
      fetch(c + 1)
      window = lane + c * TILE
      x = window * stride
      seen = (x + (size - 1) <= pos) & (x >= start) & (window < num_norm)
      scores = jnp.where(seen, logits(0, slot), 2 * FLOOR)
      new_top_R = jnp.maximum(top_R, jnp.max(scores, axis=1))
      exps = jnp.exp2(scores - _across(new_top_R, TILE))
      return new_top_R, sum_R * jnp.exp2(top_R - new_top_R) + jnp.sum(exps, axis=1)

    fetch_q(g, 0)
    fetch(norm_begin)
    plgpu.barrier_wait(q_barriers.at[0])
    none = tuple(as_rows(jnp.full((rows,), x, jnp.float32)) for x in (FLOOR, 0.0))
    top_R, sum_R = jax.lax.fori_loop(norm_begin, norm_end, step, none)
    log_R = jnp.log(jnp.where(sum_R > 0, sum_R, 1.0)) * LOG2E
    lse_smem[g] = jnp.where(sum_R > 0, top_R + log_R, BLIND)
    return nothing

  jax.lax.fori_loop(0, group, normalise, None)

  # Scores of 64 blocks at a time, phase by phase; each phase is a pass over the heads.
  per_block, every = rule.block_size // rule.kernel_stride, phases(rule)
  blocks_begin = jax.lax.div(jax.lax.div(begin, rule.block_size), TILE)
  blocks_end = jnp.where(last < 0, 0, jax.lax.div(last, rule.block_size * TILE) + 1)

  def some_blocks(m, nothing):
    def fetch_keys(p):
      @pl.when(p < len(every))
      def _():
        slot = jax.lax.rem(p, 2)
        source = fine_ref.at[batch * len(every) + p, pl.ds(m * TILE, TILE), k]
        plgpu.copy_gmem_to_smem(source, keys_smem.at[slot], keys_barriers.at[slot])

    def one_phase(p, best):
      keys_slot = jax.lax.rem(p, 2)
      fetch_q(0, 0)
      plgpu.barrier_wait(keys_barriers.at[keys_slot])
      fetch_keys(p + 1)

      def one_head(g, total):
        slot = jax.lax.rem(g, 2)
        plgpu.barrier_wait(q_barriers.at[slot])

        @pl.when(g + 1 < group)
        def _():
          fetch_q(g + 1, 1 - slot)

        exponents = logits(slot, keys_slot) - _across(as_rows(lse_smem[g]), TILE)
        return total + jnp.exp2(jnp.minimum(exponents, CLAMP))

      total = jax.lax.fori_loop(0, group, one_head, as_tile(jnp.zeros(shape, jnp.float32)))
      window = (lane + m * TILE) * per_block + (p + every[0])
      x = window * rule.kernel_stride
      seen = (x + (rule.kernel_size - 1) <= pos) & (x >= start) & (window < num_fine)
      return jnp.maximum(best, jnp.where(seen, total, 0.0))

    fetch_keys(jnp.int32(0))
    zeros = as_tile(jnp.zeros(shape, jnp.float32))
    out_smem[...] = jax.lax.fori_loop(0, len(every), one_phase, zeros)
    plgpu.commit_smem()
    target = out_ref.at[head, pl.ds(tile * rows, rows), pl.ds(m * TILE, TILE)]
    plgpu.copy_smem_to_gmem(out_smem, target)
    plgpu.wait_smem_to_gmem(0)
    return nothing

  jax.lax.fori_loop(blocks_begin, blocks_end, some_blocks, None)


@mgpu.once("rule", "num_rows", "num_fine", "num_norm", "interpreted")
def block_scores(
  first_1,
  begin_Bt,
  last_Bt,
  q_BTNH,
  fine_EMKH,
  norm_BCKH,
  pos_BT,
  start_BT,
  *,
  rule,
  num_rows,
  num_fine,
  num_norm,
  interpreted,
):
  """[B * K, num_rows, M] float32 of the queries from tile `first_1` on.

  Blocks of the future of all of a tile's queries, and before its documents, are not written.
  """
  (B, _, N, H), (_, M, K, _) = q_BTNH.shape, fine_EMKH.shape
  dtype, rows = q_BTNH.dtype, mgpu.ROWS
  return plgpu.kernel(
    functools.partial(
      _scores_body,
      rule=rule,
      num_fine=num_fine,
      num_norm=num_norm,
      scale=H**-0.5,
      interpreted=interpreted,
    ),
    out_type=jax.ShapeDtypeStruct((B * K, num_rows, M), jnp.float32),
    scratch_types=[
      plgpu.SMEM((2, rows, H), dtype),
      plgpu.SMEM((2, TILE, H), dtype),
      plgpu.SMEM((rows, TILE), jnp.float32),
      plgpu.SMEM((N // K, rows), jnp.float32),
      plgpu.SMEM((rows,), jnp.int32),
      plgpu.SMEM((rows,), jnp.int32),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(),
    ],
    grid=(B * K, num_rows // rows),
    grid_names=("head", "tile"),
    kernel_name="sparse_topk_scores",
    **mgpu.options(interpreted),
  )(first_1, begin_Bt, last_Bt, q_BTNH, fine_EMKH, norm_BCKH, pos_BT, start_BT)


def _choose_body(first_ref, scores_ref, pos_ref, start_ref, ids_ref, *, rule: rules.Rule):
  i, head = jax.lax.axis_index("query"), jax.lax.axis_index("head")
  M, width = scores_ref.shape[2], ids_ref.shape[2]
  batch, t = (
    jax.lax.div(head, scores_ref.shape[0] // pos_ref.shape[0]),
    first_ref[0] * mgpu.ROWS + i,
  )
  pos, start = pos_ref[batch, t], start_ref[batch, t]
  first = jax.lax.div(start, rule.block_size)
  cur = jnp.where(pos >= start, jax.lax.div(pos, rule.block_size), -1)
  block = jax.lax.broadcasted_iota(jnp.int32, (M,), 0)

  def count(is_M):
    return jnp.sum(jnp.where(is_M, 1, 0))

  # Forced blocks come first whatever their score: the highest key. No candidate: the lowest.
  free_begin, free_end = first + rule.init_blocks, cur - rule.num_local
  num_candidates = jnp.maximum(cur - first + 1, 0)
  num_free = jnp.maximum(free_end - free_begin + 1, 0)
  if rule.selection == "joint":
    need = rule.num_selected - (num_candidates - num_free)
  else:
    need = rule.topk - jnp.minimum(num_candidates, rule.init_blocks)
  need = jnp.maximum(need, 0)
  bits = jax.lax.bitcast_convert_type(scores_ref[head, i], jnp.int32)
  bits = jnp.where((block >= free_begin) & (block <= free_end), bits, FORCED)
  keys = jnp.where((block >= first) & (block <= cur), bits, -1)
  num_forced = num_candidates - num_free

  def narrow(step, cut):  # the highest cut that `need` free blocks reach; 0 where there are fewer
    probe = cut | jax.lax.shift_left(jnp.int32(1), 30 - step)
    return jnp.where(count(keys >= probe) - num_forced >= need, probe, cut)

  cut = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
  cut = jnp.where(num_free > need, cut, 0)
  room = need - (count(keys > cut) - num_forced)
  num_bits = M.bit_length()

  def widen(step, limit):  # the highest limit with no more than `room` ties below it
    probe = limit | jax.lax.shift_left(jnp.int32(1), num_bits - 1 - step)
    return jnp.where(count((keys == cut) & (block < probe)) <= room, probe, limit)

  limit = jax.lax.fori_loop(0, num_bits, widen, jnp.int32(0))
  # A taken block is its own id, any other one M.
  ids_M = jnp.where((keys > cut) | ((keys == cut) & (block < limit)), block, M)
  place = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)

  def put(w, carry):
    last, ids = carry
    last = jnp.min(jnp.where(ids_M > last, ids_M, M))
    return last, jnp.where(place == w, last, ids)

  num_taken = jnp.minimum(count(ids_M < M), rule.num_selected)
  nothing = (jnp.int32(-1), jnp.full((width,), -1, jnp.int32))
  ids_ref[head, i] = jax.lax.fori_loop(0, num_taken, put, nothing)[1]


@mgpu.once("rule", "width", "interpreted")
def choose(first_1, scores_ErM, pos_BT, start_BT, *, rule, width, interpreted):
  """ids [B * K, rows, width] ascending, -1 = none, of `block_scores`; width a multiple of 128."""
  E, num_rows, _ = scores_ErM.shape
  return plgpu.kernel(
    functools.partial(_choose_body, rule=rule),
    out_type=jax.ShapeDtypeStruct((E, num_rows, width), jnp.int32),
    grid=(E, num_rows),
    grid_names=("head", "query"),
    kernel_name="sparse_topk_choose",
    **mgpu.options(interpreted),
  )(first_1, scores_ErM, pos_BT, start_BT)
