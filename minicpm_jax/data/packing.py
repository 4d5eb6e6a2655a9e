"""Packing of a document stream into rows of `seq_len` tokens (data.md section 8).

`ConcatPacker` concatenates and cuts: no token is lost, a document may cross rows.
`BestFitPacker` keeps whole documents: a group of bins is filled, each piece going to the fullest
bin that still takes it; a piece that fits nowhere ends the group and starts the next one.

Both read through a `Cursor` (ordinal of the document in the endless stream, offset inside it), so
their exact position, partly consumed documents and groups included, is two or three integers.
grain's pack operators are not used: their state nests the state of the reader, which changes with
the number of workers and cannot be carried from one phase's graph to the next.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

Row = dict[str, np.ndarray]
KEYS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")


@runtime_checkable
class Stream(Protocol):
  """Documents by ordinal: `read(n)` starts an iterator at document n; the rest is for errors."""

  name: str

  def describe(self, document: int) -> str: ...

  def read(self, start: int) -> Iterator[np.ndarray]: ...


@runtime_checkable
class Packer(Protocol):
  """Rows from one stream, and their exact position."""

  def next_row(self) -> Row | None: ...
  def get_state(self) -> dict[str, int]: ...
  def set_state(self, state: dict[str, int]) -> None: ...
  def close(self) -> None: ...


def make_row(pieces: Sequence[np.ndarray], seq_len: int, align: int = 1) -> Row:
  """One packed row: piece i gets segment id i+1, padding segment id 0.

  Every piece starts at a multiple of `align`. Positions restart in each segment;
  targets_t = tokens_{t+1} inside a segment; the last token of a segment has no target, and neither
  has one whose next token is not trained (`split_mask`).
  """
  row = {k: np.zeros(seq_len, np.float32 if k == "loss_mask" else np.int32) for k in KEYS}
  start = 0
  for i, piece in enumerate(pieces):
    stop = start + len(piece)
    ids, is_trained = split_mask(piece)
    row["tokens"][start:stop] = ids
    row["targets"][start : stop - 1] = ids[1:]
    row["loss_mask"][start : stop - 1] = is_trained[1:]
    row["segment_ids"][start:stop] = i + 1
    row["positions"][start:stop] = np.arange(stop - start, dtype=np.int32)
    start += round_up(len(piece), align)
  return row


def split_mask(piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(token ids, bool: is it trained) of tokens whose sign bit marks those that are not."""
  return piece & np.int32(2**31 - 1), piece >= 0


def round_up(length: int, align: int) -> int:
  """The smallest multiple of `align` that is at least `length`."""
  return -(-length // align) * align


class Cursor:
  """A position in a stream: `document` (ordinal) and `offset` (tokens of it already taken)."""

  def __init__(self, stream: Stream):
    self._stream = stream
    self.seek(0, 0)

  def seek(self, document: int, offset: int) -> None:
    self.document, self.offset = document, offset
    self._documents: Iterator[np.ndarray] | None = None
    self._current: np.ndarray | None = None

  def peek(self) -> np.ndarray | None:
    """The rest of the current document; None at the end of a finite stream."""
    if self._current is None:
      if self._documents is None:
        self._documents = self._stream.read(self.document)
      self._current = next(self._documents, None)
      if self._current is None:
        return None
      if self.offset >= len(self._current):
        raise ValueError(
          f"source {self._stream.name}: {self._stream.describe(self.document)}: found "
          f"{len(self._current)} tokens, expected more than offset {self.offset}"
        )
    return self._current[self.offset :]

  def take(self, count: int) -> None:
    """Moves past `count` tokens of the current document."""
    self.offset += count
    if self.offset == len(self._current):
      self.document, self.offset, self._current = self.document + 1, 0, None

  def close(self) -> None:
    """Ends the reader behind the stream, if it has threads or processes."""
    if hasattr(self._documents, "close"):
      self._documents.close()
    self.seek(self.document, self.offset)


class ConcatPacker:
  """Concatenate and cut; state {document, offset}."""

  def __init__(self, stream: Stream, seq_len: int, *, align: int = 1):
    self._cursor = Cursor(stream)
    self._seq_len, self._align = seq_len, align

  def next_row(self) -> Row | None:
    """The next row; the last one of a finite stream is padded, then None."""
    pieces, used = [], 0
    while used < self._seq_len and (rest := self._cursor.peek()) is not None:
      piece = rest[: self._seq_len - used]
      pieces.append(piece)
      used += round_up(len(piece), self._align)
      self._cursor.take(len(piece))
    return make_row(pieces, self._seq_len, self._align) if pieces else None

  def get_state(self) -> dict[str, int]:
    return {"document": self._cursor.document, "offset": self._cursor.offset}

  def set_state(self, state: dict[str, int]) -> None:
    self._cursor.close()
    self._cursor.seek(state["document"], state["offset"])

  def close(self) -> None:
    self._cursor.close()


class BestFitPacker:
  """Best fit of whole documents; state {document, offset} of the group's start and {row} in it."""

  def __init__(
    self,
    stream: Stream,
    seq_len: int,
    *,
    align: int = 1,
    num_bins: int = 16,
    long_documents: Literal["split", "error"] = "split",
  ):
    self._cursor = Cursor(stream)
    self._stream = stream
    self._seq_len, self._align, self._num_bins = seq_len, align, num_bins
    self._long_documents = long_documents
    self._start, self._row = (0, 0), 0
    self._bins: list[list[np.ndarray]] | None = None

  def next_row(self) -> Row | None:
    """The next row; after the last group of a finite stream, None."""
    if self._bins is None:
      self._bins = self._fill()
      if self._row > len(self._bins):
        raise ValueError(
          f"source {self._stream.name}: found row {self._row} of a packing group in the state, "
          f"expected at most {len(self._bins)}"
        )
    if self._row == len(self._bins):
      self._start, self._row = (self._cursor.document, self._cursor.offset), 0
      self._bins = self._fill()
    if not self._bins:
      return None
    self._row += 1
    return make_row(self._bins[self._row - 1], self._seq_len, self._align)

  def _fill(self) -> list[list[np.ndarray]]:
    bins, room = [[] for _ in range(self._num_bins)], [self._seq_len] * self._num_bins
    while (rest := self._cursor.peek()) is not None:
      if len(rest) > self._seq_len and self._long_documents == "error":
        raise ValueError(
          f"source {self._stream.name}: {self._stream.describe(self._cursor.document)}: found "
          f"{len(rest)} tokens, expected at most data.seq_len {self._seq_len} "
          "(data.long_documents is 'error')"
        )
      piece = rest[: self._seq_len]
      need = round_up(len(piece), self._align)
      fitting = [i for i in range(self._num_bins) if room[i] >= need]
      if not fitting:
        break
      best = min(fitting, key=lambda i: (room[i], i))
      bins[best].append(piece)
      room[best] -= need
      self._cursor.take(len(piece))
    return [pieces for pieces in bins if pieces]

  def get_state(self) -> dict[str, int]:
    document, offset = self._start
    return {"document": document, "offset": offset, "row": self._row}

  def set_state(self, state: dict[str, int]) -> None:
    self._cursor.close()
    self._cursor.seek(state["document"], state["offset"])
    self._start, self._row, self._bins = (state["document"], state["offset"]), state["row"], None

  def close(self) -> None:
    self._cursor.close()
