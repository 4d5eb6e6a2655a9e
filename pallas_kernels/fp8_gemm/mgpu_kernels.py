"""Mosaic GPU kernel of the block-scaled FP8 product (quantization.md 9).

Warp specialised and persistent: a program walks over tiles of outputs, its last warpgroup only
starts the copies, the others multiply. A step is one block of 128 inputs: x and w arrive by TMA,
both contiguous along the inputs as FP8 wgmma reads them, with the step's scales of the rows.

A consumer owns `block_m / consumers` rows and takes 64 of them at a time: the product of a step
starts from zero and is added in float32 times the two scales. While one consumer adds, the tensor
cores work for the other. Tiles of 64 x 128 alone would be bound by what moves from L2 to shared
memory. `empty` has a phase more than its slot is filled: the consumers arrive at the start, and
the producer waits for the last one at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu

ROWS = mgpu.ROWS
OUT_COLUMNS = 64  # of an output tile that a consumer writes at once
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


def shared_bytes(block: int, tiles: dict, itemsize: int) -> int:
  """Of one program: x, w and scales in flight, outputs."""
  step = block * (tiles["block_m"] + tiles["block_n"]) + 4 * tiles["block_m"]
  staged = tiles["consumers"] * ROWS * OUT_COLUMNS * itemsize
  return tiles["num_stages"] * step + staged + 1024


def place(i, rows: int, columns: int, group: int):
  """(row, column) of the i-th tile: column by column through `group` rows of tiles, then the next.

  The programs that run together share their x and w: both stay in L2.
  """
  first = jax.lax.div(i, group * columns) * group
  height = jnp.minimum(group, rows - first)
  rest = jax.lax.rem(i, group * columns)
  return first + jax.lax.rem(rest, height), jax.lax.div(rest, height)


def _body(
  x_ref,  # [M, K]
  x_scale_ref,  # [Q, M]
  w_ref,  # [N, K]
  w_scale_ref,  # [Q, P]
  out_ref,  # [M, N]
  x_smem,
  w_smem,
  scale_smem,
  out_smem,
  full,
  rest,
  empty,
  *,
  block,
  consumers,
  group_m,
  programs,
  interpreted,
):
  num_stages, block_m, _ = x_smem.shape
  block_n, steps = w_smem.shape[1], w_scale_ref.shape[0]
  rows, columns = x_ref.shape[0] // block_m, w_ref.shape[0] // block_n
  program, thread = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
  height = ROWS * consumers
  layers = block_m // height
  count = jax.lax.div(rows * columns - program + programs - 1, programs)

  def origin(t):
    row, column = place(program + t * programs, rows, columns, group_m)
    return row * block_m, column * block_n

  def produce():
    def tile(t, _):
      first_m, first_n = origin(t)
      at_m, at_n = pl.ds(first_m, block_m), pl.ds(first_n, block_n)

      def step(q, _):
        slot = jax.lax.rem(t * steps + q, num_stages)
        ready, inputs = full.at[slot], pl.ds(q * block, block)
        plgpu.barrier_wait(empty.at[slot])
        plgpu.copy_gmem_to_smem(w_ref.at[at_n, inputs], w_smem.at[slot], ready)
        plgpu.copy_gmem_to_smem(x_scale_ref.at[q, at_m], scale_smem.at[slot], ready)
        for h in range(layers):
          at = pl.ds(first_m + h * height, height)
          to = x_smem.at[slot, pl.ds(h * height, height)]
          plgpu.copy_gmem_to_smem(x_ref.at[at, inputs], to, (rest if h else full).at[slot])
        return ()

      return jax.lax.fori_loop(0, steps, step, ())

    jax.lax.fori_loop(0, count, tile, ())
    for slot in range(num_stages):
      plgpu.barrier_wait(empty.at[slot])

  def consume():
    halves = [h * height + thread * ROWS for h in range(layers)]
    for slot in range(num_stages):
      plgpu.barrier_arrive(empty.at[slot])

    def tile(t, _):
      first_m, first_n = origin(t)
      column = jax.lax.div(first_n, block)

      def step(q, carry):
        w_scale, *accs = carry
        slot = jax.lax.rem(t * steps + q, num_stages)
        next_scale = w_scale_ref[jnp.minimum(q + 1, steps - 1), column]
        plgpu.barrier_wait(full.at[slot])
        for h, row in enumerate(halves):
          part = pl.ds(row, ROWS)
          if h:
            plgpu.barrier_wait(rest.at[slot])
          # No `commit_smem` between this read and the copy that overwrites it: the arrival below
          # releases it. (jax 0.11's race detector asks for one wherever a copy follows a read.)
          scale_M = scale_smem[slot, part] * w_scale
          part_MN = mgpu.dot_transposed(x_smem.at[slot, part], w_smem.at[slot], interpreted)
          if h == len(halves) - 1:
            plgpu.barrier_arrive(empty.at[slot])
          accs[h] += part_MN * jax.lax.broadcast_in_dim(scale_M, part_MN.shape, (0,))
        return next_scale, *accs

      nothing = [jnp.zeros((ROWS, block_n), jnp.float32) for _ in halves]
      carry = (w_scale_ref[0, column], *nothing)
      accs = jax.lax.fori_loop(0, steps, step, carry)[1:]
      for acc_MN, row in zip(accs, halves, strict=True):
        y_MN = acc_MN.astype(out_smem.dtype)
        for n in range(0, block_n, OUT_COLUMNS):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_smem[thread] = y_MN[:, n : n + OUT_COLUMNS]
          plgpu.commit_smem()
          to = out_ref.at[pl.ds(first_m + row, ROWS), pl.ds(first_n + n, OUT_COLUMNS)]
          plgpu.copy_smem_to_gmem(out_smem.at[thread], to)
      return ()

    jax.lax.fori_loop(0, count, tile, ())
    plgpu.wait_smem_to_gmem(0)

  @pl.when(thread == consumers)
  def _():
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    produce()

  @pl.when(thread < consumers)
  def _():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    consume()


def matmul(x_MK, x_scale_QM, w_NK, w_scale_QP, *, tiles, programs, out_dtype, interpreted):
  """[M, N] of whole tiles: M a multiple of block_m, N of block_n, K of 128.

  tiles: block_m, block_n, consumers, num_stages, group_m.
  """
  (M, K), N = x_MK.shape, w_NK.shape[0]
  block = K // w_scale_QP.shape[0]
  block_m, block_n, stages = tiles["block_m"], tiles["block_n"], tiles["num_stages"]
  consumers = tiles["consumers"]
  body = functools.partial(
    _body,
    block=block,
    consumers=consumers,
    group_m=tiles["group_m"],
    programs=programs,
    interpreted=interpreted,
  )
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((M, N), out_dtype),
    scratch_types=[
      plgpu.SMEM((stages, block_m, block), x_MK.dtype),
      plgpu.SMEM((stages, block_n, block), w_NK.dtype),
      plgpu.SMEM((stages, block_m), jnp.float32),
      plgpu.SMEM((consumers, ROWS, OUT_COLUMNS), out_dtype),
      plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      plgpu.Barrier(num_arrivals=1, num_barriers=stages),
      plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    ],
    grid=(programs,),
    grid_names=("program",),
    num_threads=consumers + 1,
    thread_name="warpgroup",
    kernel_name="fp8_gemm",
    **mgpu.options(interpreted),
  )(x_MK, x_scale_QM, w_NK, w_scale_QP)
