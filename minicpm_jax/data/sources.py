"""Tokenised sources with random access, and the endless document stream read from one.

A source has `__len__` and `__getitem__` (int32 token ids of one document). `DocumentStream` puts
grain's operators on top: host slice, shuffle anew each epoch, repeat, parallel reading.
"""

import bisect
import collections.abc
import dataclasses
import hashlib
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from minicpm_jax.data import documents, packing, shards


@runtime_checkable
class Source(Protocol):
  """One tokenised source; `identity` changes when its content does."""

  name: str
  identity: str
  tokenizer_hash: str | None  # None: not recorded
  vocab_size: int | None  # ids are below it; None: not recorded

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> np.ndarray: ...
  def describe(self, index: int) -> str: ...


def open_source(name: str, path: str | os.PathLike) -> "Source":
  """The source at `path`: a folder of shards, a Parquet file or a folder of Parquet files."""
  path = pathlib.Path(path)
  files = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
  if not path.exists():
    raise shards.ShardError(f"source {name}: {path}: no such file or folder")
  if files and not (path / shards.INDEX_FILE).exists():
    return ParquetSource(name, files)
  return ShardSource(name, path)


def check_vocabulary(source: Source, vocab_size: int | None) -> None:
  """Refuses a source that was tokenised with more ids than the model has."""
  if vocab_size is not None and (source.vocab_size or 0) > vocab_size:
    raise ValueError(
      f"model.vocab_size: found {vocab_size}, expected at least {source.vocab_size}, the "
      f"vocabulary of the data (source {source.name})"
    )


def check_ids(row: packing.Row, name: str, vocab_size: int | None) -> packing.Row:
  """The row, or an error when it holds an id that the model lacks."""
  if vocab_size is not None and (largest := int(row["tokens"].max())) >= vocab_size:
    raise ValueError(
      f"source {name}: found token id {largest}, expected ids below model.vocab_size {vocab_size}"
    )
  return row


def mark_flags_as_parsed() -> None:
  """ArrayRecord and grain's workers read absl flags, which notebooks never parse."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass(frozen=True)
class _WholeFile:
  """What ArrayRecordDataSource wants to know of a file; spares opening all of them at start."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


class ShardSource:
  """A folder that `shards.prepare` wrote."""

  def __init__(self, name: str, path: str | os.PathLike):
    mark_flags_as_parsed()
    self.name = name
    self.index = shards.read_index(path)
    self.identity = self.index.identity
    self.tokenizer_hash = self.index.config.tokenizer_hash
    self.vocab_size = self.index.config.vocab_size
    self._files = [str(pathlib.Path(path) / s.file) for s in self.index.shards]
    counts = [s.num_documents for s in self.index.shards]
    self._starts = [sum(counts[:i]) for i in range(len(counts))]
    self._length = sum(counts)
    files = [_WholeFile(f, 0, n, n) for f, n in zip(self._files, counts, strict=True)]
    self._records = grain.sources.ArrayRecordDataSource(files)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    try:
      record = self._records[index]
    except Exception as error:  # the C++ reader raises several kinds
      raise shards.ShardError(f"{self.describe(index)}: cannot be read ({error})") from error
    return shards.decode_record(record, f"source {self.name}")

  def describe(self, index: int) -> str:
    shard = bisect.bisect_right(self._starts, index) - 1
    return f"{self._files[shard]} record {index - self._starts[shard]}"


