"""The Marlin layout of 4-bit kernels as CPM.cu stores it (quantization.md 8.2): both directions.

Codes [K, N] are cut into tiles of 16 x 16 whose values lie tile after tile; runs of 1024 values are
permuted to the order in which a warp's tensor-core fragments want them, and eight consecutive codes
make an int32. Symmetric, groups of 128 or one group; K a multiple of 16, N of 64. There is no
kernel for it here: released `*-marlin-cpmcu` files are read, and files for CPM.cu are written.
"""

import functools

import numpy as np
from jaxtyping import Int32, Shaped, UInt8

from minicpm_jax.quant import gptq_format

_SINGLE = tuple(2 * a + b for a in range(4) for b in (0, 1, 8, 9, 16, 17, 24, 25))
_GROUPED = tuple(a + 8 * c for a in range(8) for c in range(8))


@functools.cache
def _order() -> tuple[int, ...]:
  """Source index, in a run of 1024, of every value."""
  found: list[int] = []
  for i in range(32):
    row = 2 * (i % 4)
    for j in range(4):
      eight = [
        16 * r + i // 4 + 8 * b + 256 * j for b in (0, 1) for r in (row, row + 1, row + 8, row + 9)
      ]
      found += [eight[k] for k in (0, 2, 4, 6, 1, 3, 5, 7)]
  return tuple(found)


def check_shape(num_in: int, num_out: int, name: str = "kernel") -> None:
  if num_in % 16 or num_out % 64:
    raise ValueError(
      f"{name}: found a kernel of {num_in} inputs and {num_out} outputs, expected multiples of 16 "
      "and 64 (Marlin tiles)"
    )


def pack(codes_IO: UInt8[np.ndarray, "I O"], name: str = "kernel") -> Int32[np.ndarray, "T W"]:
  """Codes 0..15 [K, N] to words [K/16, 2N]."""
  K, N = codes_IO.shape
  check_shape(K, N, name)
  rows = codes_IO.reshape(K // 16, 16, N // 16, 16).swapaxes(1, 2).reshape(-1, 1024)
  eights = rows[:, list(_order())].reshape(-1, 8)
  return gptq_format.pack_words(np.ascontiguousarray(eights.T), name).reshape(K // 16, 2 * N)


def unpack(words: Int32[np.ndarray, "T W"], name: str = "kernel") -> UInt8[np.ndarray, "I O"]:
  """Inverse of `pack`."""
  K, N = 16 * words.shape[0], words.shape[1] // 2
  check_shape(K, N, name)
  eights = gptq_format.unpack_words(words.reshape(1, -1)).T
  rows = np.empty((K * N // 1024, 1024), np.uint8)
  rows[:, list(_order())] = eights.reshape(-1, 1024)
  return np.ascontiguousarray(rows.reshape(K // 16, N // 16, 16, 16).swapaxes(1, 2).reshape(K, N))


def permute_scales(scale_QO: Shaped[np.ndarray, "Q O"]) -> Shaped[np.ndarray, "Q O"]:
  """Columns in the order of the file: runs of 64, or of 32 where there is one group."""
  order = list(_SINGLE if scale_QO.shape[0] == 1 else _GROUPED)
  runs = scale_QO.reshape(scale_QO.shape[0], -1, len(order))
  return np.ascontiguousarray(runs[:, :, order].reshape(scale_QO.shape))


def restore_scales(stored_QO: Shaped[np.ndarray, "Q O"]) -> Shaped[np.ndarray, "Q O"]:
  """Inverse of `permute_scales`."""
  order = list(_SINGLE if stored_QO.shape[0] == 1 else _GROUPED)
  runs = stored_QO.reshape(stored_QO.shape[0], -1, len(order))
  found = np.empty_like(runs)
  found[:, :, order] = runs
  return found.reshape(stored_QO.shape)
