"""Mosaic GPU kernels of block selection (infllm_v2.md sections 5 to 7, K1 and K2).

`block_scores`: the 64 rows of a wgmma are 64 queries of one head, and the heads of a group come one
after the other over the same keys, so that the sum over the group is a sum of registers. The keys
of a tile are the windows of 64 blocks, phase by phase (window i of every block), so that pooling is
a maximum of whole tiles; they stay in shared memory for all heads, whose queries stream from L2
once a tile. A window that reaches into the next block goes to a second output, and the choice takes
its maximum with the block behind it: the same number for both blocks. Two warpgroups of a program
share the keys and multiply in turns, so that one exponentiates meanwhile.

`choose`: one query a program, its block scores in registers; the cut by steps down from the best
score, then bisection on the scores' bits (they are >= 0), ties to the lower block by bisection on
the block. Mosaic has no running count and no scatter, so the ids that are not forced come out as
successive minima.
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
TILE = 64  # blocks of a tile of scores
LANES = 128  # numbers of a row of registers of a warpgroup
EDGE = LANES  # columns before block 0 of the second output, so that it can be read one earlier


def key_tiles(rule: rules.Rule) -> tuple[int, int]:
  """(products a head and tile, keys of one): 128 keys of two phases where they are even."""
  per_block = rule.block_size // rule.kernel_stride
  return (per_block // 2, 2 * TILE) if per_block % 2 == 0 else (per_block, TILE)


def shared_bytes(
  rule: rules.Rule, group: int, head_dim: int, itemsize: int, warpgroups: int
) -> int:
  """Of one program of `block_scores`: queries of two heads, a tile of keys, numbers of the rows."""
  parts, width = key_tiles(rule)
  queries = warpgroups * mgpu.ROWS * (2 * head_dim * itemsize + (2 * group + 2) * 4)
  return queries + parts * width * head_dim * itemsize + 2048


def _scores_body(
  first_ref,  # [1] first 64 queries of this launch
  begin_ref,  # [B, tiles] first slot that a query of the tile may use
  last_ref,  # [B, tiles] last position of the tile, -1 = padding only
  full_ref,  # [B, tiles, 2] windows of the normaliser that all its queries see, from and to
  q_ref,  # [B, T, N, H]
  fine_ref,  # [B * parts, M * width / 64, K, H]
  norm_ref,  # [B, C, K, H]
  pos_ref,  # [B, T]
  start_ref,  # [B, T]
  out_ref,  # [B * K, rows, M] best score of the windows that start in the block
  right_ref,  # [B * K, rows, EDGE + M] of those that reach into the next block
  q_smem,
  keys_smem,
  top_smem,
  sum_smem,
  pos_smem,
  start_smem,
  q_barriers,
  keys_barriers,
  row_barriers,
  turn_barriers,
  *,
  rule: rules.Rule,
  num_fine,
  num_norm,
  scale,
  interpreted,
):
  tile, head, own = (jax.lax.axis_index(name) for name in ("tile", "head", "warpgroup"))
  warpgroups = pos_smem.shape[0]
  tile = out_ref.shape[1] // (warpgroups * mgpu.ROWS) - 1 - tile  # the longest first
  K, N = fine_ref.shape[2], q_ref.shape[2]
  group = N // K
  batch, k = jax.lax.div(head, K), jax.lax.rem(head, K)
  rows = mgpu.ROWS
  parts, width, _ = keys_smem.shape
  place = jax.lax.div(first_ref[0], warpgroups) + tile
  t = (
    place * warpgroups + own
  ) * rows  # a product, so that it is known to be a multiple where tiles are copied
  begin, last = begin_ref[batch, place], last_ref[batch, place]
  as_rows = functools.partial(mgpu.as_rows, interpreted=interpreted)
  as_tile = functools.partial(mgpu.as_tile, interpreted=interpreted)

  is_last = own == warpgroups - 1
  pos_smem, start_smem = pos_smem.at[own], start_smem.at[own]

  def fetch_rows(source, target):
    plgpu.copy_gmem_to_smem(source.at[batch, pl.ds(t, rows)], target, row_barriers.at[own])
    plgpu.barrier_wait(row_barriers.at[own])

  fetch_rows(pos_ref, pos_smem)
  fetch_rows(start_ref, start_smem)

  def sweep(first, end, keys_of, start, step, finish):
    """All heads over tile after tile of keys: step(c, g, part, logits, carry), then finish."""
    num_steps = (end - first) * group

    def fetch_q(j):
      @pl.when(j < num_steps)
      def _():
        source = q_ref.at[batch, pl.ds(t, rows), k * group + jax.lax.rem(j, group)]
        slot = 2 * own + jax.lax.rem(j, 2)
        plgpu.copy_gmem_to_smem(source, q_smem.at[slot], q_barriers.at[slot])

    def fetch_keys(c, part):
      @pl.when(is_last & (c < end))
      def _():
        plgpu.copy_gmem_to_smem(keys_of(c, part), keys_smem.at[part], keys_barriers.at[part])

    def one_tile(c, nothing):
      def one_head(g, carry):
        j = (c - first) * group + g
        slot = 2 * own + jax.lax.rem(j, 2)
        plgpu.barrier_wait(q_barriers.at[slot])
        for part in range(parts):

          @pl.when(g == 0)
          def _(part=part):
            plgpu.barrier_wait(keys_barriers.at[part])

          if warpgroups > 1:  # one multiplies while the other exponentiates
            plgpu.barrier_wait(turn_barriers.at[own])
          logits = mgpu.dot_transposed(q_smem.at[slot], keys_smem.at[part], interpreted)
          if warpgroups > 1:
            plgpu.barrier_arrive(turn_barriers.at[1 - own])

          @pl.when(g == group - 1)
          def _(part=part):
            fetch_keys(c + 1, part)

          if part == parts - 1:
            fetch_q(j + 2)
          carry = step(c, g, part, logits, carry)
        return carry

      finish(c, jax.lax.fori_loop(0, group, one_head, start()))
      return nothing

    for part in range(parts):
      fetch_keys(first, part)  # the last warpgroup to multiply fetches: the others have read
    fetch_q(0)
    fetch_q(1)
    jax.lax.fori_loop(first, end, one_tile, None)

  def among(x_Rn, begin_R, end_R, other):
    """x in columns [begin, end) of each row, `other` outside."""
    lane = as_tile(jax.lax.broadcasted_iota(jnp.int32, x_Rn.shape, 1))
    n = x_Rn.shape[1]
    return jnp.where(
      (lane >= mgpu.across(begin_R, n)) & (lane < mgpu.across(end_R, n)), x_Rn, other
    )

  # Normaliser: log-sum-exp (base 2) of every head over the visible windows of its level.
  level = 1 if rule.lse == "exact" else rules.COARSE
  stride, size = level * rule.kernel_stride, level * rule.kernel_size
  norm_tile = parts * width
  norm_begin = jax.lax.div(jax.lax.div(begin, stride), norm_tile)
  norm_end = jax.lax.div(jnp.maximum(last + (1 - size + stride), 0), stride)
  norm_end = jax.lax.div(jnp.minimum(norm_end, num_norm) + (norm_tile - 1), norm_tile)
  full_begin, full_end = full_ref[batch, place, 0], full_ref[batch, place, 1]

  first_row = own * group  # of the warpgroup's heads in top_smem and sum_smem

  def nothing_summed(g, nothing):
    top_smem[g] = as_rows(jnp.full((rows,), FLOOR, jnp.float32))
    sum_smem[g] = as_rows(jnp.zeros((rows,), jnp.float32))
    return nothing

  jax.lax.fori_loop(first_row, first_row + group, nothing_summed, None)
  plgpu.commit_smem()

  def norm_keys(c, part):
    return norm_ref.at[batch, pl.ds((c * parts + part) * width, width), k]

  def add_exps(c, g, part, logits, nothing):
    window = (c * parts + part) * width

    def mask(logits):
      pos_R, start_R = as_rows(pos_smem[...]), as_rows(start_smem[...])
      end_R = jax.lax.div(jnp.maximum(pos_R + (1 - size + stride), 0), stride)
      begin_R = jax.lax.div(start_R + (stride - 1), stride)
      return among(logits, begin_R - window, jnp.minimum(end_R, num_norm) - window, 2 * FLOOR)

    is_full = (window >= full_begin) & (window + width <= full_end)
    logits = jax.lax.cond(is_full, lambda x: x, mask, logits)
    at = first_row + g
    top_R = as_rows(top_smem[at])
    new_top_R = jnp.maximum(top_R, jnp.max(logits, axis=1) * (scale * LOG2E))
    exps = jnp.exp2(logits * (scale * LOG2E) - mgpu.across(new_top_R, width))
    sum_smem[at] = as_rows(sum_smem[at]) * jnp.exp2(top_R - new_top_R) + jnp.sum(exps, axis=1)
    top_smem[at] = new_top_R
    return nothing

  if warpgroups > 1:

    @pl.when(is_last)
    def _():
      plgpu.barrier_arrive(turn_barriers.at[0])

  sweep(norm_begin, norm_end, norm_keys, lambda: None, add_exps, lambda c, nothing: None)

  def finish_norm(g, nothing):
    sum_R = as_rows(sum_smem[g])
    log_R = jnp.log(jnp.where(sum_R > 0, sum_R, 1.0)) * LOG2E
    top_smem[g] = jnp.where(sum_R > 0, as_rows(top_smem[g]) + log_R, BLIND)
    return nothing

  jax.lax.fori_loop(first_row, first_row + group, finish_norm, None)
  plgpu.commit_smem()

  # Scores of 64 blocks at a time.
  per_block = rule.block_size // rule.kernel_stride
  blocks_begin = jax.lax.div(jax.lax.div(begin, rule.block_size), TILE)
  blocks_end = jnp.where(last < 0, 0, jax.lax.div(last, rule.block_size * TILE) + 1)

  def fine_keys(m, part):
    return fine_ref.at[batch * parts + part, pl.ds(m * width, width), k]

  def no_scores():
    return tuple(as_tile(jnp.zeros((rows, width), jnp.float32)) for _ in range(parts))

  def add_scores(m, g, part, logits, totals):
    exponents = logits * (scale * LOG2E) - mgpu.across(as_rows(top_smem[first_row + g]), width)
    total = totals[part] + jnp.exp2(jnp.minimum(exponents, CLAMP))
    return tuple(total if i == part else x for i, x in enumerate(totals))

  def pool(m, totals):
    begin_R = jax.lax.div(as_rows(start_smem[...]), rule.block_size) - m * TILE
    pos_R = as_rows(pos_smem[...])
    best = right = as_tile(jnp.zeros((rows, TILE), jnp.float32))
    for i in range(per_block):  # the blocks whose window i the row sees
      past = rule.block_size + 1 - rule.kernel_size - i * rule.kernel_stride
      end_R = jax.lax.div(jnp.maximum(pos_R + past, 0), rule.block_size)
      end_R = jnp.minimum(end_R, -(-(num_fine - i) // per_block)) - m * TILE
      part, place = divmod(i * TILE, width)
      scores = among(totals[part][:, place : place + TILE], begin_R, end_R, 0.0)
      best = jnp.maximum(best, scores)
      if i * rule.kernel_stride + rule.kernel_size > rule.block_size:
        right = jnp.maximum(right, scores)
    to = pl.ds((tile * warpgroups + own) * rows, rows)
    out_ref[head, to, pl.ds(m * TILE, TILE)] = best
    right_ref[head, to, pl.ds(EDGE + m * TILE, TILE)] = right

  sweep(blocks_begin, blocks_end, fine_keys, no_scores, add_scores, pool)
  if warpgroups > 1:

    @pl.when(own == 0)
    def _():
      plgpu.barrier_wait(turn_barriers.at[0])


@mgpu.once("rule", "num_rows", "num_blocks", "num_fine", "num_norm", "warpgroups", "interpreted")
def block_scores(
  first_1,
  begin_Bt,
  last_Bt,
  full_Bt2,
  q_BTNH,
  fine_EMKH,
  norm_BCKH,
  pos_BT,
  start_BT,
  *,
  rule,
  num_rows,
  num_blocks,
  num_fine,
  num_norm,
  warpgroups,
  interpreted,
):
  """Of the queries from tile `first_1` on, float32: scores [B * K, num_rows, M] of the windows that
  start in a block, and [B * K, num_rows, EDGE + M] of those that reach into the next.

  Blocks of the future of all of a tile's queries, and before its documents, are not written.
  """
  (B, _, N, H), K = q_BTNH.shape, fine_EMKH.shape[2]
  dtype, rows = q_BTNH.dtype, mgpu.ROWS
  parts, width = key_tiles(rule)
  return plgpu.kernel(
    functools.partial(
      _scores_body,
      rule=rule,
      num_fine=num_fine,
      num_norm=num_norm,
      scale=H**-0.5,
      interpreted=interpreted,
    ),
    out_type=tuple(
      jax.ShapeDtypeStruct((B * K, num_rows, n), jnp.float32)
      for n in (num_blocks, EDGE + num_blocks)
    ),
    scratch_types=[
      plgpu.SMEM((2 * warpgroups, rows, H), dtype),
      plgpu.SMEM((parts, width, H), dtype),
      plgpu.SMEM((warpgroups * N // K, rows), jnp.float32),
      plgpu.SMEM((warpgroups * N // K, rows), jnp.float32),
      plgpu.SMEM((warpgroups, rows), jnp.int32),
      plgpu.SMEM((warpgroups, rows), jnp.int32),
      plgpu.Barrier(num_barriers=2 * warpgroups),
      plgpu.Barrier(num_barriers=parts),
      plgpu.Barrier(num_barriers=warpgroups),
      plgpu.Barrier(num_barriers=warpgroups),
    ],
    grid=(B * K, num_rows // (warpgroups * rows)),
    grid_names=("head", "tile"),
    num_threads=warpgroups,
    thread_name="warpgroup",
    kernel_name="sparse_topk_scores",
    **mgpu.options(interpreted),
  )(first_1, begin_Bt, last_Bt, full_Bt2, q_BTNH, fine_EMKH, norm_BCKH, pos_BT, start_BT)


def _choose_body(
  first_ref, scores_ref, right_ref, pos_ref, start_ref, ids_ref, *, rule: rules.Rule, interpreted
):
  i, head = jax.lax.axis_index("query"), jax.lax.axis_index("head")
  M, width = scores_ref.shape[2], ids_ref.shape[2]
  batch, t = (
    jax.lax.div(head, scores_ref.shape[0] // pos_ref.shape[0]),
    first_ref[0] * mgpu.ROWS + i,
  )
  pos, start = pos_ref[batch, t], start_ref[batch, t]
  # In order: initial blocks, free ones [begin, end), local ones.
  first = jax.lax.div(start, rule.block_size)
  num_blocks = jnp.where(pos >= start, jax.lax.div(pos, rule.block_size) + 1 - first, 0)
  num_init = jnp.minimum(num_blocks, rule.init_blocks)
  num_local = jnp.minimum(num_blocks - num_init, rule.num_local)
  num_forced = num_init + num_local
  begin, end = first + num_init, first + num_blocks - num_local
  budget = rule.num_selected - num_forced if rule.selection == "joint" else rule.topk - num_init
  need = jnp.maximum(budget, 0)
  num_free = jnp.minimum(end - begin, need)
  num_taken = jnp.minimum(num_forced + num_free, rule.num_selected)
  num_chosen = jnp.where(end - begin > need, need, 0)  # else all are taken, a run of blocks

  place = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)
  ids = jnp.where(place < num_init + num_free, first + place, end + place - num_init - num_free)
  ids = jnp.where(place < num_taken, ids, -1)

  def choose_free(ids):
    block = mgpu.as_line(jax.lax.broadcasted_iota(jnp.int32, (M,), 0), interpreted)
    scores = mgpu.load_line(scores_ref, (head, i, pl.ds(0, M)), interpreted)
    before = mgpu.load_line(right_ref, (head, i, pl.ds(EDGE - 1, M)), interpreted)
    scores = jnp.maximum(scores, jnp.where(block > first, before, 0.0))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where((block >= begin) & (block < end), bits, -1)

    def count(low):
      return jnp.sum(jnp.where(bits >= low, 1, 0))

    # `low` is reached by num >= need blocks, `high` by fewer.
    def descend(carry):
      low, _, _, step = carry
      lower = jnp.maximum(low - step, 0)
      return lower, low, count(lower), step + step

    def halve(carry):
      low, high, num = carry
      middle = low + jax.lax.div(high - low, 2)
      reach = count(middle)
      is_low = reach >= need
      return (
        jnp.where(is_low, middle, low),
        jnp.where(is_low, high, middle),
        jnp.where(is_low, reach, num),
      )

    top = jnp.max(bits)
    low, high, num, _ = jax.lax.while_loop(
      lambda x: (x[2] < need) & (x[0] > 0),
      descend,
      (top, top + 1, count(top), jnp.int32(1 << 22)),  # 2**23 halves a score
    )
    low, high, num = jax.lax.while_loop(
      lambda x: (x[2] > need) & (x[1] - x[0] > 1), halve, (low, high, num)
    )
    # Of blocks that score `low` the lower ones: the highest limit with no more below it than fit.
    room = need - count(low + 1)
    num_bits = M.bit_length()

    def widen(step, limit):
      probe = limit | jax.lax.shift_left(jnp.int32(1), num_bits - 1 - step)
      ties = jnp.sum(jnp.where((bits == low) & (block < probe), 1, 0))
      return jnp.where(ties <= room, probe, limit)

    limit = jax.lax.fori_loop(0, jnp.where(num > need, num_bits, 0), widen, jnp.int32(0))
    limit = jnp.where(num > need, limit, M)
    # A taken block is its own id, any other one M.
    own_ids = jnp.where((bits > low) | ((bits == low) & (block < limit)), block, M)

    def put(w, carry):
      latest, ids = carry
      latest = jnp.min(jnp.where(own_ids > latest, own_ids, M))
      return latest, jnp.where(place == w, latest, ids)

    return jax.lax.fori_loop(num_init, num_init + need, put, (jnp.int32(-1), ids))[1]

  ids_ref[head, i] = jax.lax.cond(num_chosen > 0, choose_free, lambda ids: ids, ids)


@mgpu.once("rule", "width", "interpreted")
def choose(first_1, scores_ErM, right_ErM, pos_BT, start_BT, *, rule, width, interpreted):
  """ids [B * K, rows, width] ascending, -1 = none, of `block_scores`; width a multiple of 128."""
  E, num_rows, _ = scores_ErM.shape
  return plgpu.kernel(
    functools.partial(_choose_body, rule=rule, interpreted=interpreted),
    out_type=jax.ShapeDtypeStruct((E, num_rows, width), jnp.int32),
    grid=(E, num_rows),
    grid_names=("head", "query"),
    kernel_name="sparse_topk_choose",
    **mgpu.options(interpreted),
  )(first_1, scores_ErM, right_ErM, pos_BT, start_BT)