class ParquetSource:
  """Parquet files with a list<int32> column of token ids.

  The column is "tokens" or "input_ids", or the only list of integers. The last row group read is
  kept, so unshuffled reading is fast; shuffled reading wants small row groups.
  """

  def __init__(self, name: str, files: collections.abc.Sequence[str | os.PathLike]):
    mark_flags_as_parsed()
    self.name = name
    self.tokenizer_hash = None
    self._files = [str(f) for f in files]
    self._groups: list[tuple[int, int]] = []  # (file, row group)
    self._starts: list[int] = []
    digest = hashlib.sha256()
    largest: list[int | None] = []
    total = 0
    for i, file in enumerate(self._files):
      parquet = documents.open_parquet(file)
      self._column = self._token_column(parquet, file)
      digest.update(f"{os.path.getsize(file)}\0".encode() + _parquet_footer(file))
      for group in range(parquet.metadata.num_row_groups):
        self._groups.append((i, group))
        self._starts.append(total)
        total += parquet.metadata.row_group(group).num_rows
        largest.append(_largest_id(parquet.metadata.row_group(group), self._column))
    if total == 0:
      raise shards.ShardError(f"source {name}: {self._files}: found no rows")
    self.vocab_size = None if None in largest else max(largest) + 1
    self.identity = digest.hexdigest()
    self._length = total
    self._reset()

  def _reset(self) -> None:
    self._lock, self._cached, self._rows = threading.Lock(), -1, None

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_lock": None, "_cached": -1, "_rows": None}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    self._reset()

  def _token_column(self, parquet, file: str) -> str:
    import pyarrow

    fields = [
      f.name
      for f in parquet.schema_arrow
      if (pyarrow.types.is_list(f.type) or pyarrow.types.is_large_list(f.type))
      and pyarrow.types.is_integer(f.type.value_type)
    ]
    named = [f for f in ("tokens", "input_ids") if f in fields]
    if not named and len(fields) != 1:
      raise shards.ShardError(
        f"source {self.name}: {file}: found integer-list columns {fields}, expected one of them or "
        "one called 'tokens' or 'input_ids'"
      )
    return (named or fields)[0]

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    where = bisect.bisect_right(self._starts, index) - 1
    with self._lock:
      if self._cached != where:
        file, group = self._groups[where]
        table = documents.open_parquet(self._files[file]).read_row_group(
          group, columns=[self._column]
        )
        self._rows, self._cached = table.column(0).combine_chunks(), where
      ids = self._rows[index - self._starts[where]].values
    if ids is None or not len(ids) or ids.null_count:
      raise shards.ShardError(f"{self.describe(index)}: found no or null tokens, expected ids")
    tokens = ids.to_numpy(zero_copy_only=False)
    if tokens.min() < 0 or tokens.max() >= 2**31:
      raise shards.ShardError(
        f"{self.describe(index)}: found ids {tokens.min()}..{tokens.max()}, expected 0..2^31-1"
      )
    return tokens.astype(np.int32)

  def describe(self, index: int) -> str:
    where = bisect.bisect_right(self._starts, index) - 1
    file, group = self._groups[where]
    return f"{self._files[file]} row group {group} row {index - self._starts[where]}"


def _largest_id(row_group, column: str) -> int | None:
  """The largest value of a list column by the file's own statistics; None without them."""
  for i in range(row_group.num_columns):
    chunk = row_group.column(i)
    if chunk.path_in_schema.split(".")[0] == column:
      stats = chunk.statistics
      return stats.max if stats is not None and stats.has_min_max else None
  return None


def _parquet_footer(path: str) -> bytes:
  """Schema, offsets and statistics of all pages: the identity of the file without reading it."""
  with open(path, "rb") as file:
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    return file.read(length)


class DocumentStream:
  """The documents of one host in the order they are trained on; document n is always the same.

  Host h of H reads records h, h+H, ...; with a seed they are shuffled anew in each epoch.
  """

  def __init__(
    self,
    source: Source,
    *,
    seed: int | None,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
    num_threads: int = 0,
    num_workers: int = 0,
  ):
    mark_flags_as_parsed()
    self.name = source.name
    self._source = source
    self._options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=64 if num_threads else 0
    )
    self._num_workers = num_workers
    order = grain.MapDataset.range(len(source))[process_index::process_count]
    if repeat and len(order) == 0:
      raise shards.ShardError(
        f"source {source.name}: found {len(source)} documents, expected at least one for each of "
        f"{process_count} hosts"
      )
    self.num_documents = len(order)  # of this host, in one epoch
    if seed is not None:
      order = order.seed(seed).shuffle()
    self._order = order.repeat() if repeat else order

  def read(self, start: int) -> Iterator[np.ndarray]:
    """Documents from ordinal `start` on."""
    if start >= len(self._order):
      return iter(())
    rest = self._order.slice(slice(start, None)).map(self._source.__getitem__)
    dataset = rest.to_iter_dataset(self._options)
    if self._num_workers:
      dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
      return _DeafToCtrlC(iter(dataset))
    return iter(dataset)

  def describe(self, document: int) -> str:
    return (
      f"document {document} of the stream ({self._source.describe(int(self._order[document]))})"
    )


class _DeafToCtrlC:
  """Documents of grain's worker processes, which the first `next` starts without SIGINT.

  A terminal sends Ctrl-C to them too; without them a run could not take the step that it may still
  need before it saves and leaves. They end with the process that started them.
  """

  def __init__(self, documents: Any):
    self._documents, self._is_started = documents, False

  def __iter__(self) -> Iterator[np.ndarray]:
    return self

  def __next__(self) -> np.ndarray:
    if self._is_started or not hasattr(signal, "pthread_sigmask"):
      return next(self._documents)
    resource_tracker.ensure_running()  # its start would end the mask
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # children inherit the mask
    try:
      return next(self._documents)
    finally:
      self._is_started = True
      signal.pthread_sigmask(signal.SIG_SETMASK, old)

  def close(self) -> None:
    self._documents.close()
