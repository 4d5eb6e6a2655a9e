"""Packed codes in the registers of a product, thread by thread over numpy: no GPU runs them here.

Where a register belongs is from NVIDIA's PTX manual (wgmma, A of 16-bit floats in registers): lane
4 g + q of warp w holds rows 16 w + g and 16 w + g + 8 of 64, columns 2 q, 2 q + 1 of every eight.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.w4a16_gemm import mgpu_fragments as fragments
from tests.pallas_kernels import packed_suite

THREADS = np.arange(128)
WARP, G, Q = THREADS // 32, THREADS % 32 // 4, THREADS % 4


class NumpyOps:
  """`fragments.Ops` for all threads of a warpgroup at once."""

  def c(self, value):
    return np.full(128, value, np.int64)

  def thread(self):
    return THREADS + 128  # the second warpgroup of a program

  def grid_depth(self):
    return self.c(5)

  add, mul, div, rem = (staticmethod(f) for f in (np.add, np.multiply, np.floor_divide, np.mod))
  least, shift_right = staticmethod(np.minimum), staticmethod(np.right_shift)

  def word(self, ref, row, column):
    assert np.all(column % 4 == 0)
    return sum(ref[row, column + i].astype(np.int64) << (8 * i) for i in range(4))

  def signed_byte(self, ref, index):
    return ref[index].astype(np.int64)

  def choose_bytes(self, a, b, select):
    both = a | b << 32
    picks = [select >> (4 * i) & 15 for i in range(4)]
    return sum((both >> (8 * pick) & 255) << (8 * i) for i, pick in enumerate(picks))

  def put(self, bits, mask, constant):
    return bits & mask | constant

  def subtract(self, a, b, kind):
    dtype = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}[kind]
    return bits_of(floats_of(a, dtype) - floats_of(b, dtype), dtype)

  def float_pair(self, number, dtype):
    return bits_of(np.stack([number, number], axis=-1), dtype)


def floats_of(pair, dtype):
  halves = np.stack([pair & 0xFFFF, pair >> 16], axis=-1).astype(np.uint16)
  return halves.view(dtype).astype(np.float32)


def bits_of(floats, dtype):
  halves = floats.astype(dtype).view(np.uint16).astype(np.int64)
  return halves[:, 0] | halves[:, 1] << 16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("bits, has_zero", [(4, False), (4, True), (2, False)])
def test_every_register_holds_the_codes_of_its_place(bits, has_zero, dtype):
  rng = np.random.default_rng(0)
  low, high = packed_suite.RANGES[bits]
  codes_KN = rng.integers(low, high + 1, (64 * 8 // bits, 128))
  zero_N = rng.integers(-128, 128, 128).astype(np.int8) if has_zero else None
  expected_KN = codes_KN - (zero_N.astype(np.int64) if has_zero else 0)
  codes_RN = packed_suite.pack(codes_KN, bits)
  for chunk in range(codes_KN.shape[0] // fragments.INPUTS):
    size = dict(chunk=chunk, bits=bits, low=low, dtype=dtype)
    value = fragments.unpacker(NumpyOps(), codes_RN, zero_N, **size)
    for byte in range(4):
      for columns in range(8):
        found = floats_of(value(byte, columns), jnp.dtype(dtype))
        n, k = 4 * (8 * WARP + G) + byte, chunk * 64 + 8 * columns + 2 * Q
        assert np.array_equal(found[:, 0], expected_KN[k, n]), (chunk, byte, columns)
        assert np.array_equal(found[:, 1], expected_KN[k + 1, n]), (chunk, byte, columns)


def tiled(array, tiling):
  """Each tile of the last dimensions becomes dimensions of its own behind those of the tiles."""
  for tile in tiling:
    fixed, split = array.shape[: -len(tile)], array.shape[-len(tile) :]
    shape = [size for n, t in zip(split, tile, strict=True) for size in (n // t, t)]
    array = array.reshape(*fixed, *shape)
    outer = [len(fixed) + 2 * i for i in range(len(tile))]
    order = [*range(len(fixed)), *outer, *(i + 1 for i in outer)]
    array = array.transpose(order)
  return array


def test_bytes_of_a_word_are_the_rows_of_a_thread():
  """Register -> (row, column) of jax's layout; a byte is the half and the tile of 64 rows."""
  shape, layout = (128, 64), plgpu.Layout.WGMMA.to_mgpu()
  places = tiled(np.arange(128 * 64).reshape(shape), layout.tiling.tiles)
  assert (layout.warp_dims, layout.lane_dims, layout.vector_dim) == ((-7,), (-3, -2), -1)
  assert sorted(byte for _, byte, _ in fragments._places(shape)) == sorted([*range(4)] * 8)
  for index, byte, columns in fragments._places(shape):
    for t in THREADS:
      at = list(index)
      at[-7], at[-3], at[-2] = WARP[t], G[t], Q[t]
      row, column = divmod(int(places[tuple(at)]), 64)
      assert row == 64 * (byte // 2) + 16 * WARP[t] + 8 * (byte % 2) + G[t]
      assert column == 8 * columns + 2 * Q[t]
