"""Mosaic GPU kernel of the block-scaled FP8 product (quantization.md 9).

One warpgroup computes 64 rows of one tile of outputs. A step is one block of 128 inputs: x and w
arrive by TMA, both contiguous along the inputs as FP8 wgmma reads them, with the step's scales of
the rows; its product starts from zero and is added in float32 times the two scales. A new copy
into a buffer starts behind `commit_smem`, where all four warps have finished the product that
read it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu

ROWS = mgpu.ROWS


def shared_bytes(block: int, block_n: int, num_stages: int, itemsize: int) -> int:
  """Of one program: x, w and scales in flight, outputs."""
  return num_stages * (block * (ROWS + block_n) + 4 * ROWS) + itemsize * ROWS * block_n + 4096


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
  barriers,
  *,
  block,
  num_stages,
  interpreted,
):
  steps, block_n = w_scale_ref.shape[0], out_smem.shape[1]
  first_m = jax.lax.axis_index("m") * ROWS
  first_n = jax.lax.axis_index("n") * block_n
  column = jax.lax.div(first_n, block)

  def fetch(q):
    @pl.when(q < steps)
    def _():
      slot = jax.lax.rem(q, num_stages)
      rows, cols, inputs = pl.ds(first_m, ROWS), pl.ds(first_n, block_n), pl.ds(q * block, block)
      plgpu.copy_gmem_to_smem(x_ref.at[rows, inputs], x_smem.at[slot], barriers.at[slot])
      plgpu.copy_gmem_to_smem(w_ref.at[cols, inputs], w_smem.at[slot], barriers.at[slot])
      plgpu.copy_gmem_to_smem(x_scale_ref.at[q, rows], scale_smem.at[slot], barriers.at[slot])

  for q in range(num_stages - 1):
    fetch(q)

  def step(q, acc_MN):
    slot = jax.lax.rem(q, num_stages)
    plgpu.barrier_wait(barriers.at[slot])
    plgpu.commit_smem()
    fetch(q + (num_stages - 1))
    scale_M = scale_smem[slot] * w_scale_ref[q, column]
    scale_MN = jax.lax.broadcast_in_dim(scale_M, acc_MN.shape, (0,))
    return acc_MN + mgpu.dot_transposed(x_smem.at[slot], w_smem.at[slot], interpreted) * scale_MN

  nothing = jnp.zeros((ROWS, block_n), jnp.float32)
  out_smem[...] = jax.lax.fori_loop(0, steps, step, nothing).astype(out_smem.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_ref.at[pl.ds(first_m, ROWS), pl.ds(first_n, block_n)])
  plgpu.wait_smem_to_gmem(0)


def matmul(x_MK, x_scale_QM, w_NK, w_scale_QP, *, block_n, num_stages, out_dtype, interpreted):
  """[M, N] of whole tiles: M a multiple of 64, N of block_n, K of 128."""
  (M, K), N = x_MK.shape, w_NK.shape[0]
  block = K // w_scale_QP.shape[0]
  return plgpu.kernel(
    functools.partial(_body, block=block, num_stages=num_stages, interpreted=interpreted),
    out_type=jax.ShapeDtypeStruct((M, N), out_dtype),
    scratch_types=[
      plgpu.SMEM((num_stages, ROWS, block), x_MK.dtype),
      plgpu.SMEM((num_stages, block_n, block), w_NK.dtype),
      plgpu.SMEM((num_stages, ROWS), jnp.float32),
      plgpu.SMEM((ROWS, block_n), out_dtype),
      plgpu.Barrier(num_arrivals=3, num_barriers=num_stages),
    ],
    grid=(N // block_n, M // ROWS),
    grid_names=("n", "m"),
    kernel_name="fp8_gemm",
    **mgpu.options(interpreted),
  )(x_MK, x_scale_QM, w_NK, w_scale_QP)
