"""Which tokens go in front (rules worked out by hand), and the files that keep them."""

import collections
import json

import numpy as np
import pytest

from minicpm_jax.quant import prefix


def test_outliers_are_above_64_times_the_median_of_their_row():
  size = np.array([[1, 1, 64, 64.1, 1, 999], [2, 2, 2, 129, 127, 2]], np.float32)
  keep = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
  wanted = [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
  np.testing.assert_array_equal(prefix.is_outlier(size, keep), np.array(wanted, bool))
  assert prefix.is_outlier(size, keep, 60.0)[0, 2]
  with pytest.raises(ValueError, match="threshold: found 0"):
    prefix.is_outlier(size, keep, 0.0)


def tally(tokens, outliers):
  """A tally of sequences where `outliers[layer]` lists (sequence, position)."""
  sizes = np.ones((len(outliers), *tokens.shape), np.float32)
  for layer, places in enumerate(outliers):
    for at in places:
      sizes[(layer, *at)] = 100
  found = prefix.Tally(len(outliers))
  half = len(tokens) // 2
  for part in (slice(0, half), slice(half, None)):  # streamed
    found.add(tokens[part], sizes[:, part], np.ones(tokens[part].shape, bool))
  return found


def test_the_most_frequent_ids_and_bos_last():
  """The reference's steps on a table: o from the fullest layer, ids from all, position 0 apart."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 30, (20, 12))
  layers = [[(b, 0) for b in range(20)], []]
  for b in range(20):
    layers[1] += [(b, 0), (b, 3 + b % 5)] + ([(b, 9)] if b < 5 else [])
  found = tally(tokens, layers)
  assert found.num_outliers == int(np.ceil((20 + 20 + 5) / 20))
  counts = collections.Counter(tokens[b, t] for b, t in layers[1] if t > 0)
  assert found.ids == counts
  chosen = found.choose(7)
  assert chosen[-1] == 7 and len(chosen) == 4 and len(set(chosen[:3])) == 3
  least = min(counts[i] for i in chosen[:3])
  assert all(counts[i] <= least for i in counts if i not in chosen)


def test_only_the_first_position_leaves_bos_alone():
  tokens = np.full((20, 8), 5)
  assert tally(tokens, [[(b, 0) for b in range(20)]]).choose(1) == (1,)
  assert tally(tokens, [[]]).choose(1) == ()
  one = [(b, 0) for b in range(20)] + [(3, 4)]
  assert tally(tokens, [one]).choose(1) == (1,)  # one id, 1 of 20 sequences
  assert tally(tokens, [[*one, (4, 4)]]).choose(1) == (5, 1)  # 2 of 20


def test_files(tmp_path):
  rng = np.random.default_rng(0)
  k, v = (rng.normal(size=(2, 3, 2, w)).astype(np.float32) for w in (8, 4))
  prefix.save(tmp_path / "p", prefix.Prefix(k, v, (9, 4, 1)))
  assert json.loads((tmp_path / "p/prefixed_tokens.json").read_text()) == {
    "prefixed_tokens": [9, 4, 1]
  }
  back = prefix.load(tmp_path / "p")
  np.testing.assert_array_equal(back.k, k)
  np.testing.assert_array_equal(back.v, v)
  assert back.tokens == (9, 4, 1) and back.length == 3
  prefix.check(back, 2, (2, 8, 4))
  with pytest.raises(ValueError, match=r"prefix.k: found shape \(2, 3, 2, 8\), expected"):
    prefix.check(back, 2, (2, 16, 4))


@pytest.mark.parametrize(
  "name, content, match",
  [
    ("prefixed_tokens.json", None, "prefixed_tokens.json: found no such file"),
    ("prefixed_tokens.json", b"[", "prefixed_tokens.json: expected 'prefixed_tokens'"),
    ("prefixed_tokens.json", b'{"prefixed_tokens": ["a"]}', "expected a list of token ids"),
    ("prefixed_tokens.json", b'{"prefixed_tokens": [1]}', r"expected finite .layers, 1, heads"),
    ("prefixed_key_values.safetensors", b"abc", "expected a safetensors file"),
  ],
)
def test_bad_files(tmp_path, name, content, match):
  x = np.ones((1, 2, 1, 4), np.float32)
  prefix.save(tmp_path, prefix.Prefix(x, x, (1, 2)))
  if content is None:
    (tmp_path / name).unlink()
  else:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=match):
    prefix.load(tmp_path)


def test_values_that_are_not_finite(tmp_path):
  x = np.full((1, 1, 1, 4), np.nan, np.float32)
  prefix.save(tmp_path, prefix.Prefix(x, x, (1,)))
  with pytest.raises(ValueError, match="k: found shape .* with values that are not finite"):
    prefix.load(tmp_path)
