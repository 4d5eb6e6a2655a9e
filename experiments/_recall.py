"""Recall documents: records, questions about them, fillers; needles for the evaluation.

A document begins with a token of its own (a place for attention to rest) and is made of pairs of
tokens: a record (one token that stands for a key and its value, beside a filler), a question (a
key, whose value in this document is the answer), or fillers, which follow a chain. Every document
has its own values. A share of the questions asks for one of the last records, as most of a text
depends on what is near; the rest ask for any. Needles are records whose keys are asked for once, by
the last tokens of the document.
"""

import numpy as np

KEYS, VALUES, FILLERS = 32, 8, 32
RECORD, ASK = 0, KEYS * VALUES  # first ids of records, keys, values, fillers
ANSWER, FILLER = ASK + KEYS, ASK + KEYS + VALUES
BEGIN = FILLER + FILLERS
VOCAB = BEGIN + 1
NEEDLES = 4  # a document of the evaluation
RECORDS, QUESTIONS = 0.16, 0.24  # shares of the pairs
REACH = 5  # last records that a near question asks for
PLAIN, EASY, NEEDLE = 0, 1, 2  # kinds of targets


def documents(
  rng: np.random.Generator,
  rows: int,
  length: int,
  *,
  near: float,
  edges: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [rows, length + 1], kind of every token); the last token is only a target.

  near: share of questions about the last REACH records. edges: with needles, uniformly anywhere but
  in the first edges[0] and the last edges[1] tokens; their questions end the document.
  """
  pairs = length // 2 + 1
  kind = rng.random((rows, pairs))
  keys = rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
  values = rng.integers(VALUES, size=(rows, KEYS))
  is_record, is_question = kind < RECORDS, (kind >= RECORDS) & (kind < RECORDS + QUESTIONS)
  row = np.arange(rows)[:, None]
  if edges is not None:
    places = np.arange(edges[0] // 2 + 1, pairs - max(NEEDLES, -(-edges[1] // 2)))
    if len(places) < NEEDLES:
      raise ValueError(f"edges: found {edges} of {length} tokens, expected room for {NEEDLES}")
    needles = np.stack([rng.choice(places, NEEDLES, replace=False) for _ in range(rows)])
    is_record[row, needles] = is_question[row, needles] = False
    is_record[:, -NEEDLES:] = is_question[:, -NEEDLES:] = False
  is_record[:, 0] = False  # its first token is cut off below
  rank = np.cumsum(is_record, axis=1)  # records so far, this one included
  is_record &= rank <= KEYS - NEEDLES
  count = np.cumsum(is_record, axis=1)
  reach = np.where(rng.random((rows, pairs)) < near, np.minimum(count, REACH), count)
  asked = count - 1 - (rng.random((rows, pairs)) * reach).astype(int)
  is_question &= count > 0
  number = np.where(is_record, rank - 1, np.maximum(asked, 0))
  key = np.take_along_axis(keys, np.minimum(number, KEYS - 1), axis=1)
  value = np.take_along_axis(values, key, axis=1)
  tokens = FILLER + _chain(rng, rows, 2 * pairs)
  kinds = np.full(tokens.shape, PLAIN)
  pair, kind_of = tokens.reshape(rows, pairs, 2), kinds.reshape(rows, pairs, 2)
  side = rng.integers(2, size=(rows, pairs, 1)) == np.arange(2)
  pair[:] = np.where(is_record[..., None] & side, (RECORD + key * VALUES + value)[..., None], pair)
  asking = np.stack((ASK + key, ANSWER + value), axis=-1)
  pair[:] = np.where(is_question[..., None], asking, pair)
  kind_of[..., 1][is_question] = EASY
  if edges is not None:
    last = keys[:, -NEEDLES:]
    value = np.take_along_axis(values, last, axis=1)
    pair[row, needles, 0] = RECORD + last * VALUES + value
    order = rng.permuted(np.tile(np.arange(NEEDLES), (rows, 1)), axis=1)
    end = pairs - NEEDLES + np.arange(NEEDLES)[None]
    pair[row, end, 0] = ASK + np.take_along_axis(last, order, axis=1)
    pair[row, end, 1] = ANSWER + np.take_along_axis(value, order, axis=1)
    kind_of[row, end, 1] = NEEDLE
  tokens = tokens[:, -length - 1 :].astype(np.int32)
  tokens[:, 0] = BEGIN
  return tokens, kinds[:, -length - 1 :]


def needle_slots(tokens: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(slot of the record [rows, NEEDLES], slot of the question's key [rows, NEEDLES])."""
  asks = np.nonzero(kinds == NEEDLE)[1].reshape(len(tokens), NEEDLES) - 1
  keys = np.take_along_axis(tokens, asks, axis=1) - ASK
  of_key = np.where(tokens < ASK, tokens // VALUES, -1)
  return np.argmax(of_key[:, None, :] == keys[:, :, None], axis=2), asks


def _chain(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
  """Fillers: each has four successors."""
  successors = np.random.default_rng(7).integers(FILLERS, size=(FILLERS, 4))
  choices = rng.integers(4, size=(length, rows))
  chain = np.empty((length, rows), int)
  chain[0] = rng.integers(FILLERS, size=rows)
  for t in range(1, length):
    chain[t] = successors[chain[t - 1], choices[t]]
  return chain.T
