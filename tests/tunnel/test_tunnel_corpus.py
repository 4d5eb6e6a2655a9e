"""Windows as a function of (seed, step)."""

import numpy as np
import pytest

from minicpm_jax.tunnel import corpus

TEXT = {"text": ["abcdefghij" * 50], "other": ["0123456789" * 40]}


def made() -> corpus.Corpus:
  return corpus.from_texts(TEXT, {"text": ["xyz" * 40]})


def test_rows_depend_on_seed_and_step_only():
  c = made()
  weights = (("text", 1.0),)
  a = c.starts(weights, seed=1, step=7, rows=64, seq_len=8)
  np.testing.assert_array_equal(a, c.starts(weights, seed=1, step=7, rows=64, seq_len=8))
  assert not np.array_equal(a, c.starts(weights, seed=1, step=8, rows=64, seq_len=8))
  assert not np.array_equal(a, c.starts(weights, seed=2, step=7, rows=64, seq_len=8))
  assert a.min() >= 0 and a.max() <= 500 - 9 and len(np.unique(a)) > 40


def test_mixture_shares_and_equal_places():
  c = made()
  pure = np.concatenate(
    [c.starts((("text", 1.0),), seed=0, step=s, rows=50, seq_len=8) for s in range(40)]
  )
  weights = (("text", 0.7), ("other", 0.3))
  mixed = np.concatenate([c.starts(weights, seed=0, step=s, rows=50, seq_len=8) for s in range(40)])
  low, high = c.spans["other"]
  is_other = (mixed >= low) & (mixed <= high - 9)
  assert np.mean(is_other) == pytest.approx(0.3, abs=0.03)
  np.testing.assert_array_equal(mixed[~is_other], pure[~is_other])


def test_stride_keeps_items_whole():
  c = made().with_source("items", np.arange(9 * 20) % 128, stride=9)
  starts = c.starts((("items", 1.0),), seed=0, step=0, rows=200, seq_len=8)
  offsets = starts - c.spans["items"][0]
  assert set(offsets % 9) == {0} and set(offsets // 9) == set(range(20))
  assert set(c.tokens[starts] % 9) == set((9 * np.arange(20)) % 128 % 9)


def test_vocabulary_follows_the_text_and_bytes_come_back():
  c = made()
  assert c.vocab_size == 128
  assert bytes(c.tokens[:10].astype(np.uint8)) == b"abcdefghij"
  wide = corpus.from_texts({"text": ["Wörter" * 20]}, {"text": ["ü" * 40]})
  assert wide.vocab_size == 256
  assert bytes(wide.tokens[:7].astype(np.uint8)).decode() == "Wörter"
  assert list(corpus.encode("aö", 128)) == [97, 63, 63]


def test_heldout_rows_and_folder(tmp_path):
  rows = made().heldout_rows("text", num_rows=5, seq_len=9)
  assert rows.ids.shape == (5, 10) and rows.mask.sum() == 45
  assert bytes(rows.ids[0].astype(np.uint8)) == b"xyzxyzxyzx"
  for i in range(300):
    (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20)
  c = corpus.from_folder(tmp_path, heldout_permille=200)
  assert len(c.tokens) > 2 * len(c.heldout["text"]) > 0  # about 4 to 1, by hash


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda: made().starts((("nope", 1.0),), seed=0, step=0, rows=1, seq_len=4), "'nope'"),
    (lambda: made().starts((("text", 1.0),), seed=0, step=0, rows=1, seq_len=600), "500 tokens"),
    (lambda: made().heldout_rows("text", num_rows=1, seq_len=500), "120 tokens"),
    (lambda: made().with_source("x", np.array([200])), "token 200"),
    (lambda: made().with_source("text", np.array([2])), "another name"),
    (lambda: corpus.from_texts({"text": []}, {}), "no text"),
    (lambda: corpus.Rows(np.zeros((2, 5)), np.zeros((2, 5))), "mask"),
  ],
)
def test_bad_corpora_are_named(call, match):
  with pytest.raises(ValueError, match=match):
    call()


def test_rows_and_vocabularies_that_do_not_exist():
  made = corpus.from_texts({"text": ["hello " * 50]}, {"text": ["hello " * 50]})
  with pytest.raises(ValueError, match="source: found 'zz', expected one of"):
    made.heldout_rows("zz", num_rows=2, seq_len=8)
  with pytest.raises(ValueError, match="num_rows: found 0"):
    made.heldout_rows("text", num_rows=0, seq_len=8)
  with pytest.raises(ValueError, match="vocab_size: found 100"):
    corpus.encode("a", 100)
