"""Mosaic GPU kernel of the packed matmuls (quantization.md section 10), 4 or 2 bits a code.

One warpgroup computes 64 rows of one tile of outputs over one share of the inputs. A step is a tile
of bytes: its f fields of codes are written one under the other to shared memory in x's type, and x
comes in that order of inputs, so that a step is one product. x, bytes, scales and zero points
arrive by TMA. Writes to shared memory stand between two `commit_smem`: behind the first all four
warps have finished the product that read it (and a new copy may start into the buffers of the step
before), behind the second the tensor cores see them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu

ROWS = mgpu.ROWS


def block_inputs(bits: int) -> int:
  """Inputs of a step: 64 rows of bytes, as the layout of a warpgroup's registers wants."""
  return ROWS * 8 // bits


def shared_bytes(block_n: int, num_stages: int, bits: int, itemsize: int) -> int:
  """Of one program: x, bytes, scales and zero points in flight, one tile of weights, outputs."""
  block_k = block_inputs(bits)
  step = itemsize * ROWS * block_k + ROWS * block_n + 8 * block_n
  return num_stages * step + itemsize * block_k * block_n + 4 * ROWS * block_n + 4096


def _body(
  x_ref,  # [M, K], inputs of a step in the order of the fields
  codes_ref,  # [R, N] uint8
  scale_ref,  # [Q, N] float32
  zero_ref,  # [Q, N] int32, or anything where not has_zero
  out_ref,  # [splits, M, N]
  x_smem,
  codes_smem,
  scale_smem,
  zero_smem,
  w_smem,
  out_smem,
  barriers,
  *,
  bits,
  low,
  steps,
  has_zero,
  splits,
  num_stages,
  interpreted,
):
  block_k, block_n = w_smem.shape
  mask = 2**bits - 1
  num_groups = scale_ref.shape[0]
  first_m = jax.lax.axis_index("m") * ROWS
  first_n = jax.lax.axis_index("n") * block_n
  split = jax.lax.axis_index("split")
  begin = split * -(-steps // splits)
  end = jnp.minimum(begin + -(-steps // splits), steps)
  columns = pl.ds(first_n, block_n)

  def fetch(i):
    @pl.when(i < end)
    def _():
      slot, group = jax.lax.rem(i - begin, num_stages), jax.lax.div(i * num_groups, steps)
      ready = barriers.at[slot]
      x_tile = x_ref.at[pl.ds(first_m, ROWS), pl.ds(i * block_k, block_k)]
      plgpu.copy_gmem_to_smem(x_tile, x_smem.at[slot], ready)
      plgpu.copy_gmem_to_smem(
        codes_ref.at[pl.ds(i * ROWS, ROWS), columns], codes_smem.at[slot], ready
      )
      plgpu.copy_gmem_to_smem(scale_ref.at[group, columns], scale_smem.at[slot], ready)
      if has_zero:
        plgpu.copy_gmem_to_smem(zero_ref.at[group, columns], zero_smem.at[slot], ready)

  for i in range(num_stages - 1):
    fetch(begin + i)

  def step(i, acc_MN):
    slot = jax.lax.rem(i - begin, num_stages)
    plgpu.barrier_wait(barriers.at[slot])
    plgpu.commit_smem()
    fetch(i + (num_stages - 1))
    bytes_RN = mgpu.load_bytes(codes_smem, slot, interpreted).astype(jnp.int32)
    for j in range(8 // bits):
      codes_RN = (jax.lax.shift_right_logical(bytes_RN, bits * j) & mask) + low
      if has_zero:
        codes_RN = codes_RN - mgpu.down(zero_smem[slot], ROWS)
      w_smem[pl.ds(j * ROWS, ROWS), :] = codes_RN.astype(jnp.float32).astype(w_smem.dtype)
    plgpu.commit_smem()
    return acc_MN + mgpu.dot(x_smem.at[slot], w_smem) * mgpu.down(scale_smem[slot], ROWS)

  nothing = jnp.zeros((ROWS, block_n), jnp.float32)
  out_smem[...] = jax.lax.fori_loop(begin, end, step, nothing).astype(out_smem.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out_ref.at[split, pl.ds(first_m, ROWS), columns])
  plgpu.wait_smem_to_gmem(0)


@mgpu.once("bits", "low", "block_n", "splits", "num_stages", "out_dtype", "interpreted")
def matmul(
  x_MK,
  codes_RN,
  scale_QN,
  zero_QN,
  *,
  bits,
  low,
  block_n,
  splits,
  num_stages,
  out_dtype,
  interpreted,
):
  """[splits, M, N] of whole tiles; x in the order that `_body` says, Q divides the steps."""
  (M, K), N, block_k = x_MK.shape, codes_RN.shape[1], block_inputs(bits)
  has_zero, dtype = zero_QN is not None, x_MK.dtype
  out_dtype = out_dtype if splits == 1 else jnp.float32
  sizes = dict(bits=bits, low=low, splits=splits, num_stages=num_stages)
  flags = dict(has_zero=has_zero, interpreted=interpreted)
  return plgpu.kernel(
    functools.partial(_body, steps=K // block_k, **sizes, **flags),
    out_type=jax.ShapeDtypeStruct((splits, M, N), out_dtype),
    scratch_types=[
      plgpu.SMEM((num_stages, ROWS, block_k), dtype),
      plgpu.SMEM((num_stages, ROWS, block_n), jnp.uint8),
      plgpu.SMEM((num_stages, block_n), jnp.float32),
      plgpu.SMEM((num_stages, block_n), jnp.int32),
      plgpu.SMEM((block_k, block_n), dtype),
      plgpu.SMEM((ROWS, block_n), out_dtype),
      plgpu.Barrier(num_arrivals=3 + has_zero, num_barriers=num_stages),
    ],
    grid=(N // block_n, M // ROWS, splits),
    grid_names=("n", "m", "split"),
    kernel_name="packed_gemm",
    **mgpu.options(interpreted),
  )(x_MK, codes_RN, scale_QN, zero_QN if has_zero else scale_QN)
