"""Log-likelihood of texts under a model, item by item: options of a question, or whole documents.

Zero-shot multiple choice by option log-likelihood (data.md 2.6): each option is scored given the
question, un-normalised and per byte. A document is scored in rows of `seq_len` tokens without
overlap; every token is predicted once.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.core import types
from minicpm_jax.data import documents
from minicpm_jax.data.documents import Doc
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer as tokenizer_lib

_CONTINUATIONS = ("hellaswag",)  # the choices go on with the question's text


@dataclasses.dataclass(frozen=True)
class Item:
  """(context, target) of every option; `label` is the gold one. A document has one option."""

  id: str
  options: tuple[tuple[str, str], ...]
  label: int = 0


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """Items of one benchmark or one held-out text."""

  name: str
  kind: Literal["choice", "text"]
  items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Per item, in order: nats and bytes of the gold target, and whether it won."""

  nats: np.ndarray  # float64 [items]
  num_bytes: np.ndarray  # float64 [items]
  correct: np.ndarray  # float64 [items], 0 or 1; all 0 for text
  correct_per_byte: np.ndarray  # the same with log-likelihoods divided by bytes

  @property
  def bits_per_byte(self) -> float:
    return float(self.nats.sum() / self.num_bytes.sum() / math.log(2))


# --- Sets ----------------------------------------------------------------------------------------


def text_set(name: str, docs: Iterable[Doc]) -> EvalSet:
  """Held-out documents, each one item."""
  items = tuple(Item(doc.id, (("", doc.text),)) for doc in docs if doc.text)
  if not items:
    raise ValueError(f"eval set {name}: found no text, expected at least one document")
  return EvalSet(name, "text", items)


def choice_set(path: str | os.PathLike[str], *, limit: int | None = None) -> EvalSet:
  """A file of JSON lines {id, question, choices, label, [passage]}, .gz allowed.

  "_" in a question with two choices (WinoGrande) is filled in, and the rest of the sentence is the
  target; HellaSwag's choices continue the question; everything else is "Question: ... Answer:".
  """
  name = pathlib.Path(path).name.split(".")[0]
  items = []
  for number, row in documents.json_rows(path):
    if limit is not None and len(items) >= limit:
      break
    question, choices, label = (row.get(key) for key in ("question", "choices", "label"))
    ok = isinstance(question, str) and isinstance(choices, list) and type(label) is int
    if not ok or not all(isinstance(c, str) for c in choices) or not 0 <= label < len(choices):
      raise ValueError(
        f"{path}: line {number}: found keys {sorted(row)} and label {label!r}, "
        "expected question, choices and the number of a choice"
      )
    options = tuple(_option(name, row, choice) for choice in choices)
    items.append(Item(str(row.get("id", number)), options, label))
  if not items:
    raise ValueError(f"{path}: found no item, expected JSON lines with question, choices, label")
  return EvalSet(name, "choice", tuple(items))


def _option(name: str, row: dict, choice: str) -> tuple[str, str]:
  question = row["question"]
  if name.startswith(_CONTINUATIONS):
    return question, f" {choice}"
  if question.count("_") == 1 and len(row["choices"]) == 2:
    before, after = question.split("_")
    return before + choice, after
  passage = f"{row['passage']}\n\n" if row.get("passage") else ""
  return f"{passage}Question: {question}\nAnswer:", f" {choice}"


# --- Scoring -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
  """`ids[0]` is given; ids[first:] are predicted; the nats belong to option `option`."""

  ids: list[int]
  first: int
  option: int


class Scorer:
  """Scores eval sets with one model; programs are shared by sets and checkpoints."""

  def __init__(
    self,
    model: transformer.Transformer,
    tok: tokenizer_lib.Tokenizer,
    *,
    seq_len: int,
    batch_size: int = 8,
  ):
    if seq_len < 2:
      raise ValueError(f"seq_len: found {seq_len}, expected at least 2")
    self.tok, self.seq_len, self.batch_size = tok, seq_len, batch_size
    self.start = tok.bos_id if tok.bos_id is not None else tok.eos_id
    if self.start is None:
      raise ValueError("tokenizer: found neither BOS nor EOS, expected one to start a text with")
    self._nats = jax.jit(lambda params, batch: _row_nats(model, params, *batch))

  def score(self, params: types.Params, eval_set: EvalSet) -> Scores:
    """Scores of every item of a set."""
    targets = [target for item in eval_set.items for _, target in item.options]
    nats = self._option_nats(params, eval_set)
    num_bytes = np.array([max(len(t.encode()), 1) for t in targets], np.float64)
    gold, wins, wins_per_byte, at = [], [], [], 0
    for item in eval_set.items:
      here = slice(at, at + len(item.options))
      gold.append(at + item.label)
      wins.append(len(item.options) > 1 and np.argmin(nats[here]) == item.label)
      per_byte = nats[here] / num_bytes[here]
      wins_per_byte.append(len(item.options) > 1 and np.argmin(per_byte) == item.label)
      at = here.stop
    return Scores(
      nats[gold], num_bytes[gold], np.array(wins, np.float64), np.array(wins_per_byte, np.float64)
    )

  def _option_nats(self, params: types.Params, eval_set: EvalSet) -> np.ndarray:
    rows, option = [], 0
    for item in eval_set.items:
      for context, target in item.options:
        rows += self._rows(context, target, option)
        option += 1
    out = np.zeros(option, np.float64)
    rows.sort(key=lambda row: len(row.ids))  # rows of one batch have similar lengths
    for at in range(0, len(rows), self.batch_size):
      batch = rows[at : at + self.batch_size]
      nats = np.asarray(self._nats(params, self._batch(batch)), np.float64)
      np.add.at(out, [row.option for row in batch], nats[: len(batch)])
    return out

  def _rows(self, context: str, target: str, option: int) -> list[_Row]:
    given = [self.start, *(self.tok.encode(context) if context else [])]
    wanted = self.tok.encode(target)
    if len(given) > 1 and len(given) + len(wanted) > self.seq_len + 1:  # keep the context's end
      given = given[-max(self.seq_len + 1 - len(wanted), 1) :]
    ids = given + wanted
    rows = [_Row(ids[: self.seq_len + 1], len(given), option)]
    for at in range(self.seq_len, len(ids) - 1, self.seq_len):
      rows.append(_Row(ids[at : at + self.seq_len + 1], 1, option))
    return rows

  def _batch(self, rows: Sequence[_Row]) -> tuple[jax.Array, jax.Array, jax.Array]:
    longest = max(len(row.ids) - 1 for row in rows)
    length = min(max(16, 1 << (longest - 1).bit_length()), self.seq_len)
    ids = np.zeros((self.batch_size, length + 1), np.int32)
    segments = np.zeros((self.batch_size, length), np.int32)
    mask = np.zeros((self.batch_size, length), np.float32)
    for i, row in enumerate(rows):
      n = len(row.ids)
      ids[i, :n] = row.ids
      segments[i, : n - 1] = 1
      mask[i, row.first - 1 : n - 1] = 1
    return jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(mask)


def _row_nats(
  model: transformer.Transformer,
  params: types.Params,
  ids_BT: jax.Array,
  segment_ids_BT: jax.Array,
  mask_BT: jax.Array,
) -> jax.Array:
  out = model.apply({"params": params}, ids_BT[:, :-1], segment_ids_BT=segment_ids_BT)
  logp_BTV = jax.nn.log_softmax(out.logits, axis=-1)
  logp_BT = jnp.take_along_axis(logp_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
  return -(logp_BT * mask_BT).sum(axis=1)
