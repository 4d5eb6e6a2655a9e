"""Pieces to bytes: the GPT-2 byte alphabet and the SentencePiece conventions."""

import functools
import re

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """Character -> byte of byte-level BPE: printable bytes stand for themselves, the others follow
  from U+0100 on in their order (Radford et al. 2019)."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_bytes(piece: str) -> bytes:
  """Bytes of a byte-level BPE piece; characters outside the alphabet are kept as UTF-8."""
  table = byte_alphabet()
  return b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)


def sentencepiece_bytes(piece: str) -> bytes:
  """Bytes of a SentencePiece piece: <0xAB> is one byte, U+2581 is a space."""
  match = _BYTE_PIECE.fullmatch(piece)
  return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()
