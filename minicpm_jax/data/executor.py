"""Runs stages over many files with local processes, so that it can be killed at any time.

A stage is a picklable callable `stage(docs) -> iterator of Doc | Dropped` (best: a frozen
dataclass, whose repr is its identity). Every document given to it must come out once, as a
document or as a `Dropped`; the executor refuses a stage that loses or doubles one.

One input file is one shard: NAME.parquet (kept), NAME.drops.jsonl, NAME.counts.json and, last,
NAME.done. All are written under temporary names, so a shard is whole or absent, and a rerun makes
only what is absent or was made from another input or other stages. Results do not depend on the
number of workers. Duplicate ids inside a file are resolved while reading (`tolerant.unique_ids`);
over files they are counted.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from minicpm_jax.core import extras, files
from minicpm_jax.data import documents, tolerant, workers
from minicpm_jax.data.documents import Doc, Dropped

Stage = Callable[[Iterable[Doc]], Iterator[Doc | Dropped]]
Reader = Callable[[str], Iterator[Doc | Dropped]]

_REPORT = "report.json"
_BATCH = 512  # rows of one write
_BATCH_CHARS = 4 * 2**20  # or this many characters, whichever comes first
_EXCERPT = 200  # characters of a dropped document kept in the drops file


class ExecutorError(RuntimeError):
  """Shards that could not be made; the others are complete and are kept for a rerun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What `run` made: files in the order of the inputs, and counts summed over shards."""

  folder: pathlib.Path
  parquet: tuple[pathlib.Path, ...]
  drops: tuple[pathlib.Path, ...]
  counts: dict  # read, kept, dropped {"stage/reason": n}, renamed_ids, repeated_ids, stages [...]
  num_resumed: int  # shards found done


@dataclasses.dataclass(frozen=True)
class _Task:
  name: str  # of the shard
  path: str
  file_name: str  # among the inputs: ids are made from it
  signature: str


def run(
  inputs: Sequence[str | os.PathLike],
  stages: Sequence[Stage],
  out_folder: str | os.PathLike,
  *,
  num_workers: int = 1,
  reader: Reader | None = None,
  max_attempts: int = 3,
  on_shard: Callable[[dict], None] | None = None,
) -> Report:
  """Applies `stages` to every file of `inputs` (files, folders) and writes the kept documents.

  `num_workers` 0 runs in this process. A shard whose worker dies is tried `max_attempts` times.
  `on_shard` gets the counts of each finished shard (for progress). Raises ExecutorError when
  shards failed; everything else is finished first, unless the disk is full.
  """
  for name, value, least in (("num_workers", num_workers, 0), ("max_attempts", max_attempts, 1)):
    if value < least:
      raise ValueError(f"{name}: found {value}, expected at least {least}")
  reader = reader or tolerant.Reader()
  folder = pathlib.Path(out_folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    _remove_stale(folder)
    tasks = _tasks(inputs, stages, reader)
    _refuse_strangers(folder, tasks)
    todo = [task for task in tasks if not _is_done(folder, task)]
    common = (folder, tuple(stages), reader)
    calls = [(task,) for task in todo]
    on_shard = on_shard or (lambda counts: None)
    if num_workers == 0:
      failures = workers.run_here(_process, common, calls, on_shard)
    else:
      failures = workers.run(
        _process, common, calls, on_shard, num_workers=num_workers, max_attempts=max_attempts
      )
    if failures:
      names = ", ".join(todo[i].name for i in sorted(failures))
      first = failures[min(failures)]
      raise ExecutorError(f"{len(failures)} of {len(tasks)} shards failed ({names}): {first}")
    _remove_stale(folder)
    return _finish(folder, tasks, num_resumed=len(tasks) - len(todo))


def _finished(folder: str | os.PathLike) -> list[str]:
  """Names of the shards of a finished run."""
  path = pathlib.Path(folder) / _REPORT
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file, expected the folder of a finished run")
  return json.loads(path.read_text())["shards"]


def read_kept(folder: str | os.PathLike) -> Iterator[Doc]:
  """The kept documents of a finished run, in the order of its inputs."""
  reader = tolerant.Reader(max_bytes=2**31)
  for name in _finished(folder):
    yield from reader(str(pathlib.Path(folder) / f"{name}.parquet"))


def read_drops(folder: str | os.PathLike) -> Iterator[dict]:
  """Rows {id, stage, reason, detail, excerpt} of a finished run, in the order of its inputs."""
  for name in _finished(folder):
    with open(pathlib.Path(folder) / f"{name}.drops.jsonl", encoding="utf-8") as file:
      yield from map(json.loads, file)


# ---------------------------------------------------------------------------------- one shard


def apply(
  items: Iterable[Doc | Dropped],
  stages: Sequence[Stage],
  on_drop: Callable[[str, Dropped, str], None],
  counts: dict,
) -> Iterator[Doc]:
  """The documents that pass every stage; fills `counts["stages"]` while it is consumed.

  `on_drop(stage, dropped, excerpt)` is called for every other one.
  """
  meters = [_Meter("read", on_drop)]
  docs = meters[0].watch(iter(items), None)
  for stage in stages:
    meters.append(_Meter(_name(stage), on_drop))
    docs = meters[-1].watch(stage(meters[-1].feed(docs)), meters[-2])
  counts["stages"] = [m.counts for m in meters]
  yield from docs


class _Meter:
  """Counts one stage, sends its drops away and checks that no document is lost or doubled."""

  def __init__(self, name: str, on_drop: Callable[[str, Dropped, str], None]):
    self.counts = dict(stage=name, seen=0, out=0, dropped={}, chars_in=0, chars_out=0, seconds=0.0)
    self._name, self._on_drop = name, on_drop
    self._pending = {}  # id -> excerpt, of documents given and not yet returned
    self._total = 0.0  # seconds inside this stage and everything before it

  def feed(self, docs: Iterator[Doc]) -> Iterator[Doc]:
    for doc in docs:
      self.counts["seen"] += 1
      self.counts["chars_in"] += len(doc.text)
      self._pending[doc.id] = doc.text[:_EXCERPT]
      yield doc

  def watch(self, items: Iterator[Doc | Dropped], before: "_Meter | None") -> Iterator[Doc]:
    while True:
      start = time.perf_counter()
      item = next(items, None)
      self._total += time.perf_counter() - start
      self.counts["seconds"] = self._total - (before._total if before else 0.0)
      if item is None:
        break
      excerpt = self._returned(item, is_source=before is None)
      if isinstance(item, Doc):
        self.counts["out"] += 1
        self.counts["chars_out"] += len(item.text)
        yield item
      else:
        dropped = self.counts["dropped"]
        dropped[item.reason] = dropped.get(item.reason, 0) + 1
        self._on_drop(self._name, item, excerpt)
    if self._pending:
      lost = f"{len(self._pending)} documents, first {next(iter(self._pending))!r}"
      raise ValueError(f"stage {self._name}: lost {lost}; expected each back as Doc or Dropped")

  def _returned(self, item: Doc | Dropped, is_source: bool) -> str:
    if is_source:
      self.counts["seen"] += 1
      return ""
    if item.id not in self._pending:
      raise ValueError(f"stage {self._name}: yielded {item.id!r} twice or was never given it")
    return self._pending.pop(item.id)


def _process(task: _Task, folder: pathlib.Path, stages: Sequence[Stage], reader: Reader) -> dict:
  """Makes one shard and returns its counts."""
  start = time.perf_counter()
  counts = {"shard": task.name, "input": task.path, "kept": 0, "renamed_ids": 0}
  with contextlib.ExitStack() as stack:
    drops_file = stack.enter_context(_synced(folder / f"{task.name}.drops.jsonl"))
    kept_file = stack.enter_context(_synced(folder / f"{task.name}.parquet"))

    def on_drop(stage: str, item: Dropped, excerpt: str) -> None:
      row = {"id": item.id, "stage": stage, "reason": item.reason, "detail": item.detail}
      line = files.as_json({**row, "excerpt": excerpt})
      drops_file.write(line.encode("utf-8", "replace") + b"\n")

    items = named(reader, task.file_name)(task.path)
    docs = apply(_count_renamed(items, counts), stages, on_drop, counts)
    _write_parquet(kept_file, docs, counts)
  counts["seconds"] = time.perf_counter() - start
  for name, text in (
    (f"{task.name}.counts.json", files.as_json(counts, indent=1)),
    (f"{task.name}.done", task.signature),  # last: with it the shard is done
  ):
    with _synced(folder / name) as file:
      file.write(text.encode())
  return counts


def _count_renamed(items: Iterator[Doc | Dropped], counts: dict) -> Iterator[Doc | Dropped]:
  for item in items:
    counts["renamed_ids"] += isinstance(item, Doc) and "original_id" in item.meta
    yield item


def _write_parquet(file, docs: Iterator[Doc], counts: dict) -> None:
  pyarrow = extras.require_extra("pyarrow", extra="data")
  parquet = extras.require_extra("pyarrow.parquet", extra="data")
  schema = tolerant.parquet_schema()
  with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
    for rows in _batches(docs):
      counts["kept"] += len(rows)
      writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _batches(docs: Iterator[Doc]) -> Iterator[list[dict]]:
  rows, chars = [], 0
  for doc in docs:
    rows.append(tolerant.to_row(doc))
    chars += len(doc.text)
    if len(rows) == _BATCH or chars >= _BATCH_CHARS:
      yield rows
      rows, chars = [], 0
  if rows:
    yield rows


@contextlib.contextmanager
def _synced(path: pathlib.Path):
  """A binary file that gets its name when the block ends without an error and it is on the disk."""
  with files.replacing(path) as partial, open(partial, "wb") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())


# ----------------------------------------------------------------------------- the whole folder


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """Refuses two runs in one folder; the lock ends with the process."""
  with open(folder / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ExecutorError(f"{folder}: another run is writing here") from None
    yield


def _remove_stale(folder: pathlib.Path) -> None:
  """Temporary files of killed processes."""
  for path in folder.glob(f"{files.PREFIX}*"):
    path.unlink(missing_ok=True)


def _tasks(inputs, stages: Sequence[Stage], reader: Reader) -> list[_Task]:
  """One task a file, in input order; a file given twice is read once."""
  how = [_identity(reader), *map(_identity, stages)]
  tasks = {}
  for path, file_name in documents.name_files(inputs):
    name = shard_name(path)
    status = path.stat()
    made_from = [str(path), file_name, status.st_size, status.st_mtime_ns, *how]
    signature = hashlib.sha1(json.dumps(made_from).encode()).hexdigest()
    tasks.setdefault(name, _Task(name, str(path), file_name, signature))
  return list(tasks.values())


def named(reader: Reader, file_name: str) -> Reader:
  """The reader for the input of that name; readers without `named` make their own ids."""
  return reader.named(file_name) if hasattr(reader, "named") else reader


def shard_name(path: str | os.PathLike) -> str:
  """STEM-HASH of an input file: readable, and different for equal stems in other folders."""
  path = pathlib.Path(path)
  stem = re.sub(r"[^\w.-]", "_", path.name.split(".")[0]) or "file"
  return f"{stem[:80]}-{hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:8]}"


def _identity(stage: object) -> str:
  return re.sub(r" at 0x[0-9a-f]+", "", repr(stage))


def _name(stage: object) -> str:
  return getattr(stage, "name", None) or getattr(stage, "__name__", type(stage).__name__)


def _is_done(folder: pathlib.Path, task: _Task) -> bool:
  done = folder / f"{task.name}.done"
  if not done.exists():
    return False
  if done.read_text() == task.signature:
    return True
  done.unlink()  # made from another input or other stages: made again
  return False


def _refuse_strangers(folder: pathlib.Path, tasks: list[_Task]) -> None:
  known = {task.name for task in tasks}
  shards = (p.stem for p in folder.glob("[!.]*.parquet"))
  strange = sorted(name for name in shards if name not in known)
  if strange:
    raise ExecutorError(
      f"{folder}: found shards of inputs that are not in this run ({', '.join(strange[:3])}), "
      "expected a folder of its own for every set of inputs"
    )


def _finish(folder: pathlib.Path, tasks: list[_Task], *, num_resumed: int) -> Report:
  """Sums the counts of all shards and writes them to report.json."""
  shards = [json.loads((folder / f"{t.name}.counts.json").read_text()) for t in tasks]
  counts = {
    "read": sum(s["stages"][0]["out"] for s in shards),
    "kept": sum(s["kept"] for s in shards),
    "dropped": {},
    "renamed_ids": sum(s["renamed_ids"] for s in shards),
    "repeated_ids": _repeated_ids([folder / f"{t.name}.parquet" for t in tasks]),
    "empty_inputs": [s["input"] for s in shards if s["stages"][0]["seen"] == 0],
    "stages": [],
  }
  for rows in zip(*(s["stages"] for s in shards), strict=True):
    total = {key: sum(r[key] for r in rows) for key in rows[0] if key not in ("stage", "dropped")}
    reasons = {}
    for row in rows:
      for reason, number in row["dropped"].items():
        reasons[reason] = reasons.get(reason, 0) + number
        key = f"{row['stage']}/{reason}"
        counts["dropped"][key] = counts["dropped"].get(key, 0) + number
    counts["stages"].append({"stage": rows[0]["stage"], **total, "dropped": reasons})
  names = [task.name for task in tasks]
  report = {"shards": names, "inputs": [t.path for t in tasks], **counts}
  with _synced(folder / _REPORT) as file:
    file.write(files.as_json(report, indent=1).encode())
  return Report(
    folder=folder,
    parquet=tuple(folder / f"{name}.parquet" for name in names),
    drops=tuple(folder / f"{name}.drops.jsonl" for name in names),
    counts=counts,
    num_resumed=num_resumed,
  )


def _repeated_ids(paths: Sequence[pathlib.Path]) -> int:
  """Kept documents whose id another kept document (of another file) has too."""
  pyarrow = extras.require_extra("pyarrow", extra="data")
  compute = extras.require_extra("pyarrow.compute", extra="data")
  columns = [documents.open_parquet(path).read(columns=["id"])["id"] for path in paths]
  ids = pyarrow.chunked_array([chunk for c in columns for chunk in c.chunks], pyarrow.string())
  return len(ids) - compute.count_distinct(ids).as_py()
