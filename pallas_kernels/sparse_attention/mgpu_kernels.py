"""Mosaic GPU kernel over lists of key blocks (infllm_v2.md 19.3), used by attention and decoding.

A warpgroup holds a few queries times the G heads of one key head, the 64 rows of a wgmma; a tile
is `warpgroups` of them, which share blocks that arrive by TMA in the model's layout, `num_stages`
in flight: a tile's list is the union of its queries' lists with one membership bit a query. A
warpgroup passes over blocks that none of its queries lists. One more warpgroup does nothing but
copy, so that the others drift apart as far as the buffers allow: it refills a buffer when all have
arrived at the buffer's barrier, which each does before it waits for its next block, so that the
slowest always gets one. Positions are compared only in blocks that hold a query's own position or
the first token of its document; members are a bias by row.
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
HIDDEN = -1e33  # of a slot that its row does not see, before the scale; far below FLOOR behind it
LOG2E = math.log2(math.e)
COPYING_REGISTERS = 32  # of a thread of the copying warpgroup


def shared_bytes(block: int, head_dim: int, num_stages: int, itemsize: int, warpgroups: int) -> int:
  """Of one program: queries, blocks of k and v in flight, numbers of the rows."""
  of_rows = warpgroups * mgpu.ROWS * (head_dim * itemsize + 3 * 4)
  return of_rows + 2 * num_stages * block * head_dim * itemsize + 4096


def rows_and_edges(pos_YCq, start_YCq, group: int):
  """(pos, start [Y, C, R] of the rows; lowest pos, highest start [Y, C] of the queries)."""
  is_query_YCq = pos_YCq >= 0
  low_YC = jnp.min(jnp.where(is_query_YCq, pos_YCq, rules.NOWHERE), axis=-1)
  high_YC = jnp.max(jnp.where(is_query_YCq, start_YCq, 0), axis=-1)

  def by_row(x_YCq, value: int):
    x_YCR = jnp.repeat(x_YCq, group, axis=-1)
    widths = ((0, 0), (0, 0), (0, mgpu.ROWS - x_YCR.shape[-1]))
    return jnp.pad(x_YCR, widths, constant_values=value)

  return by_row(pos_YCq, -1), by_row(start_YCq, rules.NOWHERE), low_YC, high_YC


def query_of_rows(own, queries: int, group: int, block: int, interpreted: bool):
  """[R] bit of the query that a row of warpgroup `own` belongs to."""
  row_Rs = jax.lax.broadcasted_iota(jnp.int32, (mgpu.ROWS, block), 0)
  row_Rs = mgpu.as_tile(row_Rs, interpreted)
  return jnp.max(jnp.minimum(jax.lax.div(row_Rs, group) + own * queries, 31), axis=1)


def member_bias(bits, query_R):
  """[R]: 0 where the row's query lists the block, else what hides all of the row."""
  is_member_R = (jax.lax.shift_right_logical(jnp.full_like(query_R, bits), query_R) & 1) == 1
  return jnp.where(is_member_R, 0.0, 2 * FLOOR)


def is_listed(bits, own, queries: int):
  """Whether a query of warpgroup `own` lists the block."""
  return (jax.lax.shift_right_logical(bits, own * queries) & ((1 << queries) - 1)) != 0


def hide(scores_Rs, first_spot, low, high, pos_ref, start_ref, interpreted: bool):
  """`HIDDEN` for slots of the future and of other documents; as they are where there is none.

  low, high: lowest position and highest start of the rows' queries.
  """
  shape = (_, block) = scores_Rs.shape

  def compare(scores_Rs):
    lane_Rs = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    lane_Rs = mgpu.as_tile(lane_Rs, interpreted)
    pos_R, start_R = (
      mgpu.as_rows(ref[...], interpreted) - first_spot for ref in (pos_ref, start_ref)
    )
    seen_Rs = (lane_Rs <= mgpu.across(pos_R, block)) & (lane_Rs >= mgpu.across(start_R, block))
    return jnp.where(seen_Rs, scores_Rs, HIDDEN)

  is_open = (first_spot + (block - 1) <= low) & (first_spot >= high)
  return jax.lax.cond(is_open, lambda x: x, compare, scores_Rs)


def tile_of_program(heads: int, Y: int):
  """(x, y, key head): one head's tiles after the other's, so that half of k and v is in use."""
  program = jax.lax.axis_index("tile")
  head, y = jax.lax.div(program, Y), jax.lax.rem(program, Y)
  return y * heads + head, y, head


def copy_ahead(begin, end, num_stages: int, free_barriers, copy):
  """The copying warpgroup's work: copy(j, slot) starts the copies of step j, begin <= j < end."""

  def step(j, slot):
    @pl.when(j - begin >= num_stages)
    def _():
      plgpu.barrier_wait(free_barriers.at[slot])

    copy(j, slot)
    return following(slot, num_stages)

  slot = jax.lax.fori_loop(begin, end, step, jnp.int32(0))
  # What nothing waited for yet: every arrival is seen, which spares the others a branch a step.
  num_left = jnp.clip(end - begin, 0, num_stages)

  def drain(_, slot):
    plgpu.barrier_wait(free_barriers.at[slot])
    return following(slot, num_stages)

  jax.lax.fori_loop(0, num_left, drain, jnp.where(num_left < num_stages, 0, slot))


