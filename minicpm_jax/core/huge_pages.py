"""Weights in memory of large pages: a decode step on a CPU reads all of them once per token.

With pages of 4 KiB the walk through the page tables takes a tenth of that time. Linux gives 2 MiB
pages to memory that asks for them (`madvise`); XLA's own buffers do not ask.
"""

import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGN = 4096  # start of every array, bytes
_HUGE = 2**21
_SMALLEST = 2**16  # bytes; smaller arrays stay where they are
_DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32")


def place(tree: Any) -> Any:
  """`tree` with its large arrays copied into one block of large pages, where the system has them.

  The values and the structure are those given. Arrays spread over several devices, small ones, and
  those of types that numpy stores otherwise (int4) stay as they are. The block is freed with the
  last of its arrays. Without `madvise` (not Linux) nothing is copied.
  """
  if jax.default_backend() != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
    return tree
  leaves, structure = jax.tree.flatten(tree)
  moved = {i: np.asarray(x) for i, x in enumerate(leaves) if _is_movable(x)}
  size = sum(-(-x.nbytes // _ALIGN) * _ALIGN for x in moved.values())
  if not moved:
    return tree
  block = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  try:
    block.madvise(mmap.MADV_HUGEPAGE)
  except OSError:  # a kernel built without them
    return tree
  memory = np.frombuffer(block, np.uint8)
  start = -memory.ctypes.data % _HUGE
  for i, x in moved.items():
    view = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    view[...] = x
    start += -(-x.nbytes // _ALIGN) * _ALIGN
    place = leaves[i].sharding if leaves[i].committed else None  # its own device, not the default
    leaves[i] = jax.device_put(view, place, may_alias=True)
  return jax.tree.unflatten(structure, leaves)


def _is_movable(x: Any) -> bool:
  is_local = isinstance(x, jax.Array) and x.is_fully_addressable and len(x.devices()) == 1
  return is_local and x.nbytes >= _SMALLEST and jnp.dtype(x.dtype).name in _DTYPES
