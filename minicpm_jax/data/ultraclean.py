"""The text form that UltraClean's fastText classifiers read (data.md 2.2, MiniCPM4 section 2.2.1).

`normalise` turns a document into one line, in the exact order of the released preprocessing:
shorten runs of line feeds, lower-case, NFKD without combining marks, segment, spell LF CR TAB out,
collapse spaces. The segmenter and the way its pieces are written are part of a model: a model's
sidecar records them (`data/classifier.py`).
"""

import dataclasses
import functools
import re
import sys
import unicodedata
from typing import Literal, Protocol, runtime_checkable

from minicpm_jax.config import validate
from minicpm_jax.data import shards
from minicpm_jax.text import bytes_map
from minicpm_jax.text import tokenizer as tokenizer_lib

PieceMode = Literal["decode", "bytes"]
NORMALISER = "ultraclean-1"  # changes when `normalise` does
MAX_CHARS = 200_000

_LINE_FEEDS = re.compile("\n{3,}")
_SPACES = re.compile(" +")
_WHITESPACE_PIECE = re.compile(r"[^\s]+|[\n\r\t]+")
_CHARACTER_PIECE = re.compile(r"\n\n|[\n\r\t]|[^\s]")


@runtime_checkable
class Segmenter(Protocol):
  """Splits a string into the classifier's words; `identity` is what a sidecar records."""

  piece_mode: PieceMode

  @property
  def identity(self) -> str: ...
  def words(self, text: str) -> list[str]: ...


def normalise(text: str, segmenter: Segmenter, *, max_chars: int = MAX_CHARS) -> str:
  """`text` as one line of space-separated words; "" where nothing is left.

  Only the first `max_chars` characters are used, so that one page cannot stall a worker.
  """
  text = fold(text[:max_chars])
  return " ".join(segmenter.words(text)) if text else ""


def fold(text: str) -> str:
  """Steps 1 to 3: at most two line feeds in a row, lower case, NFKD, no code points of class Mn."""
  if "\n\n\n" in text:
    text = _LINE_FEEDS.sub("\n\n", text)
  text = text.lower()
  if text.isascii():
    return text
  return _marks().sub("", unicodedata.normalize("NFKD", text))


@functools.cache
def _marks() -> re.Pattern[str]:
  """Matches runs of characters of Unicode category Mn."""
  points = [i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Mn"]
  ranges, start = [], points[0]
  for point, following in zip(points, [*points[1:], -1], strict=True):
    if following != point + 1:
      ranges.append(f"{re.escape(chr(start))}-{re.escape(chr(point))}")
      start = following
  return re.compile(f"[{''.join(ranges)}]+")


def escape(piece: str) -> str:
  """Steps 5 and 6 on one piece: LF, CR, TAB spelled out, spaces collapsed and stripped."""
  piece = piece.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
  return _SPACES.sub(" ", piece).strip(" ")


# --- Segmenters ----------------------------------------------------------------------------------


@dataclasses.dataclass
class TokenizerSegmenter:
  """The pieces of a tokenizer, each decoded on its own.

  "decode" is what the released models read: a piece that is no UTF-8 becomes U+FFFD, so a
  byte-level BPE merges rare characters into one word. "bytes" writes a piece's bytes in the
  printable alphabet of byte-level BPE, one to one; white space stays inside the words then.
  """

  tokenizer: tokenizer_lib.Tokenizer
  piece_mode: PieceMode = "bytes"

  def __post_init__(self):
    if self.piece_mode not in ("decode", "bytes"):
      raise ValueError(f"piece_mode: found {self.piece_mode!r}, expected 'decode' or 'bytes'")
    self._words: dict[int, str] = {}

  def __repr__(self) -> str:  # the executor takes a stage's repr as its identity
    return f"TokenizerSegmenter({self.identity!r}, piece_mode={self.piece_mode!r})"

  @functools.cached_property
  def identity(self) -> str:
    return f"tokenizer:{shards.tokenizer_hash(self.tokenizer)}"

  def words(self, text: str) -> list[str]:
    known = self._words
    out = []
    for i in self.tokenizer.encode(text):
      word = known.get(i)
      if word is None:
        word = known[i] = self._word(i)
      if word:
        out.append(word)
    return out

  def _word(self, token_id: int) -> str:
    if self.piece_mode == "decode":
      return escape(self.tokenizer.decode([token_id], skip_special=False))
    return _printable(self.tokenizer.decode_bytes([token_id], skip_special=False))


@functools.cache
def _alphabet() -> dict[int, str]:
  return {byte: character for character, byte in bytes_map.byte_alphabet().items()}


def _printable(data: bytes) -> str:
  table = _alphabet()
  return "".join(table[byte] for byte in data)


@dataclasses.dataclass(frozen=True)
class WhitespaceSegmenter:
  """Words between white space; runs of LF, CR and TAB are words of their own. For English."""

  piece_mode: PieceMode = "decode"

  def __post_init__(self):
    validate.require_hints(self, "WhitespaceSegmenter.")

  @property
  def identity(self) -> str:
    return "whitespace"

  def words(self, text: str) -> list[str]:
    return _split(_WHITESPACE_PIECE, text)


@dataclasses.dataclass(frozen=True)
class CharacterSegmenter:
  """Single characters; LF LF is one word. For Chinese and Japanese."""

  piece_mode: PieceMode = "decode"

  def __post_init__(self):
    validate.require_hints(self, "CharacterSegmenter.")

  @property
  def identity(self) -> str:
    return "character"

  def words(self, text: str) -> list[str]:
    return _split(_CHARACTER_PIECE, text)


def _split(pattern: re.Pattern[str], text: str) -> list[str]:
  return [escape(w) if w[0] in "\n\r\t" else w for w in pattern.findall(text)]
