"""Prefix tokens: outliers put in front once, their keys and values kept (MiniCPM4 4.1.2).

A few tokens (the first one, some delimiters) have inputs of down projections that are hundreds of
times larger than the others'. With static scales of activations they take the whole range. Put in
front of every text and run once in full precision, they do not come back behind: the model has its
attention sinks. The rule is PrefixQuant's (quantization.md 5.2); `deploy.prefix` runs a model for
it.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float, Int

from minicpm_jax.config import validate
from minicpm_jax.core import files, types

THRESHOLD = 64.0  # times the median over the sequence's tokens
LEAST_SHARE = 0.1  # of the sequences, for the one id that was found
TOKENS_FILE, VALUES_FILE = "prefixed_tokens.json", "prefixed_key_values.safetensors"


def is_outlier(
  size_BT: Float[np.ndarray, "B T"],
  keep_BT: Bool[np.ndarray, "B T"],
  threshold: float = THRESHOLD,
) -> Bool[np.ndarray, "B T"]:
  """Tokens whose largest |input| is above `threshold` times the median of their row's tokens."""
  if threshold <= 0:
    raise ValueError(f"threshold: found {threshold}, expected a factor > 0")
  size_BT, keep_BT = np.asarray(size_BT, np.float64), np.asarray(keep_BT, bool)
  found_BT = np.zeros(size_BT.shape, bool)
  for row, (size_T, keep_T) in enumerate(zip(size_BT, keep_BT, strict=True)):
    if keep_T.any():
      found_BT[row] = keep_T & (size_T > threshold * np.median(size_T[keep_T]))
  return found_BT


@dataclasses.dataclass
class Tally:
  """Outliers of calibration text: how many by layer, which token ids, in how many sequences."""

  num_layers: int
  threshold: float = THRESHOLD
  num_sequences: int = 0
  counts_L: Any = None
  ids: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def __post_init__(self):
    validate.require_hints(self, "Tally.", least=0)
    self.counts_L = np.zeros(self.num_layers)

  def add(
    self,
    tokens_BT: Int[np.ndarray, "B T"],
    sizes_LBT: Float[np.ndarray, "L B T"],
    keep_BT: Bool[np.ndarray, "B T"],
  ) -> None:
    """A batch, one sequence a row: max |x| of every token at the down projection of all layers."""
    if len(sizes_LBT) != self.num_layers:
      raise ValueError(f"sizes_LBT: found {len(sizes_LBT)} layers, expected {self.num_layers}")
    self.num_sequences += int(np.any(keep_BT, axis=1).sum())
    for layer, size_BT in enumerate(sizes_LBT):
      found_BT = is_outlier(size_BT, keep_BT, self.threshold)
      self.counts_L[layer] += found_BT.sum()
      self.ids.update(np.asarray(tokens_BT)[:, 1:][found_BT[:, 1:]].tolist())

  @property
  def num_outliers(self) -> int:
    """o = ceil(max over layers of the mean number of outliers a sequence)."""
    return math.ceil(self.counts_L.max() / max(1, self.num_sequences))

  def choose(self, bos_id: int) -> tuple[int, ...]:
    """The o most frequent ids that were outliers behind position 0, then BOS; () without outliers.

    A single id that was found in under a tenth as many places as there are sequences is left out.
    """
    if self.num_outliers == 0:
      return ()
    found = self.ids.most_common(self.num_outliers)
    if len(self.ids) == 1 and found[0][1] < LEAST_SHARE * self.num_sequences:
      found = []
    return (*(int(i) for i, _ in found), int(bos_id))


@flax.struct.dataclass
class Prefix:
  """Keys (rotated) and values of the prefix tokens at positions 0, 1, ..., never quantised.

  k: [L, P, K, H], v: [L, P, K, V]: what a cache of the model holds of these tokens.
  """

  k: Any
  v: Any
  tokens: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

  @property
  def length(self) -> int:
    return len(self.tokens)


def check(prefix: Prefix, num_layers: int, widths: tuple[int, int, int]) -> None:
  """Refuses a prefix of another model; widths = (heads, key width, value width)."""
  heads, k_width, v_width = widths
  for name, width in (("k", k_width), ("v", v_width)):
    found, wanted = tuple(getattr(prefix, name).shape), (num_layers, prefix.length, heads, width)
    if found != wanted:
      raise ValueError(f"prefix.{name}: found shape {found}, expected {wanted} (another model's?)")


def save(folder: str | pathlib.Path, prefix: Prefix) -> None:
  """Two files in `folder`: the ids, and keys and values (float32)."""
  arrays = {name: np.asarray(getattr(prefix, name), np.float32) for name in ("k", "v")}
  arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
  files.write(pathlib.Path(folder) / VALUES_FILE, safetensors.numpy.save(arrays))
  files.write_json(pathlib.Path(folder) / TOKENS_FILE, {"prefixed_tokens": list(prefix.tokens)})


def load(folder: str | pathlib.Path, dtype: Any = "f32") -> Prefix:
  """What `save` wrote; ValueError names the file and what is wrong with it."""
  folder = pathlib.Path(folder)
  for name in (TOKENS_FILE, VALUES_FILE):
    if not (folder / name).is_file():
      raise ValueError(f"{folder / name}: found no such file, expected a prefix that save() wrote")
  try:
    found = json.loads((folder / TOKENS_FILE).read_text())
    tokens = found["prefixed_tokens"] if isinstance(found, Mapping) else None
  except (ValueError, KeyError) as error:
    raise ValueError(f"{folder / TOKENS_FILE}: expected 'prefixed_tokens' ({error})") from error
  is_ids = isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)
  if not is_ids or not tokens:
    raise ValueError(f"{folder / TOKENS_FILE}: found {tokens!r:.80}, expected a list of token ids")
  try:
    arrays = safetensors.numpy.load_file(folder / VALUES_FILE)
  except (safetensors.SafetensorError, ValueError, OSError) as error:
    raise ValueError(f"{folder / VALUES_FILE}: expected a safetensors file ({error})") from error
  if set(arrays) != {"k", "v"}:
    raise ValueError(f"{folder / VALUES_FILE}: found tensors {sorted(arrays)}, expected k and v")
  for name, x in arrays.items():
    if x.ndim != 4 or x.shape[1] != len(tokens) or not np.all(np.isfinite(x)):
      raise ValueError(
        f"{folder / VALUES_FILE}: {name}: found shape {x.shape}"
        f"{'' if np.all(np.isfinite(x)) else ' with values that are not finite'}, expected finite "
        f"[layers, {len(tokens)}, heads, width]"
      )
  kind = types.dtype_of(dtype)
  return Prefix(arrays["k"].astype(kind), arrays["v"].astype(kind), tuple(tokens))
