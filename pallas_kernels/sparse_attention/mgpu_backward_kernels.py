"""Mosaic GPU kernels of the backward pass (infllm_v2.md section 11; K4 of 19.2).

`backward_q` goes over tiles and lists as the forward kernel does. `backward_kv` is one run of the
inverse lists: 64 keys of a block stay in shared memory, and the rows that listed the block come 64
at a time, as units of fewer queries than a tile (a unit whose block only one query listed wastes
the rows of the others, so that small units waste little). `sum_runs` adds the runs of a block in
order. Nothing is added atomically.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu
from pallas_kernels.sparse_attention.mgpu_kernels import (
  LOG2E,
  copy_ahead,
  following,
  hide,
  is_listed,
  member_bias,
  query_of_rows,
  rows_and_edges,
  share_registers,
  tile_of_program,
)

ROWS = mgpu.ROWS
NOTHING = 1e30  # log-sum-exp of a row that sees nothing: its probabilities are 0
NUMBERS = 4  # of a row: position, start, log-sum-exp, delta


def shared_bytes_q(
  block: int, head_dim: int, num_stages: int, itemsize: int, warpgroups: int
) -> int:
  """Of one program: q, dout, blocks of k and v in flight, numbers of the rows."""
  of_rows = warpgroups * ROWS * (2 * head_dim * itemsize + NUMBERS * 4)
  return of_rows + 2 * num_stages * block * head_dim * itemsize + 4096


def shared_bytes_kv(head_dim: int, num_stages: int, itemsize: int) -> int:
  """Of one program: k, v, rows of q and dout and their numbers in flight."""
  tiles = 2 * ROWS * head_dim * itemsize
  return tiles + num_stages * (2 * ROWS * head_dim * itemsize + NUMBERS * 4 * ROWS) + 4096


def _q_body(
  ids_ref,  # [X, U] block on the row's grid
  bits_ref,  # [X, U] bit t: the tile's query t lists the block
  counts_ref,  # [X]
  first_ref,  # [X] place of the row's block 0 in k and v
  q_ref,  # [X, C, R, H], C warpgroups
  dout_ref,
  k_ref,  # [P, s, K, H]
  v_ref,
  pos_ref,  # [Y, C, R], Y = X / K
  start_ref,
  low_ref,  # [Y, C] lowest position of a warpgroup's queries
  high_ref,  # [Y, C] highest start
  lse_ref,  # [X, C, R] base 2
  delta_ref,
  dq_ref,  # [X, C, R, H]
  q_smem,
  dout_smem,
  k_smem,
  v_smem,
  pos_smem,
  start_smem,
  lse_smem,
  delta_smem,
  row_barriers,
  barriers,
  free_barriers,
  *,
  group,
  queries,
  scale,
  num_stages,
  interpreted,
):
  own, warpgroups = jax.lax.axis_index("warpgroup"), q_smem.shape[0]
  _, block, heads, head_dim = k_ref.shape
  x, y, head = tile_of_program(heads, pos_ref.shape[0])
  count, first = counts_ref[x], first_ref[x]

  @pl.when(own == warpgroups)
  def _():
    share_registers(warpgroups, True, interpreted)

    def copy(j, slot):
      place = first + ids_ref[x, j]
      plgpu.copy_gmem_to_smem(k_ref.at[place, :, head], k_smem.at[slot], barriers.at[slot])
      plgpu.copy_gmem_to_smem(v_ref.at[place, :, head], v_smem.at[slot], barriers.at[slot])

    copy_ahead(0, count, num_stages, free_barriers, copy)

  @pl.when(own < warpgroups)
  def _():
    share_registers(warpgroups, False, interpreted)
    for source, target in (
      (q_ref.at[x, own], q_smem),
      (dout_ref.at[x, own], dout_smem),
      (pos_ref.at[y, own], pos_smem),
      (start_ref.at[y, own], start_smem),
      (lse_ref.at[x, own], lse_smem),
      (delta_ref.at[x, own], delta_smem),
    ):
      plgpu.copy_gmem_to_smem(source, target.at[own], row_barriers.at[own])
    plgpu.barrier_wait(row_barriers.at[own])
    of_rows = (low_ref[y, own], high_ref[y, own], pos_smem.at[own], start_smem.at[own])
    query_R = query_of_rows(own, queries, group, block, interpreted)
    lse_R, delta_R = (mgpu.as_rows(ref[own], interpreted) for ref in (lse_smem, delta_smem))
    delta_Rs = mgpu.across(delta_R, block)

    def step(j, carry):
      slot, acc_RH = carry
      bits = bits_ref[x, j]

      def add(acc_RH):
        scores_Rs = mgpu.dot_transposed(q_smem.at[own], k_smem.at[slot], interpreted)
        scores_Rs = hide(scores_Rs, ids_ref[x, j] * block, *of_rows, interpreted)
        bias_Rs = mgpu.across(member_bias(bits, query_R) - lse_R, block)
        probs_Rs = jnp.exp2(scores_Rs * (scale * LOG2E) + bias_Rs)
        dprobs_Rs = mgpu.dot_transposed(dout_smem.at[own], v_smem.at[slot], interpreted)
        dscores_Rs = (probs_Rs * (dprobs_Rs - delta_Rs)).astype(k_smem.dtype)
        return mgpu.values_dot_add(acc_RH, dscores_Rs, k_smem.at[slot], interpreted)

      plgpu.barrier_wait(barriers.at[slot])
      acc_RH = jax.lax.cond(is_listed(bits, own, queries), add, lambda acc_RH: acc_RH, acc_RH)
      plgpu.barrier_arrive(free_barriers.at[slot])
      return following(slot, num_stages), acc_RH

    nothing = mgpu.as_tile(jnp.zeros((ROWS, head_dim), jnp.float32), interpreted)
    _, acc_RH = jax.lax.fori_loop(0, count, step, (jnp.int32(0), nothing))
    mgpu.store(dq_ref, (x, own), (acc_RH * scale).astype(dq_ref.dtype), interpreted)


def backward_q(
  lists,
  q_XCRH,
  dout_XCRH,
  k_PsKH,
  v_PsKH,
  pos_YCq,
  start_YCq,
  lse_XCR,
  delta_XCR,
  *,
  group,
  scale,
  num_stages,
  interpreted,
):
  """dq [X, C, R, H]. lists, pos, start: of `mgpu_kernels.forward`; lse_XCR in base 2, `NOTHING` =
  sees nothing."""
  X, C, R, H = q_XCRH.shape
  block, dtype, queries = k_PsKH.shape[1], q_XCRH.dtype, pos_YCq.shape[-1]
  sizes = dict(group=group, queries=queries, scale=scale, num_stages=num_stages)
  return plgpu.kernel(
    functools.partial(_q_body, interpreted=interpreted, **sizes),
    out_type=jax.ShapeDtypeStruct(q_XCRH.shape, dtype),
    scratch_types=[
      plgpu.SMEM((C, R, H), dtype),
      plgpu.SMEM((C, R, H), dtype),
      plgpu.SMEM((num_stages, block, H), dtype),
      plgpu.SMEM((num_stages, block, H), dtype),
      plgpu.SMEM((C, R), jnp.int32),
      plgpu.SMEM((C, R), jnp.int32),
      plgpu.SMEM((C, R), jnp.float32),
      plgpu.SMEM((C, R), jnp.float32),
      plgpu.Barrier(num_arrivals=6, num_barriers=C),
      plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
      plgpu.Barrier(num_arrivals=C, num_barriers=num_stages),
    ],
    grid=(X,),
    grid_names=("tile",),
    num_threads=C + 1,  # the last one copies
    thread_name="warpgroup",
    kernel_name="sparse_attention_backward_q",
    **mgpu.options(interpreted),
  )(
    *lists,
    q_XCRH,
    dout_XCRH,
    k_PsKH,
    v_PsKH,
    *rows_and_edges(pos_YCq, start_YCq, group),
    lse_XCR,
    delta_XCR,
  )


def _kv_body(
  block_ref,  # [E, N] block of each run, -1 = no run; E = B * K
  begin_ref,  # [E, N] its entries
  end_ref,
  units_ref,  # [E, L] unit of each entry, sorted by block
  bits_ref,  # [E, L] bit t: the unit's query t lists the block; bit 31: compare positions
  q_ref,  # [X, r, H], X = Y * K units, the key head fastest
  dout_ref,
  k_ref,  # [P, s, K, H], s a multiple of 64
  v_ref,
  pos_ref,  # [Y, r]
  start_ref,
  lse_ref,  # [X, r] base 2
  delta_ref,
  dk_ref,  # [E, N, s, H]
  dv_ref,
  k_smem,
  v_smem,
  q_smem,
  dout_smem,
  pos_smem,
  start_smem,
  lse_smem,
  delta_smem,
  kv_barrier,
  barriers,
  *,
  group,
  scale,
  block_size,
  num_stages,
  interpreted,
):
  run, part, e = (jax.lax.axis_index(name) for name in ("run", "part", "row_and_head"))
  (places, _, heads, head_dim), unit_rows = k_ref.shape, q_ref.shape[1]
  per_step, batches = ROWS // unit_rows, block_ref.shape[0] // heads
  blocks, units = places // batches, pos_ref.shape[0] // batches
  batch, head = jax.lax.div(e, heads), jax.lax.rem(e, heads)
  block = block_ref[e, run]

  @pl.when(block >= 0)
  def _():
    begin, end = begin_ref[e, run], end_ref[e, run]
    keys = pl.ds(part * ROWS, ROWS)
    place = batch * blocks + block
    plgpu.copy_gmem_to_smem(k_ref.at[place, keys, head], k_smem, kv_barrier)
    plgpu.copy_gmem_to_smem(v_ref.at[place, keys, head], v_smem, kv_barrier)

    def fetch(i):
      @pl.when(begin + i * per_step < end)
      def _():
        slot = jax.lax.rem(i, num_stages)
        for c in range(per_step):  # past the end: the last unit again, which nobody counts
          y = batch * units + units_ref[e, jnp.minimum(begin + i * per_step + c, end - 1)]
          x, rows = y * heads + head, pl.ds(c * unit_rows, unit_rows)
          for source, target in (
            (q_ref.at[x], q_smem),
            (dout_ref.at[x], dout_smem),
            (pos_ref.at[y], pos_smem),
            (start_ref.at[y], start_smem),
            (lse_ref.at[x], lse_smem),
            (delta_ref.at[x], delta_smem),
          ):
            plgpu.copy_gmem_to_smem(source, target.at[slot, rows], barriers.at[slot])

    for i in range(num_stages - 1):
      fetch(jnp.int32(i))
    plgpu.barrier_wait(kv_barrier)
    shape = (ROWS, ROWS)
    row_sr = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    lane_sr = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    spot_sr = lane_sr + (block * block_size + part * ROWS)
    unit_sr = jax.lax.div(row_sr, unit_rows)
    query_sr = jnp.minimum(jax.lax.div(jax.lax.rem(row_sr, unit_rows), group), 31)

    def bits_of(i):
      entries = [begin + i * per_step + c for c in range(per_step)]
      return [jnp.where(j < end, bits_ref[e, jnp.minimum(j, end - 1)], 0) for j in entries]

    def step(i, carry):
      bits, dk_sH, dv_sH = carry
      slot = jax.lax.rem(i, num_stages)
      next_bits = bits_of(i + 1)
      members_sr = jnp.full(shape, bits[0], jnp.int32)
      for c in range(1, per_step):
        members_sr = jnp.where(unit_sr == c, jnp.full(shape, bits[c], jnp.int32), members_sr)
      is_member_sr = (jax.lax.shift_right_logical(members_sr, query_sr) & 1) == 1
      plgpu.barrier_wait(barriers.at[slot])
      plgpu.commit_smem()  # all warps are through the step before, whose buffers are next
      fetch(i + (num_stages - 1))
      scores_sr = mgpu.dot_transposed(k_smem, q_smem.at[slot], interpreted) * (scale * LOG2E)
      lse_sr = jnp.where(is_member_sr, mgpu.down(lse_smem[slot], ROWS), NOTHING)
      probs_sr = jnp.exp2(scores_sr - lse_sr)

      def compare(probs_sr):
        pos_sr, start_sr = mgpu.down(pos_smem[slot], ROWS), mgpu.down(start_smem[slot], ROWS)
        return jnp.where((spot_sr <= pos_sr) & (spot_sr >= start_sr), probs_sr, 0.0)

      is_edge = functools.reduce(jnp.minimum, bits) < 0
      probs_sr = jax.lax.cond(is_edge, compare, lambda x: x, probs_sr)
      dtype, dout = q_smem.dtype, dout_smem.at[slot]
      dv_sH = mgpu.values_dot_add(dv_sH, probs_sr.astype(dtype), dout, interpreted)
      dprobs_sr = mgpu.dot_transposed(v_smem, dout, interpreted)
      dscores_sr = probs_sr * (dprobs_sr - mgpu.down(delta_smem[slot], ROWS))
      dk_sH = mgpu.values_dot_add(dk_sH, dscores_sr.astype(dtype), q_smem.at[slot], interpreted)
      return next_bits, dk_sH, dv_sH

    zeros = jnp.zeros((ROWS, head_dim), jnp.float32)
    num_steps = jax.lax.div(end - begin + (per_step - 1), per_step)
    _, dk_sH, dv_sH = jax.lax.fori_loop(0, num_steps, step, (bits_of(0), zeros, zeros))
    mgpu.store(dk_ref, (e, run, keys), dk_sH * scale, interpreted)
    mgpu.store(dv_ref, (e, run, keys), dv_sH, interpreted)


def backward_kv(
  runs,
  q_XrH,
  dout_XrH,
  k_PsKH,
  v_PsKH,
  pos_Yr,
  start_Yr,
  lse_Xr,
  delta_Xr,
  *,
  group,
  scale,
  block_size,
  num_stages,
  interpreted,
):
  """Shares of every run in (dk, dv), [E, N, s, H] float32; those of runs -1 are not written.

  runs: (block, begin, end [E, N], units, bits [E, L]) int32, of `_kv_body`. Blocks are `block_size`
  apart on their row's grid and s rows long, padded to a multiple of 64.
  """
  (_, unit_rows, H), (_, s, _, _) = q_XrH.shape, k_PsKH.shape
  E, N = runs[0].shape
  dtype, rows = q_XrH.dtype, (num_stages, ROWS)
  share = jax.ShapeDtypeStruct((E, N, s, H), jnp.float32)
  sizes = dict(group=group, scale=scale, block_size=block_size, num_stages=num_stages)
  return plgpu.kernel(
    functools.partial(_kv_body, interpreted=interpreted, **sizes),
    out_type=(share, share),
    scratch_types=[
      plgpu.SMEM((ROWS, H), dtype),
      plgpu.SMEM((ROWS, H), dtype),
      plgpu.SMEM((*rows, H), dtype),
      plgpu.SMEM((*rows, H), dtype),
      plgpu.SMEM(rows, jnp.int32),
      plgpu.SMEM(rows, jnp.int32),
      plgpu.SMEM(rows, jnp.float32),
      plgpu.SMEM(rows, jnp.float32),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=6 * (ROWS // unit_rows), num_barriers=num_stages),
    ],
    grid=(E, s // ROWS, N),
    grid_names=("row_and_head", "part", "run"),
    kernel_name="sparse_attention_backward_kv",
    **mgpu.options(interpreted),
  )(*runs, q_XrH, dout_XrH, k_PsKH, v_PsKH, pos_Yr, start_Yr, lse_Xr, delta_Xr)


def _sum_body(first_ref, dk_runs_ref, dv_runs_ref, dk_ref, dv_ref):
  m, part, e = (jax.lax.axis_index(name) for name in ("block", "part", "row_and_head"))
  first, last = first_ref[e, m], first_ref[e, m + 1]
  keys = pl.ds(part * ROWS, ROWS)
  for runs_ref, out_ref in ((dk_runs_ref, dk_ref), (dv_runs_ref, dv_ref)):
    nothing = jnp.zeros((ROWS, runs_ref.shape[-1]), jnp.float32)
    total = jax.lax.fori_loop(
      first, last, lambda run, total, ref=runs_ref: total + ref[e, run, keys], nothing
    )
    out_ref[e, m, keys] = total.astype(out_ref.dtype)


def sum_runs(first_run_EM1, dk_ENsH, dv_ENsH, *, dtype, interpreted):
  """(dk, dv) [E, M, s, H]: the runs first[m] <= n < first[m + 1] of every block, added in order."""
  E, _, s, H = dk_ENsH.shape
  M = first_run_EM1.shape[1] - 1
  out = jax.ShapeDtypeStruct((E, M, s, H), dtype)
  return plgpu.kernel(
    _sum_body,
    out_type=(out, out),
    grid=(E, s // ROWS, M),
    grid_names=("row_and_head", "part", "block"),
    kernel_name="sparse_attention_sum_runs",
    **mgpu.options(interpreted),
  )(first_run_EM1, dk_ENsH, dv_ENsH)
