"""64-bit hashes of words, characters and their n-grams, as numpy arrays.

Shared by repetition filters, MinHash and decontamination. Hashes depend on the text only (never on
Python's seeded `hash`), so every worker and machine agrees.
"""

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U000323af]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=2)
def tokens(text: str) -> tuple[str, ...]:
  """Words (letters, digits, inner apostrophes) and single symbols, in order."""
  return tuple(_TOKEN.findall(text))


@functools.lru_cache(maxsize=2)
def words(text: str) -> tuple[str, ...]:
  """`tokens` without the symbols."""
  return tuple(_WORD.findall(text))


def is_cjk(text: str) -> bool:
  """True when at least a quarter of the non-space characters are Chinese or Japanese letters."""
  if text[:5000].isascii():
    return False
  head = "".join(text[:5000].split())
  return 4 * len(_CJK.findall(head)) >= max(1, len(head))


def mix(values: np.ndarray) -> np.ndarray:
  """splitmix64's finaliser: spreads every input bit over all 64 output bits."""
  with np.errstate(over="ignore"):
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


class _WordHashes(dict):
  """word -> hash, filled on demand; emptied when it gets large."""

  def __missing__(self, word: str) -> int:
    if len(self) >= 400_000:
      self.clear()
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    self[word] = int.from_bytes(digest, "little")
    return self[word]


_WORD_HASHES = _WordHashes()


def word_hashes(sequence: Sequence[str]) -> np.ndarray:
  """uint64 hash of each word."""
  hashes = map(_WORD_HASHES.__getitem__, sequence)
  return np.fromiter(hashes, dtype=np.uint64, count=len(sequence))


def char_hashes(text: str) -> np.ndarray:
  """uint64 hash of each character."""
  return mix(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64) + 1)


def ngram_hashes(hashes: np.ndarray, size: int) -> np.ndarray:
  """uint64 hash of each run of `size` neighbours; empty when there are fewer."""
  count = len(hashes) - size + 1
  if count <= 0:
    return np.zeros(0, np.uint64)
  total = hashes[:count].copy()
  for offset in range(1, size):
    total *= _MULTIPLIER
    total += hashes[offset : offset + count]
  return mix(total)


def repeats(hashes: np.ndarray) -> np.ndarray:
  """Bool per position: has an earlier position the same hash?"""
  order = np.argsort(hashes, kind="stable")
  ordered = hashes[order]
  found = np.zeros(len(hashes), bool)
  found[order[1:][ordered[1:] == ordered[:-1]]] = True
  return found