def following(slot, num_stages: int):
  return jnp.where(slot == num_stages - 1, 0, slot + 1)


def share_registers(warpgroups: int, is_copying: bool, interpreted: bool) -> None:
  """Moves registers that copying does not need to the warpgroups that compute."""
  at_start = 512 // (warpgroups + 1) // 8 * 8  # a thread's, of 64 Ki
  if warpgroups == 1 or interpreted:  # has as many as a thread can name
    return
  if is_copying:
    plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
  else:
    left = (at_start * (warpgroups + 1) - COPYING_REGISTERS) // warpgroups
    plgpu.set_max_registers(left // 8 * 8, action="increase")


def _body(
  ids_ref,  # [X, U] block on the row's grid
  bits_ref,  # [X, U] bit t: the tile's query t lists the block
  counts_ref,  # [X]
  first_ref,  # [X] place of the row's block 0 in k and v, or in the table
  table_ref,  # [P] place of each block in k and v (`is_paged`)
  q_ref,  # [X, C, R, H], C warpgroups, or [B, T, K, G, H]
  k_ref,  # [P, s, K, H]
  v_ref,
  pos_ref,  # [Y, C, R], Y = X / K
  start_ref,
  low_ref,  # [Y, C] lowest position of a warpgroup's queries
  high_ref,  # [Y, C] highest start
  out_ref,  # [X, splits, C, R, H], or as q
  lse_ref,  # [X, splits, C, R] base e
  q_smem,
  k_smem,
  v_smem,
  lse_smem,
  pos_smem,
  start_smem,
  row_barriers,
  barriers,
  free_barriers,
  *,
  group,
  queries,
  scale,
  splits,
  num_stages,
  is_paged,
  is_in_place,
  interpreted,
):
  split, own = jax.lax.axis_index("split"), jax.lax.axis_index("warpgroup")
  _, block, heads, head_dim = k_ref.shape
  rows, warpgroups = mgpu.ROWS, q_smem.shape[0]
  x, y, head = tile_of_program(heads, Y := pos_ref.shape[0])
  count, first = counts_ref[x], first_ref[x]
  share = jax.lax.div(count + (splits - 1), splits)
  begin = split * share
  end = jnp.minimum(begin + share, count)

  def places():
    """(row of the batch, query, whether it is one, its rows) of each query of the warpgroup."""
    B, T = q_ref.shape[:2]
    b, tile = jax.lax.div(y, Y // B), jax.lax.rem(y, Y // B)
    for i in range(queries):
      t = (tile * warpgroups + own) * queries + i
      yield b, jnp.minimum(t, T - 1), t < T, pl.ds(i * group, group)

  @pl.when(own == warpgroups)
  def _():
    share_registers(warpgroups, True, interpreted)

    def copy(j, slot):
      place = first + ids_ref[x, j]
      if is_paged:
        place = table_ref[place]
      plgpu.copy_gmem_to_smem(k_ref.at[place, :, head], k_smem.at[slot], barriers.at[slot])
      plgpu.copy_gmem_to_smem(v_ref.at[place, :, head], v_smem.at[slot], barriers.at[slot])

    copy_ahead(begin, end, num_stages, free_barriers, copy)

  @pl.when(own < warpgroups)
  def _():
    share_registers(warpgroups, False, interpreted)
    copies = [(pos_ref.at[y, own], pos_smem.at[own]), (start_ref.at[y, own], start_smem.at[own])]
    if is_in_place:
      copies += [(q_ref.at[b, t, head], q_smem.at[own, at]) for b, t, _, at in places()]
    else:
      copies.append((q_ref.at[x, own], q_smem.at[own]))
    for source, target in copies:
      plgpu.copy_gmem_to_smem(source, target, row_barriers.at[own])
    plgpu.barrier_wait(row_barriers.at[own])
    of_rows = (low_ref[y, own], high_ref[y, own], pos_smem.at[own], start_smem.at[own])
    query_R = query_of_rows(own, queries, group, block, interpreted)

    def step(j, carry):
      slot, bits, *carry = carry
      next_bits = bits_ref[x, jnp.minimum(j + 1, end - 1)]

      def attend(top_R, sum_R, acc_RH):
        scores_Rs = mgpu.dot_transposed(q_smem.at[own], k_smem.at[slot], interpreted)
        scores_Rs = hide(scores_Rs, ids_ref[x, j] * block, *of_rows, interpreted)
        bias_R = member_bias(bits, query_R)
        new_top_R = jnp.maximum(top_R, jnp.max(scores_Rs, axis=1) * (scale * LOG2E) + bias_R)
        probs_Rs = jnp.exp2(scores_Rs * (scale * LOG2E) + mgpu.across(bias_R - new_top_R, block))
        shrink_R = jnp.exp2(top_R - new_top_R)
        sum_R = sum_R * shrink_R + jnp.sum(probs_Rs, axis=1)
        acc_RH = mgpu.values_dot_add(
          acc_RH * mgpu.across(shrink_R, head_dim),
          probs_Rs.astype(v_smem.dtype),
          v_smem.at[slot],
          interpreted,
        )
        return new_top_R, sum_R, acc_RH

      plgpu.barrier_wait(barriers.at[slot])
      carry = jax.lax.cond(is_listed(bits, own, queries), attend, lambda *x: x, *carry)
      plgpu.barrier_arrive(free_barriers.at[slot])
      return following(slot, num_stages), next_bits, *carry

    nothing = (
      jnp.int32(0),
      bits_ref[x, jnp.minimum(begin, bits_ref.shape[1] - 1)],
      mgpu.as_rows(jnp.full((rows,), FLOOR, jnp.float32), interpreted),
      mgpu.as_rows(jnp.zeros((rows,), jnp.float32), interpreted),
      mgpu.as_tile(jnp.zeros((rows, head_dim), jnp.float32), interpreted),
    )
    _, _, top_R, sum_R, acc_RH = jax.lax.fori_loop(begin, end, step, nothing)
    safe_R = jnp.where(sum_R > 0, sum_R, 1.0)
    out_RH = (acc_RH / mgpu.across(safe_R, head_dim)).astype(out_ref.dtype)
    lse_smem[own] = jnp.where(sum_R > 0, top_R * (1 / LOG2E) + jnp.log(safe_R), -jnp.inf)
    if is_in_place:
      q_smem[own] = out_RH
    else:
      mgpu.store(out_ref, (x, split, own), out_RH, interpreted)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_smem.at[own], lse_ref.at[x, split, own])
    if is_in_place:
      for b, t, is_query, at in places():

        @pl.when(is_query)
        def _(b=b, t=t, at=at):
          plgpu.copy_smem_to_gmem(q_smem.at[own, at], out_ref.at[b, t, head])

    plgpu.wait_smem_to_gmem(0)


@mgpu.once("group", "scale", "splits", "num_stages", "out_dtype", "interpreted")
def forward(
  lists,
  table_P,
  q,
  k_PsKH,
  v_PsKH,
  pos_YCq,
  start_YCq,
  *,
  group,
  scale,
  splits,
  num_stages,
  out_dtype,
  interpreted,
):
  """(out as q, lse [X, splits, C, R] float32), normalised within each split.

  q: in place [B, T, K, G, H] (one split, G a multiple of 8, out of its type), or in tiles
  [X, C, R, H], whose out is [X, splits, C, R, H].
  lists: (ids, bits [X, U], counts, first [X]) int32. X = Y * K tiles, the key head fastest.
  pos, start: of each warpgroup's queries; a query that is none: position -1, start NOWHERE.
  table_P: place of block first + id in k and v; None = that block itself.
  """
  (X,), (_, C, queries), R, H = lists[2].shape, pos_YCq.shape, mgpu.ROWS, q.shape[-1]
  block, dtype, is_in_place = k_PsKH.shape[1], q.dtype, q.ndim == 5
  sizes = dict(
    group=group,
    queries=queries,
    scale=scale,
    splits=splits,
    num_stages=num_stages,
    is_paged=table_P is not None,
    is_in_place=is_in_place,
    interpreted=interpreted,
  )
  return plgpu.kernel(
    functools.partial(_body, **sizes),
    out_type=(
      jax.ShapeDtypeStruct(q.shape if is_in_place else (X, splits, C, R, H), out_dtype),
      jax.ShapeDtypeStruct((X, splits, C, R), jnp.float32),
    ),
    scratch_types=[
      plgpu.SMEM((C, R, H), dtype),
      plgpu.SMEM((num_stages, block, H), dtype),
      plgpu.SMEM((num_stages, block, H), dtype),
      plgpu.SMEM((C, R), jnp.float32),
      plgpu.SMEM((C, R), jnp.int32),
      plgpu.SMEM((C, R), jnp.int32),
      plgpu.Barrier(num_arrivals=2 + (queries if is_in_place else 1), num_barriers=C),
      plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
      plgpu.Barrier(num_arrivals=C, num_barriers=num_stages),
    ],
    grid=(splits, X),
    grid_names=("split", "tile"),
    num_threads=C + 1,  # the last one copies
    thread_name="warpgroup",
    kernel_name="sparse_attention_forward",
    **mgpu.options(interpreted),
  )(
    *lists,
    lists[3] if table_P is None else table_P,
    q,
    k_PsKH,
    v_PsKH,
    *rows_and_edges(pos_YCq, start_YCq, group),
  )
