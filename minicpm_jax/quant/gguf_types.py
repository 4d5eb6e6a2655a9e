"""Block types of GGUF files: Q8_0, Q4_0, Q4_1, TQ1_0, TQ2_0, Q2_0 and the plain floats, in numpy.

A row is cut into blocks; a block holds codes and an f16 scale d (Q4_1 also a minimum m). Bytes are
those of the gguf package's packers (quantization.md 2.1); Q2_0 (id 42, blocks of 64) is younger
than that package. The scale is computed from the block, so weights that are already ternary come
back exactly only if all values of a block share one magnitude that float16 holds: per-channel
scales or groups that are a multiple of the block.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

Blocks = Float[np.ndarray, "blocks width"]
Bytes = UInt8[np.ndarray, "blocks size"]


class BlockType(NamedTuple):
  name: str
  width: int  # values in a block
  size: int  # bytes in a block

  @property
  def bits(self) -> float:
    """Bits a weight."""
    return 8 * self.size / self.width


TYPES: Mapping[str, BlockType] = {
  t.name: t
  for t in (
    BlockType("f32", 1, 4),
    BlockType("f16", 1, 2),
    BlockType("bf16", 1, 2),
    BlockType("q4_0", 32, 18),
    BlockType("q4_1", 32, 20),
    BlockType("q8_0", 32, 34),
    BlockType("tq1_0", 256, 54),
    BlockType("tq2_0", 256, 66),
    BlockType("q2_0", 64, 18),
  )
}
_FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


def block_type(kind: str) -> BlockType:
  if kind not in TYPES:
    raise ValueError(f"GGUF type: found {kind!r}, expected one of {sorted(TYPES)}")
  return TYPES[kind]


def pack(x: Float[np.ndarray, "*rows width"], kind: str) -> UInt8[np.ndarray, "*rows size"]:
  """Bytes of every row in type `kind`; ValueError where rows are no whole blocks or not finite."""
  t = block_type(kind)
  if x.shape[-1] % t.width:
    raise ValueError(
      f"{kind}: found rows of {x.shape[-1]} values, expected a multiple of the block, {t.width}"
    )
  x = np.ascontiguousarray(x, np.float32)
  if not np.all(np.isfinite(x)):
    raise ValueError(f"{kind}: found inf or nan, expected finite weights")
  shape = (*x.shape[:-1], x.shape[-1] // t.width * t.size)
  if kind in _FLOATS:
    with np.errstate(over="ignore"):
      stored = x.astype(_FLOATS[kind])
    if not np.all(np.isfinite(stored)):
      raise ValueError(f"{kind}: found {np.abs(x).max():.6g}, expected what the type can hold")
    return stored.view(np.uint8).reshape(shape)
  return _PACK[kind](x.reshape(-1, t.width)).reshape(shape)


def pack_q4_0(
  codes: UInt8[np.ndarray, "rows width"], scale: Float[np.ndarray, "rows groups"]
) -> UInt8[np.ndarray, "rows size"]:
  """Q4_0 bytes of given codes 0..15 and group scales, value = scale (code - 8): nothing is rounded
  but the scale to float16. Groups must be whole blocks of 32."""
  rows, width = codes.shape
  size = width // scale.shape[1]
  if size % 32 or size * scale.shape[1] != width:
    raise ValueError(
      f"q4_0: found {scale.shape[1]} groups in rows of {width}, expected groups of whole blocks, 32"
    )
  if codes.size and codes.max() > 15:
    raise ValueError(f"q4_0: found code {codes.max()}, expected 0..15")
  d = np.repeat(scale.astype(np.float32), size // 32, axis=1).reshape(-1, 1)
  blocks = np.concatenate([_half_bytes(d), _nibbles(codes.reshape(-1, 32))], axis=-1)
  return blocks.reshape(rows, width // 32 * 18)


def unpack(data: UInt8[np.ndarray, "*rows size"], kind: str) -> Float[np.ndarray, "*rows width"]:
  """float32 values of rows of bytes in type `kind`."""
  t = block_type(kind)
  if data.shape[-1] % t.size:
    raise ValueError(
      f"{kind}: found rows of {data.shape[-1]} bytes, expected a multiple of the block, {t.size}"
    )
  shape = (*data.shape[:-1], data.shape[-1] // t.size * t.width)
  data = np.ascontiguousarray(data)
  if kind in _FLOATS:
    return data.view(_FLOATS[kind]).astype(np.float32).reshape(shape)
  return _UNPACK[kind](data.reshape(-1, t.size)).reshape(shape)


def _half_bytes(d: Float[np.ndarray, "blocks one"]) -> UInt8[np.ndarray, "blocks two"]:
  with np.errstate(over="ignore"):
    half = d.astype(np.float16)
  if not np.all(np.isfinite(half)):
    raise ValueError(f"scale: found {np.abs(d).max():.6g}, expected at most 65504 (float16)")
  return half.view(np.uint8)


def _half(raw: UInt8[np.ndarray, "blocks two"]) -> Float[np.ndarray, "blocks one"]:
  return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _inverse(d: Float[np.ndarray, "blocks one"]) -> Float[np.ndarray, "blocks one"]:
  return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _round_away(x: Blocks) -> Blocks:
  """Halves away from zero, as C's roundf; numpy rounds them to even."""
  whole = np.trunc(x)
  return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), np.float32(0))


