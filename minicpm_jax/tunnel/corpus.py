"""Token arrays for small runs: which windows a step reads is a function of (seed, step) alone.

A small run reads rows of `seq_len + 1` tokens cut anywhere out of one array that stays on the
device. Because the rows of step s depend on (data seed, s, batch size) and on nothing that happened
before, a branch reads exactly what a fresh run would, and every run of a sweep the same rows.
Larger runs read shards through `data.iterator`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from minicpm_jax import config
from minicpm_jax.data import documents, python_corpus

ASCII_VOCAB, BYTE_VOCAB = 128, 256
_MAX_NON_ASCII = 0.01  # of the bytes, for the vocabulary of 128


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows to score: ids [E, T + 1]; the mask [E, T] says which predictions count."""

  ids: np.ndarray
  mask: np.ndarray

  def __post_init__(self):
    expected = (self.ids.shape[0], self.ids.shape[1] - 1)
    if self.mask.shape != expected:
      raise ValueError(f"mask: found shape {self.mask.shape}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Training tokens of every source in one array, and held-out tokens by source.

  `spans` gives [start, stop) of a source; windows of a source in `strides` begin at multiples of
  its stride (items of fixed length), those of the others anywhere.
  """

  tokens: np.ndarray  # int32 [num tokens]
  spans: Mapping[str, tuple[int, int]]
  heldout: Mapping[str, np.ndarray]
  vocab_size: int
  strides: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def starts(
    self,
    weights: Sequence[tuple[str, float | int]],
    *,
    seed: int,
    step: int,
    rows: int,
    seq_len: int,
  ) -> np.ndarray:
    """Where the rows of one step begin, int32 [rows].

    A row's place in its source does not depend on the weights: two mixtures that give a row the
    same source give it the same text.
    """
    unknown = [name for name, _ in weights if name not in self.spans]
    if unknown:
      raise ValueError(f"weights: found source {unknown[0]!r}, expected one of {list(self.spans)}")
    draws = np.random.default_rng((seed, step)).random((rows, 2))
    shares = np.cumsum([weight for _, weight in weights], dtype=np.float64)
    chosen = np.searchsorted(shares / shares[-1], draws[:, 0], side="right")
    chosen = np.minimum(chosen, len(weights) - 1)
    found = np.empty(rows, np.int32)
    for i, (name, _) in enumerate(weights):
      low, high = self.spans[name]
      stride = self.strides.get(name, 1)
      places = (high - low - seq_len - 1) // stride + 1
      if places < 1:
        raise ValueError(
          f"source {name}: found {high - low} tokens, expected at least {seq_len + 1} for a row"
        )
      mine = chosen == i
      found[mine] = low + stride * np.floor(draws[mine, 1] * places).astype(np.int64)
    return found

  def heldout_rows(self, source: str, *, num_rows: int, seq_len: int) -> Rows:
    """Evenly spaced windows of a source's held-out tokens."""
    if source not in self.heldout:
      raise ValueError(f"source: found {source!r}, expected one of {list(self.heldout)}")
    if num_rows < 1:
      raise ValueError(f"num_rows: found {num_rows}, expected at least 1")
    tokens = self.heldout[source]
    if len(tokens) < seq_len + 1:
      raise ValueError(
        f"held-out {source}: found {len(tokens)} tokens, expected at least {seq_len + 1}"
      )
    starts = np.linspace(0, len(tokens) - seq_len - 1, num_rows).astype(np.int64)
    ids = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
    return Rows(ids, np.ones((num_rows, seq_len), np.float32))

  def with_source(self, name: str, tokens: np.ndarray, *, stride: int = 1) -> "Corpus":
    """One more source behind the others (whose windows stay what they were)."""
    if name in self.spans:
      raise ValueError(f"name: found {name!r}, expected another name than {list(self.spans)}")
    if tokens.size and int(tokens.max()) >= self.vocab_size:
      raise ValueError(f"{name}: found token {tokens.max()}, expected below {self.vocab_size}")
    begin = len(self.tokens)
    return dataclasses.replace(
      self,
      tokens=np.concatenate([self.tokens, tokens.astype(np.int32)]),
      spans={**self.spans, name: (begin, begin + len(tokens))},
      strides=self.strides if stride == 1 else {**self.strides, name: stride},
    )


def encode(text: str, vocab_size: int) -> np.ndarray:
  """UTF-8 bytes as ids; with a vocabulary of 128 what is not ASCII becomes "?"."""
  if vocab_size < 128:
    raise ValueError(f"vocab_size: found {vocab_size}, expected at least 128 (bytes of ASCII)")
  ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
  return np.where(ids < vocab_size, ids, ord("?")).astype(np.int32)


def from_texts(
  train: Mapping[str, Iterable[str]],
  heldout: Mapping[str, Iterable[str]],
  *,
  vocab_size: int | None = None,
) -> Corpus:
  """Byte corpus of documents by source; documents are joined by a blank line.

  `vocab_size` None: 128 where less than 1% of the bytes are not ASCII, else 256.
  """
  joined = {name: "\n\n".join(texts) for name, texts in train.items()}
  if vocab_size is None:
    raw = np.frombuffer("".join(joined.values()).encode(), np.uint8)
    vocab_size = ASCII_VOCAB if np.mean(raw >= ASCII_VOCAB) < _MAX_NON_ASCII else BYTE_VOCAB
  arrays, spans, at = [], {}, 0
  for name, text in joined.items():
    arrays.append(encode(text, vocab_size))
    spans[name] = (at, at + len(arrays[-1]))
    at += len(arrays[-1])
  held = {name: encode("\n\n".join(texts), vocab_size) for name, texts in heldout.items()}
  empty = [name for name, (low, high) in spans.items() if low == high]
  empty += [f"held-out {name}" for name, tokens in held.items() if not len(tokens)]
  if empty or not spans:
    raise ValueError(f"corpus: found no text for {', '.join(empty) or 'any source'}")
  return Corpus(np.concatenate(arrays), spans, held, vocab_size)


def python_source(*, max_bytes: int = 4_000_000) -> Corpus:
  """Source "text": Python files of the running interpreter's library (training.md 13)."""
  train = python_corpus.documents_of("source", "train", max_bytes=max_bytes)
  held = python_corpus.documents_of("source", "heldout", max_bytes=max_bytes // 4)
  return from_texts({"text": (d.text for d in train)}, {"text": (d.text for d in held)})


def from_folder(
  path: str | os.PathLike[str], *, heldout_permille: int = 50, max_bytes: int = 50_000_000
) -> Corpus:
  """Source "text": the documents under `path`, held out by the hash of their ids."""
  sides: dict[bool, list[str]] = {False: [], True: []}
  size = 0
  for doc in documents.read([pathlib.Path(path)]):
    if size >= max_bytes:
      break
    size += len(doc.text.encode())
    sides[documents.is_heldout(doc.id, heldout_permille)].append(doc.text)
  if not sides[True] or not sides[False]:
    raise ValueError(
      f"{path}: found {len(sides[False])} training and {len(sides[True])} held-out documents, "
      "expected both; a folder of few long files needs more documents or a larger held-out share"
    )
  return from_texts({"text": sides[False]}, {"text": sides[True]})


def default_phases() -> tuple[config.PhaseConfig, ...]:
  return (config.PhaseConfig(name="stable", weights=(("text", 1.0),)),)
