"""One safetensors file: header checks, tensor-by-tensor reading and writing.

Plain reads instead of the package's memory map, so that what was read does not stay in the
process's memory, and a writer that holds one tensor at a time. Layout: 8 bytes little-endian header
length, JSON header {name: {dtype, shape, data_offsets}}, then the tensors without gaps.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from minicpm_jax.ckpt import errors

DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
INTEGERS = {"I32": jnp.int32}  # words of packed codes: read and written only where asked for
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_SIZES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes a number, of what may be beside the model
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors package
_LFS = b"version https://git-lfs"


class TensorInfo(NamedTuple):
  dtype: str  # as in the header: F32, BF16, ...
  shape: tuple[int, ...]
  start: int  # byte offset in the file
  end: int


class Reader:
  """A checked header; `read(name)` fetches one tensor."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    size = path.stat().st_size
    with open(path, "rb") as f:
      head = f.read(max(8, len(_LFS)))
      if head.startswith(_LFS):
        raise errors.CheckpointError(f"{path}: found a Git LFS pointer, run `git lfs pull` first")
      length = int.from_bytes(head[:8], "little")
      if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise errors.CheckpointError(
          f"{path}: truncated or not safetensors: found {size} bytes, expected a header of "
          f"{length} bytes (given by the first 8 bytes) and the tensors"
        )
      f.seek(8)
      text = f.read(length)
    try:
      header = json.loads(text)
      self.metadata = header.pop("__metadata__", None) or {}
      self.tensors = {name: _info(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise errors.CheckpointError(f"{path}: the header is not that of safetensors") from error
    self._check_layout(8 + length, size)

  def _check_layout(self, begin: int, size: int) -> None:
    for name, info in sorted(self.tensors.items(), key=lambda item: item[1].start):
      if info.start != begin or info.end < info.start:
        raise errors.CheckpointError(
          f"{self.path}: {name}: found bytes {info.start}..{info.end}, expected a start at {begin}"
        )
      begin, size_each = info.end, _SIZES.get(info.dtype)
      if size_each and info.end - info.start != math.prod(info.shape) * size_each:
        raise errors.CheckpointError(
          f"{self.path}: {name}: found {info.end - info.start} bytes, expected shape "
          f"{list(info.shape)} of {info.dtype}"
        )
    if begin != size:
      what = "truncated" if size < begin else "found data after the last tensor"
      raise errors.CheckpointError(
        f"{self.path}: {what}: found {size} bytes, expected {begin} (from its header)"
      )

  def read(self, name: str, *, is_words: bool = False) -> Shaped[np.ndarray, "..."]:
    """A fresh array with the tensor; refuses dtypes that are not floats of 16 or 32 bits.

    `is_words` asks for int32 instead.
    """
    info, allowed = self.tensors[name], INTEGERS if is_words else DTYPES
    if info.dtype not in allowed:
      raise errors.CheckpointError(
        f"{self.path}: {name}: found dtype {info.dtype}, expected one of {list(allowed)}"
      )
    dtype = np.dtype(allowed[info.dtype])
    raw = np.fromfile(self.path, np.uint8, count=info.end - info.start, offset=info.start)
    if raw.size != info.end - info.start:
      raise errors.CheckpointError(
        f"{self.path}: {name}: truncated: found {raw.size} bytes, expected {info.end - info.start}"
      )
    return raw.view(dtype).reshape(info.shape)


def _info(entry: dict[str, Any], begin: int) -> TensorInfo:
  shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
  if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
    raise ValueError(f"found shape {shape} and bytes {start}..{end}, expected integers >= 0")
  return TensorInfo(str(entry["dtype"]), shape, begin + start, begin + end)


def ordered(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> list[str]:
  """Names as `write` orders them: wide dtypes first, so that every tensor starts aligned."""
  return sorted(tensors, key=lambda name: -np.dtype(tensors[name][0]).itemsize)


def write(
  path: pathlib.Path,
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  fetch: Callable[[str], np.ndarray],
) -> None:
  """Writes `fetch(name)` for every name of `tensors` (dtype and shape), one at a time."""
  names = {np.dtype(dtype): name for name, dtype in (DTYPES | INTEGERS).items()}
  order = ordered(tensors)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name in order:
    dtype, shape = tensors[name]
    start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    entry = {"dtype": names[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    header[name] = entry
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as f:
    f.write(len(text).to_bytes(8, "little"))
    f.write(text)
    for name in order:
      x = np.ascontiguousarray(fetch(name))
      assert (x.dtype, x.shape) == (np.dtype(tensors[name][0]), tensors[name][1]), name
      f.write(x.reshape(-1).view(np.uint8).data)
    f.flush()
    os.fsync(f.fileno())
