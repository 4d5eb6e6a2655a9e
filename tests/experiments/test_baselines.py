"""The n-gram baseline against a direct dictionary implementation of its formula."""

import gzip
import math
from collections import Counter, defaultdict

import pytest

from experiments import _baselines


def slow_witten_bell(train: bytes, heldout: bytes, order: int) -> float:
  counts, followers = Counter(), defaultdict(set)
  for k in range(order):
    for i in range(k, len(train)):
      counts[train[i - k : i], train[i]] += 1
      followers[train[i - k : i]].add(train[i])
  totals = Counter()
  for (h, _), n in counts.items():
    totals[h] += n
  bits = 0.0
  for i, c in enumerate(heldout):
    p = 1 / 256
    for k in range(min(order, i + 1)):
      h = heldout[i - k : i]
      if totals[h]:
        t = len(followers[h])
        p = (counts[h, c] + t * p) / (totals[h] + t)
    bits -= math.log2(p)
  return bits / len(heldout)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_ngram_equals_the_formula(order):
  train = b"the cat sat on the mat; the dog sat on the log. " * 3 + bytes(range(40))
  heldout = b"the dog on the mat sat \xff\xfe and the cat"
  got = _baselines.ngram_bits_per_byte(train, heldout, order)
  assert got == pytest.approx(slow_witten_bell(train, heldout, order), abs=1e-12)


def test_bits_of_gzip():
  text = b"abc" * 100
  assert _baselines.gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / 300


def test_empty_text_is_refused():
  with pytest.raises(ValueError, match="0 held-out bytes"):
    _baselines.gzip_bits_per_byte(b"")
  with pytest.raises(ValueError, match="held-out"):
    _baselines.ngram_bits_per_byte(b"a", b"")