def _amax(x: Blocks) -> Float[np.ndarray, "blocks one"]:
  return np.abs(x).max(axis=-1, keepdims=True)


def _pack_q8_0(x: Blocks) -> Bytes:
  d = _amax(x) / np.float32(127)
  codes = _round_away(x * _inverse(d)).astype(np.int8)
  return np.concatenate([_half_bytes(d), codes.view(np.uint8)], axis=-1)


def _unpack_q8_0(raw: Bytes) -> Blocks:
  return _half(raw[:, :2]) * np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float32)


def _nibbles(codes: UInt8[np.ndarray, "blocks 32"]) -> UInt8[np.ndarray, "blocks 16"]:
  """Value j in the low half of byte j, value j + 16 in its high half."""
  return codes[:, :16] | (codes[:, 16:] << np.uint8(4))


def _from_nibbles(raw: UInt8[np.ndarray, "blocks 16"]) -> Float[np.ndarray, "blocks 32"]:
  return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1).astype(np.float32)


def _pack_q4_0(x: Blocks) -> Bytes:
  """The value of largest magnitude gets code 0, that is -8: d carries its sign."""
  peak = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
  d = peak / np.float32(-8)
  codes = np.trunc(x * _inverse(d) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
  return np.concatenate([_half_bytes(d), _nibbles(codes)], axis=-1)


def _unpack_q4_0(raw: Bytes) -> Blocks:
  return _half(raw[:, :2]) * (_from_nibbles(raw[:, 2:]) - np.float32(8))


def _pack_q4_1(x: Blocks) -> Bytes:
  low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
  d = (high - low) / np.float32(15)
  codes = np.trunc((x - low) * _inverse(d) + np.float32(0.5)).clip(0, 15).astype(np.uint8)
  return np.concatenate([_half_bytes(d), _half_bytes(low), _nibbles(codes)], axis=-1)


def _unpack_q4_1(raw: Bytes) -> Blocks:
  return _half(raw[:, :2]) * _from_nibbles(raw[:, 4:]) + _half(raw[:, 2:4])


def _ternary_codes(
  x: Blocks,
) -> tuple[Float[np.ndarray, "blocks one"], UInt8[np.ndarray, "blocks width"]]:
  d = _amax(x)
  return d, (_round_away(x * _inverse(d)).astype(np.int8) + np.int8(1)).astype(np.uint8)


def _pack_tq2_0(x: Blocks) -> Bytes:
  d, codes = _ternary_codes(x)
  parts = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
  return np.concatenate([np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64), _half_bytes(d)], -1)


def _unpack_tq2_0(raw: Bytes) -> Blocks:
  qs = raw[:, :64].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
  codes = (qs & np.uint8(3)).reshape(-1, 256).astype(np.float32)
  return _half(raw[:, 64:]) * (codes - np.float32(1))


# TQ1_0: (first value, bytes, digits of a byte); byte m holds values first + m + bytes * j.
_RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))


def _pack_tq1_0(x: Blocks) -> Bytes:
  d, codes = _ternary_codes(x)
  parts = []
  for first, size, digits in _RUNS:
    trits = codes[:, first : first + size * digits].reshape(-1, digits, size).astype(np.uint16)
    number = np.sum(trits * _POWERS[:digits, None], axis=1, dtype=np.uint16)
    parts.append(((number * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8))
  return np.concatenate([*parts, _half_bytes(d)], axis=-1)


def _unpack_tq1_0(raw: Bytes) -> Blocks:
  parts, start = [], 0
  for _, size, digits in _RUNS:
    run = raw[:, start : start + size].astype(np.uint16)[:, None, :]
    shifted = run * _POWERS[::-1][:digits, None] & np.uint16(255)
    parts.append((shifted * np.uint16(3) >> np.uint16(8)).reshape(len(raw), -1))
    start += size
  codes = np.concatenate(parts, axis=-1).astype(np.float32)
  return _half(raw[:, 52:]) * (codes - np.float32(1))


def _pack_q2_0(x: Blocks) -> Bytes:
  d, codes = _ternary_codes(x)
  parts = codes.reshape(-1, 16, 4) << np.array([0, 2, 4, 6], np.uint8)
  return np.concatenate([_half_bytes(d), np.bitwise_or.reduce(parts, axis=2)], axis=-1)


def _unpack_q2_0(raw: Bytes) -> Blocks:
  codes = raw[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
  return _half(raw[:, :2]) * (codes.reshape(-1, 64).astype(np.float32) - np.float32(1))


_PACK: Mapping[str, Callable[[Blocks], Bytes]] = {
  "q8_0": _pack_q8_0,
  "q4_0": _pack_q4_0,
  "q4_1": _pack_q4_1,
  "tq1_0": _pack_tq1_0,
  "tq2_0": _pack_tq2_0,
  "q2_0": _pack_q2_0,
}
_UNPACK: Mapping[str, Callable[[Bytes], Blocks]] = {
  "q8_0": _unpack_q8_0,
  "q4_0": _unpack_q4_0,
  "q4_1": _unpack_q4_1,
  "tq1_0": _unpack_tq1_0,
  "tq2_0": _unpack_tq2_0,
  "q2_0": _unpack_q2_0,
}
