"""Tensors of a GPTQ linear layer (quantization.md 8.1): codes and zero points in int32 words.

  qweight [in/8, out]   word r: codes of inputs 8r .. 8r+7, the first in the lowest bits
  qzeros  [in/g, out/8] zero points packed along the outputs the same way
  scales  [in/g, out]   float16
  g_idx   [in]          group of every input
  w[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

Version "gptq" (v1) stores zero - 1, modulo 16; "gptq_v2" stores it as it is. Words are taken as
unsigned: a top code of 8 or more makes the int32 negative.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float16, Int32, UInt8

Version = Literal["gptq", "gptq_v2"]
VERSIONS = ("gptq", "gptq_v2")
SYMMETRIC_ZERO = 8  # stored as 0x77777777 (v1) or 0x88888888 (v2)
_SHIFTS = np.arange(8, dtype=np.uint32) * np.uint32(4)


class Tensors(NamedTuple):
  """One layer as stored."""

  qweight: Int32[np.ndarray, "words out"]
  qzeros: Int32[np.ndarray, "groups zero_words"]
  scales: Float16[np.ndarray, "groups out"]
  g_idx: Int32[np.ndarray, "in"]


class Codes(NamedTuple):
  """One layer decoded: codes and zeros are 0..15."""

  codes_IO: UInt8[np.ndarray, "I O"]
  scale_QO: Float16[np.ndarray, "Q O"]
  zero_QO: UInt8[np.ndarray, "Q O"]
  g_idx_I: Int32[np.ndarray, " I"]


def pack_words(codes: UInt8[np.ndarray, "rows cols"], name: str = "codes") -> np.ndarray:
  """Eight 4-bit codes along axis 0 to one int32, the first in the lowest bits."""
  rows, cols = codes.shape
  if rows % 8:
    raise ValueError(f"{name}: found {rows} rows of codes, expected a multiple of 8")
  if codes.size and codes.max() > 15:
    raise ValueError(f"{name}: found code {codes.max()}, expected 0..15")
  parts = codes.reshape(rows // 8, 8, cols).astype(np.uint32) << _SHIFTS[None, :, None]
  return np.bitwise_or.reduce(parts, axis=1).view(np.int32)


def unpack_words(words: Int32[np.ndarray, "rows cols"]) -> UInt8[np.ndarray, "rows8 cols"]:
  """The codes of int32 words, eight along axis 0 for each."""
  parts = np.ascontiguousarray(words).view(np.uint32)[:, None] >> _SHIFTS[None, :, None]
  return (parts & np.uint32(15)).astype(np.uint8).reshape(-1, words.shape[1])


def encode(layer: Codes, version: Version = "gptq", name: str = "layer") -> Tensors:
  """The tensors of a layer; refuses scales beyond float16 and widths that are no whole words."""
  if version not in VERSIONS:
    raise ValueError(f"checkpoint_format: found {version!r}, expected one of {VERSIONS}")
  if layer.zero_QO.size and layer.zero_QO.max() > 15:  # v1 would wrap it to another one
    raise ValueError(f"{name}.qzeros: found zero point {layer.zero_QO.max()}, expected 0..15")
  zeros = layer.zero_QO if version == "gptq_v2" else (layer.zero_QO - np.uint8(1)) & np.uint8(15)
  return Tensors(
    pack_words(layer.codes_IO, f"{name}.qweight"),
    np.ascontiguousarray(pack_words(np.ascontiguousarray(zeros.T), f"{name}.qzeros").T),
    np.asarray(layer.scale_QO, np.float16),
    np.asarray(layer.g_idx_I, np.int32),
  )


def decode(
  t: Tensors,
  version: Version,
  *,
  group_size: int,
  is_symmetric: bool,
  name: str = "layer",
) -> Codes:
  """Checked codes of a stored layer; every refusal names the tensor.

  A symmetric file whose zero points are not the constant, a group outside the scales, or a scale
  that is not finite means damaged words or a wrong checkpoint_format.
  """

  def refuse(what: str, found: object, expected: str) -> None:
    raise ValueError(f"{name}.{what}: found {found}, expected {expected}")

  if version not in VERSIONS:
    raise ValueError(f"checkpoint_format: found {version!r}, expected one of {VERSIONS}")
  num_in, num_out = 8 * t.qweight.shape[0], t.qweight.shape[1]
  size = num_in if group_size == -1 else group_size
  if size <= 0 or num_in % size:
    refuse("qweight", f"{num_in} inputs", f"a multiple of group_size {group_size}")
  groups = num_in // size
  for what, wanted in (
    ("scales", (groups, num_out)),
    ("qzeros", (groups, num_out // 8)),
    ("g_idx", (num_in,)),
  ):
    if getattr(t, what).shape != wanted:
      refuse(what, f"shape {getattr(t, what).shape}", f"{wanted} for group_size {group_size}")
  if not np.all(np.isfinite(t.scales.astype(np.float32))):
    refuse("scales", "inf or nan", "finite numbers (damaged file?)")
  if t.g_idx.size and not 0 <= t.g_idx.min() <= t.g_idx.max() < groups:
    refuse("g_idx", f"groups {t.g_idx.min()}..{t.g_idx.max()}", f"0..{groups - 1}")
  counts = np.bincount(t.g_idx, minlength=groups)
  if np.any(counts != size):
    refuse("g_idx", f"{counts.min()} to {counts.max()} inputs a group", f"{size} in every group")
  zeros = np.ascontiguousarray(unpack_words(np.ascontiguousarray(t.qzeros.T)).T)
  if version == "gptq":
    zeros = (zeros + np.uint8(1)) & np.uint8(15)
  if is_symmetric and np.any(zeros != SYMMETRIC_ZERO):
    word = next(w for w in t.qzeros.ravel().view(np.uint32) if w != _constant(version))
    refuse(
      "qzeros",
      f"word 0x{word:08x}",
      f"0x{_constant(version):08x} (sym is true, checkpoint_format {version!r}): damaged words or "
      "another checkpoint_format",
    )
  return Codes(unpack_words(t.qweight), t.scales, zeros, t.g_idx)


def _constant(version: Version) -> int:
  return 0x77777777 if version == "gptq" else 0x88888888
