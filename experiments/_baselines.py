"""Text-compression baselines for bits per byte: an interpolated byte n-gram model and gzip."""

import gzip

import numpy as np


def ngram_bits_per_byte(train: bytes, heldout: bytes, order: int = 5) -> float:
  """Bits per byte of `heldout` under a Witten-Bell interpolated byte model of `train`.

  p_k(c | h_k) = (n(h_k c) + t(h_k) p_{k-1}(c | h_{k-1})) / (n(h_k) + t(h_k)), where n counts
  occurrences in `train`, t(h) the distinct bytes seen after h, and p_{-1} is uniform over 256
  (Witten and Bell 1991; Chen and Goodman 1998, section 2.5). `order` - 1 bytes of context.
  """
  if not train or not heldout:
    raise ValueError(f"n-gram baseline: {len(train)} training and {len(heldout)} held-out bytes")
  if not 1 <= order <= 8:
    raise ValueError(f"order: found {order}, expected 1..8 (8 bytes fit a 64-bit key)")
  prob = np.full(len(heldout), 1 / 256)
  for k in range(order):
    keys, counts = np.unique(_grams(train, k + 1), return_counts=True)
    contexts, first = np.unique(keys >> np.uint64(8), return_index=True)
    context_total = np.add.reduceat(counts, first)
    context_types = np.diff(np.append(first, len(keys)))
    query = _grams(heldout, k + 1)
    n_hc = _lookup(keys, counts, query)
    n_h = _lookup(contexts, context_total, query >> np.uint64(8))
    t_h = _lookup(contexts, context_types, query >> np.uint64(8))
    seen = n_h > 0
    longer = prob[k:]  # the first k positions have no full context: they keep the shorter model
    longer[seen] = ((n_hc + t_h * longer) / np.maximum(n_h + t_h, 1))[seen]
  return float(-np.log2(prob).mean())


def _grams(text: bytes, k: int) -> np.ndarray:
  """uint64 keys of all k-grams: earlier bytes in higher positions."""
  data = np.frombuffer(text, np.uint8).astype(np.uint64)
  keys = np.zeros(len(data) - k + 1, np.uint64)
  for i in range(k):
    keys = (keys << np.uint64(8)) | data[i : len(data) - k + 1 + i]
  return keys


def _lookup(keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
  """values[keys == query], 0 where the sorted `keys` lack it."""
  at = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
  return np.where(keys[at] == query, values[at], 0).astype(np.float64)


def gzip_bits_per_byte(heldout: bytes) -> float:
  """Bits per byte of `gzip -9` on the held-out text itself."""
  if not heldout:
    raise ValueError("gzip baseline: 0 held-out bytes")
  return 8 * len(gzip.compress(heldout, 9)) / len(heldout)
