"""Mosaic GPU kernel of the packed matmuls of few rows, 4 or 2 bits a code (quantization.md 10).

y^T = W^T x^T: 128 outputs of a tile are the rows of the product, so that up to 64 activations are
its columns and nothing is multiplied for padding beyond 8. More come in blocks of as many, whose
codes are unpacked again (and found in L2). Codes go from shared memory into
registers and from there to the tensor cores (`mgpu_fragments`). The warpgroups of a program take
its steps in turn, each with copies of its own in flight, and the first adds their sums; inputs are
also split between programs where there are few outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mgpu
from pallas_kernels.w4a16_gemm import mgpu_fragments as fragments

BYTES = 64  # rows of bytes of a step
MOST_ROWS = 64  # of activations a program


def shared_bytes(rows: int, warpgroups: int, num_stages: int, bits: int, itemsize: int) -> int:
  """Of one program: x and bytes in flight, sums of all warpgroups but the first."""
  step = BYTES * (itemsize * rows * 8 // bits + fragments.ROWS)
  return warpgroups * num_stages * step + (warpgroups - 1) * 4 * fragments.ROWS * rows + 1024


def _body(
  x_ref,  # [M, K]
  codes_ref,  # [R, N] uint8
  scale_ref,  # [Q, N]
  zero_ref,  # [Q, N] int8, or anything where not has_zero
  out_ref,  # [splits, M, N]
  x_smem,
  codes_smem,
  sums_smem,
  out_smem,  # interpreted alone
  ready,
  added,
  *,
  bits,
  low,
  steps,
  has_zero,
  splits,
  interpreted,
):
  warpgroups, num_stages, M, block_k = x_smem.shape
  num_groups, dtype = scale_ref.shape[0], x_smem.dtype
  columns = pl.ds(jax.lax.axis_index("n") * fragments.ROWS, fragments.ROWS)
  block = jax.lax.axis_index("m")
  activations = pl.ds(block * M, M)
  split, warpgroup = jax.lax.axis_index("split"), jax.lax.axis_index("warpgroup")
  begin = split * -(-steps // splits)
  end = jnp.minimum(begin + -(-steps // splits), steps)
  begin = begin + warpgroup
  count = jax.lax.div(jnp.maximum(end - begin + warpgroups - 1, 0), warpgroups)

  def fetch(i):
    @pl.when(i < count)
    def _():
      slot, at = jax.lax.rem(i, num_stages), begin + i * warpgroups
      barrier = ready.at[warpgroup * num_stages + slot]
      rows, inputs = pl.ds(at * BYTES, BYTES), pl.ds(at * block_k, block_k)
      plgpu.copy_gmem_to_smem(codes_ref.at[rows, columns], codes_smem.at[warpgroup, slot], barrier)
      plgpu.copy_gmem_to_smem(x_ref.at[activations, inputs], x_smem.at[warpgroup, slot], barrier)

  for i in range(num_stages - 1):
    fetch(i)

  def step(i, acc_NM):
    slot = jax.lax.rem(i, num_stages)
    group = jax.lax.div((begin + i * warpgroups) * num_groups, steps)
    scale_NM = fragments.scales(scale_ref.at[group, columns], M, interpreted)
    zero = zero_ref.at[group, columns] if has_zero else None
    plgpu.barrier_wait(ready.at[warpgroup * num_stages + slot])
    plgpu.commit_smem()
    fetch(i + (num_stages - 1))
    codes = codes_smem.at[warpgroup, slot]
    unpacked = functools.partial(fragments.weights, codes, zero, bits=bits, low=low, dtype=dtype)

    def product(chunks):
      parts = [(j, pl.ds(j * fragments.INPUTS, fragments.INPUTS)) for j in chunks]
      if interpreted:
        return sum(
          jnp.dot(unpacked(chunk=j, interpreted=True), x_smem[warpgroup, slot, :, part].T)
          for j, part in parts
        )

      def multiply(acc_ref):
        for j, part in parts:
          w_Nk = unpacked(chunk=j, interpreted=False)
          plgpu.wgmma(acc_ref, w_Nk, x_smem.at[warpgroup, slot, :, part].transpose((1, 0)))
        return acc_ref[...]

      return pl.run_scoped(multiply, plgpu.ACC((fragments.ROWS, M), jnp.float32))

    for j in range(0, block_k // fragments.INPUTS, 2):  # more at once need more registers
      acc_NM += product((j, j + 1)) * scale_NM
    return acc_NM

  nothing = jnp.zeros((fragments.ROWS, M), jnp.float32)
  sum_NM = jax.lax.fori_loop(0, count, step, nothing)

  @pl.when(warpgroup > 0)
  def _():
    if warpgroups > 1:
      sums_smem[warpgroup - 1] = sum_NM
      plgpu.barrier_arrive(added.at[0])

  @pl.when(warpgroup == 0)
  def _():
    y_NM = mgpu.as_tile(sum_NM, interpreted)
    if warpgroups > 1:
      plgpu.barrier_wait(added.at[0])
      for i in range(warpgroups - 1):
        y_NM += mgpu.as_tile(sums_smem[i], interpreted)
    rows = min(M, out_ref.shape[1])
    to = out_ref.at[split, pl.ds(block * M, rows), columns]
    if interpreted:
      out_smem[...] = y_NM.T[:rows].astype(out_smem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out_smem, to)
      plgpu.wait_smem_to_gmem(0)
    else:
      fragments.store(y_NM, to)


@mgpu.once(
  *("height", "rows", "bits", "low", "splits", "warpgroups", "num_stages", "out_dtype"),
  "interpreted",
)
def matmul(
  x_MK,
  codes_RN,
  scale_QN,
  zero_QN,
  *,
  height,
  rows,
  bits,
  low,
  splits,
  warpgroups,
  num_stages,
  out_dtype,
  interpreted,
):
  """[splits, rows, N] of whole tiles: N a multiple of 128, Q divides the steps.

  x has blocks of `height` rows, a multiple of 8 and at most 64; or less than 8, which copies fill
  up with zeros (but not when interpreted).
  """
  (M, K), N, block_k = x_MK.shape, codes_RN.shape[1], BYTES * 8 // bits
  blocks, has_zero, dtype = -(-M // height), zero_QN is not None, x_MK.dtype
  out_dtype = out_dtype if splits == 1 else jnp.float32
  sizes = dict(bits=bits, low=low, steps=K // block_k, splits=splits)
  flags = dict(has_zero=has_zero, interpreted=interpreted)
  staged = (min(height, rows), fragments.ROWS) if interpreted else (8, 128)
  return plgpu.kernel(
    functools.partial(_body, **sizes, **flags),
    out_type=jax.ShapeDtypeStruct((splits, rows, N), out_dtype),
    scratch_types=[
      plgpu.SMEM((warpgroups, num_stages, height, block_k), dtype),
      plgpu.SMEM((warpgroups, num_stages, BYTES, fragments.ROWS), jnp.uint8),
      plgpu.SMEM((max(warpgroups - 1, 1), fragments.ROWS, height), jnp.float32),
      plgpu.SMEM(staged, out_dtype),
      plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups * num_stages),
      plgpu.Barrier(num_arrivals=max(warpgroups - 1, 1), num_barriers=1),
    ],
    grid=(N // fragments.ROWS, blocks, splits),
    grid_names=("n", "m", "split"),
    num_threads=warpgroups,
    thread_name="warpgroup",
    kernel_name="packed_gemm_few",
    **mgpu.options(interpreted),
  )(x_MK, codes_RN, scale_QN, zero_QN if has_zero else scale_QN)
