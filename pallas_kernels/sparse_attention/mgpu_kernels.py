"""Mosaic GPU kernel over lists of key blocks (infllm_v2.md 19.3), used by attention and decoding.

A tile is a few queries times the G heads of one key head, the 64 rows of a wgmma. Its list is the
union of its queries' lists with one membership bit a query, so every block is fetched once for the
tile and masked by row. One warpgroup runs one share of a tile's list; blocks arrive by TMA in the
model's layout, `num_stages` in flight. A new copy into a buffer starts behind `commit_smem`, where
all four warps have finished the product that read it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu

FLOOR = -1e30  # below every real score
LOG2E = math.log2(math.e)


def shared_bytes(block: int, head_dim: int, num_stages: int, itemsize: int, out_itemsize: int):
  """Of one program: q, out, blocks of k and v in flight, probabilities, numbers of the rows."""
  rows = mgpu.ROWS
  tiles = rows * head_dim * (itemsize + out_itemsize) + rows * block * itemsize
  return tiles + 2 * num_stages * block * head_dim * itemsize + 3 * 4 * rows + 4096


def across(x_R, width: int):
  """[R, width] of a number a row."""
  return jax.lax.broadcast_in_dim(x_R, (x_R.shape[0], width), (0,))


def seen_by_rows(block_id, bits, group: int, pos_Rs, start_Rs):
  """Bool [R, s]: the row's query lists the block, and the slot is neither future nor before start.

  bits: bit t = the tile's query t lists the block; row r belongs to query r // group.
  """
  shape = pos_Rs.shape
  row_Rs = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  query_Rs = jnp.minimum(jax.lax.div(row_Rs, group), 31)  # rows past the last query: no member
  spot_Rs = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + block_id * shape[1]
  members_Rs = jnp.full(shape, bits, jnp.int32)
  is_member_Rs = (jax.lax.shift_right_logical(members_Rs, query_Rs) & 1) == 1
  return (spot_Rs <= pos_Rs) & (spot_Rs >= start_Rs) & is_member_Rs


def _body(
  ids_ref,  # [X, U] block on the row's grid
  bits_ref,  # [X, U] bit t: the tile's query t lists the block
  counts_ref,  # [X]
  first_ref,  # [X] place of the row's block 0 in k and v, or in the table
  table_ref,  # [P] place of each block in k and v (`is_paged`)
  q_ref,  # [X, R, H]
  k_ref,  # [P, s, K, H]
  v_ref,
  pos_ref,  # [Y, R], Y = X / K
  start_ref,
  out_ref,  # [X, splits, R, H]
  lse_ref,  # [X, splits, R] base e
  q_smem,
  k_smem,
  v_smem,
  probs_smem,
  out_smem,
  lse_smem,
  pos_smem,
  start_smem,
  row_barrier,
  k_barriers,
  v_barriers,
  *,
  group,
  scale,
  splits,
  num_stages,
  is_paged,
  interpreted,
):
  x, split = jax.lax.axis_index("tile"), jax.lax.axis_index("split")
  _, block, heads, head_dim = k_ref.shape
  rows = mgpu.ROWS
  head, y = jax.lax.rem(x, heads), jax.lax.div(x, heads)
  count, first = counts_ref[x], first_ref[x]
  share = jax.lax.div(count + (splits - 1), splits)
  begin = split * share
  end = jnp.minimum(begin + share, count)

  def fetch(j):
    @pl.when(j < end)
    def _():
      place = first + ids_ref[x, j]
      if is_paged:
        place = table_ref[place]
      slot = jax.lax.rem(j - begin, num_stages)
      plgpu.copy_gmem_to_smem(k_ref.at[place, :, head], k_smem.at[slot], k_barriers.at[slot])
      plgpu.copy_gmem_to_smem(v_ref.at[place, :, head], v_smem.at[slot], v_barriers.at[slot])

  def fetch_rows(source, target):
    plgpu.copy_gmem_to_smem(source, target, row_barrier)
    plgpu.barrier_wait(row_barrier)

  for i in range(num_stages - 1):
    fetch(begin + i)
  fetch_rows(q_ref.at[x], q_smem)
  fetch_rows(pos_ref.at[y], pos_smem)
  fetch_rows(start_ref.at[y], start_smem)
  pos_Rs, start_Rs = across(pos_smem[...], block), across(start_smem[...], block)

  def step(j, carry):
    top_R, sum_R, acc_RH = carry
    slot = jax.lax.rem(j - begin, num_stages)
    plgpu.barrier_wait(k_barriers.at[slot])
    scores_Rs = mgpu.dot_transposed(q_smem, k_smem.at[slot], interpreted) * (scale * LOG2E)
    seen_Rs = seen_by_rows(ids_ref[x, j], bits_ref[x, j], group, pos_Rs, start_Rs)
    scores_Rs = jnp.where(seen_Rs, scores_Rs, 2 * FLOOR)
    new_top_R = jnp.maximum(top_R, jnp.max(scores_Rs, axis=1))
    shrink_R = jnp.exp2(top_R - new_top_R)
    probs_Rs = jnp.exp2(scores_Rs - across(new_top_R, block))
    sum_R = sum_R * shrink_R + jnp.sum(probs_Rs, axis=1)
    probs_smem[...] = probs_Rs.astype(probs_smem.dtype)
    plgpu.commit_smem()
    fetch(j + (num_stages - 1))
    plgpu.barrier_wait(v_barriers.at[slot])
    acc_RH = acc_RH * across(shrink_R, head_dim) + mgpu.dot(probs_smem, v_smem.at[slot])
    return new_top_R, sum_R, acc_RH

  nothing = (
    jnp.full((rows,), FLOOR, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros((rows, head_dim), jnp.float32),
  )
  top_R, sum_R, acc_RH = jax.lax.fori_loop(begin, end, step, nothing)
  safe_R = jnp.where(sum_R > 0, sum_R, 1.0)
  out_smem[...] = (acc_RH / across(safe_R, head_dim)).astype(out_smem.dtype)
  lse_smem[...] = jnp.where(sum_R > 0, top_R * (1 / LOG2E) + jnp.log(safe_R), -jnp.inf)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_ref.at[x, split])
  plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[x, split])
  plgpu.wait_smem_to_gmem(0)


@mgpu.once("group", "scale", "splits", "num_stages", "out_dtype", "interpreted")
def forward(
  lists,
  table_P,
  q_XRH,
  k_PsKH,
  v_PsKH,
  pos_YR,
  start_YR,
  *,
  group,
  scale,
  splits,
  num_stages,
  out_dtype,
  interpreted,
):
  """(out [X, splits, R, H], lse [X, splits, R] float32), normalised within each split.

  lists: (ids, bits [X, U], counts, first [X]) int32. X = Y * K tiles, the key head fastest.
  table_P: place of block first + id in k and v; None = that block itself.
  """
  X, R, H = q_XRH.shape
  block, dtype = k_PsKH.shape[1], q_XRH.dtype
  is_paged = table_P is not None
  sizes = dict(
    group=group, scale=scale, splits=splits, num_stages=num_stages, interpreted=interpreted
  )
  return plgpu.kernel(
    functools.partial(_body, is_paged=is_paged, **sizes),
    out_type=(
      jax.ShapeDtypeStruct((X, splits, R, H), out_dtype),
      jax.ShapeDtypeStruct((X, splits, R), jnp.float32),
    ),
    scratch_types=[
      plgpu.SMEM((R, H), dtype),
      plgpu.SMEM((num_stages, block, H), dtype),
      plgpu.SMEM((num_stages, block, H), dtype),
      plgpu.SMEM((R, block), dtype),
      plgpu.SMEM((R, H), out_dtype),
      plgpu.SMEM((R,), jnp.float32),
      plgpu.SMEM((R,), jnp.int32),
      plgpu.SMEM((R,), jnp.int32),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=num_stages),
      plgpu.Barrier(num_barriers=num_stages),
    ],
    grid=(splits, X),
    grid_names=("split", "tile"),
    kernel_name="sparse_attention_forward",
    **mgpu.options(interpreted),
  )(*lists, table_P if is_paged else lists[3], q_XRH, k_PsKH, v_PsKH, pos_YR, start_YR)
