"""Batches for training and evaluation, with an exact, checkpointable position (data.md section 8).

Per source: grain reads, shuffles and repeats documents (`sources.DocumentStream`), a packer makes
rows. Rows are mixed with exact shares, and a phase change only changes the shares: the packers stay
as they are, so every source goes on where it stopped. The position of the whole is
{step, rows of the phase by source, one cursor of two or three integers by source}.
"""

import atexit
import collections
import contextlib
import dataclasses
import hashlib
import json
import weakref
from collections.abc import Iterator

import grain
import numpy as np

from minicpm_jax.config import data as data_config
from minicpm_jax.data import mixture, packing, sources
from minicpm_jax.data import prefetch as prefetch_lib

Batch = dict[str, np.ndarray]
STATE_VERSION = 1


class DataStateError(ValueError):
  """A saved position that does not belong to this input configuration; names the field."""


def make_iterator(
  cfg: data_config.DataConfig,
  *,
  batch_size_per_host: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  vocab_size: int | None = None,
) -> "BatchIterator":
  """The endless iterator of this host's training batches.

  A batch holds int32 `tokens`, `targets`, `segment_ids`, `positions`, `source_ids` (place in
  `cfg.sources`) and float32 `loss_mask`, each [rows of this host, cfg.seq_len]. Sources with ids
  of `vocab_size` or more are refused: at once where the source records its vocabulary, else when
  the row is read.
  """
  batch_size = _rows_a_host(cfg, batch_size_per_host, process_count)
  return BatchIterator(
    _Rows(cfg, batch_size, process_index, process_count, vocab_size), cfg.prefetch
  )


def make_eval_iterator(
  cfg: data_config.DataConfig,
  source_name: str,
  num_batches: int | None = None,
  *,
  process_index: int = 0,
  process_count: int = 1,
  vocab_size: int | None = None,
) -> Iterator[Batch]:
  """The first `num_batches` batches of one source, in file order, once: the same at every call.

  Where the source ends early, empty rows (loss_mask 0) fill up, so all hosts make equally many
  batches. None reads the whole source (one host only) and fills up only the last batch.
  """
  if num_batches is None and process_count > 1:
    raise ValueError(f"num_batches: found None on {process_count} hosts, expected a number")
  names = [s.name for s in cfg.sources]
  if source_name not in names:
    raise ValueError(f"source_name: found {source_name!r}, expected one of {names}")
  number = names.index(source_name)
  batch_size = _rows_a_host(cfg, None, process_count)
  source = sources.open_source(source_name, cfg.sources[number].path)
  sources.check_vocabulary(source, vocab_size)
  stream = sources.DocumentStream(
    source,
    seed=None,
    process_index=process_index,
    process_count=process_count,
    repeat=False,
    num_threads=cfg.num_threads,
  )
  packer = _packer(cfg, stream)
  checked = None if source.vocab_size else vocab_size
  return _eval_batches(packer, cfg.seq_len, batch_size, num_batches, number, source.name, checked)


def _eval_batches(
  packer: packing.Packer,
  seq_len: int,
  batch_size: int,
  num_batches: int | None,
  number: int,
  name: str,
  vocab_size: int | None,
) -> Iterator[Batch]:
  with contextlib.closing(packer):
    count, more = 0, True
    while more if num_batches is None else count < num_batches:
      rows = []
      while more and len(rows) < batch_size:
        row = packer.next_row()
        more = row is not None
        rows += [sources.check_ids(row, name, vocab_size)] if more else []
      if not rows and num_batches is None:
        return
      rows += [packing.make_row([], seq_len)] * (batch_size - len(rows))
      yield _stack(rows, [number] * batch_size)
      count += 1


def _rows_a_host(
  cfg: data_config.DataConfig, batch_size_per_host: int | None, process_count: int
) -> int:
  if process_count < 1:
    raise ValueError(f"process_count: found {process_count}, expected at least 1")
  if batch_size_per_host is not None:
    if batch_size_per_host < 1:
      raise ValueError(f"batch_size_per_host: found {batch_size_per_host}, expected at least 1")
    return batch_size_per_host
  if cfg.batch_size % process_count:
    raise ValueError(
      f"data.batch_size: found {cfg.batch_size}, expected a multiple of {process_count} hosts"
    )
  return cfg.batch_size // process_count


def _packer(cfg: data_config.DataConfig, stream: packing.Stream) -> packing.Packer:
  if cfg.packing == "concat":
    return packing.ConcatPacker(stream, cfg.seq_len, align=cfg.align)
  return packing.BestFitPacker(
    stream,
    cfg.seq_len,
    align=cfg.align,
    num_bins=cfg.num_packing_bins,
    long_documents=cfg.long_documents,
  )


def _stack(rows: list[packing.Row], numbers: list[int]) -> Batch:
  batch = {key: np.stack([row[key] for row in rows]) for key in packing.KEYS}
  shape = batch["tokens"].shape
  batch["source_ids"] = np.repeat(np.asarray(numbers, np.int32)[:, None], shape[1], axis=1)
  return batch


def _source_seed(seed: int, name: str) -> int:
  """The root seed folded with the source's name: stable over processes and versions."""
  return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


@dataclasses.dataclass(frozen=True)
class _Position:
  """After `step` batches: rows of the present phase and cursors, by source."""

  step: int
  rows: dict[str, int]
  cursors: dict[str, dict[str, int]]


class _Rows:
  """The batches themselves, without the thread."""

  def __init__(
    self,
    cfg: data_config.DataConfig,
    batch_size: int,
    process_index: int,
    process_count: int,
    vocab_size: int | None,
  ):
    if not cfg.phases:
      raise ValueError("data.phases: found none, expected at least one phase with weights")
    if not 0 <= process_index < process_count:
      raise ValueError(f"process_index: found {process_index}, expected 0..{process_count - 1}")
    self.cfg = cfg
    self.batch_size, self.process_index, self.process_count = (
      batch_size,
      process_index,
      process_count,
    )
    self._shares = {p.start_step: mixture.shares(p) for p in cfg.phases}
    used = {name for share in self._shares.values() for name in share}
    used |= {p.replace[0] for p in cfg.phases if p.replace is not None}
    self.numbers = {s.name: i for i, s in enumerate(cfg.sources) if s.name in used}
    self.sources = {
      s.name: sources.open_source(s.name, s.path) for s in cfg.sources if s.name in used
    }
    self._check_tokenizers()
    for source in self.sources.values():
      sources.check_vocabulary(source, vocab_size)
    self._unknown = {n: vocab_size for n, s in self.sources.items() if s.vocab_size is None}
    self.streams = {
      name: sources.DocumentStream(
        source,
        seed=_source_seed(cfg.seed, name) if cfg.shuffle else None,
        process_index=process_index,
        process_count=process_count,
        num_threads=cfg.num_threads,
        num_workers=cfg.num_workers,
      )
      for name, source in self.sources.items()
    }
    self._packers = {name: _packer(cfg, stream) for name, stream in self.streams.items()}
    self._step, self._rows = 0, collections.Counter()

  def _check_tokenizers(self) -> None:
    hashes = {n: s.tokenizer_hash for n, s in self.sources.items() if s.tokenizer_hash}
    if len(set(hashes.values())) > 1:
      short = {name: value[:12] for name, value in hashes.items()}
      raise ValueError(f"data.sources: found tokenizer hashes {short}, expected one for all")

  def next_batch(self) -> Batch:
    phase = mixture.phase_at(self.cfg.phases, self._step)
    if phase.start_step == self._step:
      self._rows = collections.Counter()
    share = self._shares[phase.start_step]
    rows = collections.Counter(self._rows)
    assignment = []
    for _ in range(self.batch_size * self.process_count):
      assignment.append(mixture.next_source(rows, share))
      rows[assignment[-1]] += 1
    dealt = mixture.deal(assignment, self._step, self.cfg.seed)
    start = self.process_index * self.batch_size
    own = dealt[start : start + self.batch_size]
    made, numbers, first = [], [], sum(self._rows.values()) + start
    for i, name in enumerate(own):
      row = self._packers[name].next_row()  # also where it is replaced: the others stay the same
      if (other := mixture.replaced(phase, first + i)) is not None:
        name, row = other, self._packers[other].next_row()
      made.append(sources.check_ids(row, name, self._unknown.get(name)))
      numbers.append(self.numbers[name])
    batch = _stack(made, numbers)
    self._step, self._rows = self._step + 1, rows
    return batch

  def position(self) -> _Position:
    cursors = {name: packer.get_state() for name, packer in self._packers.items()}
    return _Position(self._step, dict(self._rows), cursors)

  def seek(self, position: _Position) -> None:
    self._step, self._rows = position.step, collections.Counter(position.rows)
    start = {"document": 0, "offset": 0, "row": 0}
    for name, packer in self._packers.items():
      packer.set_state(start | position.cursors.get(name, {}))

  def close(self) -> None:
    for packer in self._packers.values():
      packer.close()

  def fingerprint(self, step: int) -> dict:
    """All that the first `step` batches depended on; phases still to come may change."""
    cfg = self.cfg
    past = [p for p in cfg.phases if p.start_step < step]
    used = {name for p in past for name in self._shares[p.start_step]}
    found = {
      "sources": {n: s.identity[:16] for n, s in sorted(self.sources.items()) if n in used},
      "weights": [[p.start_step, dict(sorted(mixture.shares(p).items()))] for p in past],
      "seq_len": cfg.seq_len,
      "packing": cfg.packing,
      "align": cfg.align,
      "shuffle": cfg.shuffle,
      "seed": cfg.seed,
      "process_count": self.process_count,
      "process_index": self.process_index,
    }
    if any(p.replace is not None for p in past):
      found["replace"] = [[p.start_step, *p.replace] for p in past if p.replace is not None]
      found["sources"] |= {
        p.replace[0]: self.sources[p.replace[0]].identity[:16] for p in past if p.replace
      }
    if cfg.packing == "best_fit":
      found |= {k: getattr(cfg, k) for k in ("num_packing_bins", "long_documents")}
    return found


class BatchIterator(grain.DatasetIterator):
  """Endless batches, made ahead by one thread; also fits grain.checkpoint.CheckpointSave."""

  def __init__(self, rows: _Rows, prefetch: int):
    super().__init__()
    self._rows = rows
    self._position = rows.position()
    self._ahead = prefetch_lib.Prefetcher(lambda: (rows.next_batch(), rows.position()), prefetch)
    # grain's worker processes must be ended before multiprocessing's own clean-up at exit, also if
    # nobody calls close: atexit runs the last one registered first.
    self._end = weakref.finalize(self, _end, self._ahead, rows)
    atexit.register(self._end)

  def __next__(self) -> Batch:
    self._assert_not_closed()
    try:
      batch, self._position = self._ahead.next()
    except Exception:
      self._ahead.halt()
      self._rows.seek(self._position)
      raise
    return batch

  @property
  def step(self) -> int:
    """Batches returned so far."""
    return self._position.step

  @property
  def sources(self) -> dict[str, sources.Source]:
    """The sources that some phase uses, by name."""
    return self._rows.sources

  @property
  def phase_name(self) -> str:
    """The phase of the last batch returned (of the first one before any)."""
    return mixture.phase_at(self._rows.cfg.phases, max(self.step - 1, 0)).name

  @property
  def vocab_size(self) -> int | None:
    """The largest vocabulary that the sources were tokenised with, where they record it."""
    sizes = [s.vocab_size for s in self._rows.sources.values() if s.vocab_size is not None]
    return max(sizes, default=None)

  def epochs(self) -> dict[str, float]:
    """How often the documents of each source have been read, on this host."""
    streams = self._rows.streams
    cursors = self._position.cursors
    return {n: cursors[n]["document"] / stream.num_documents for n, stream in streams.items()}

  def get_state(self) -> dict:
    """The position after the last batch returned, ready for JSON."""
    config = self._rows.fingerprint(self.step)
    text = json.dumps(config, sort_keys=True)
    return {
      "version": STATE_VERSION,
      **dataclasses.asdict(self._position),
      "config": config,
      "config_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
    }

  def set_state(self, state: dict, *, force: bool = False) -> None:
    """Goes to a saved position.

    Refused (DataStateError naming the field) when the batches up to there would not have come out
    the same under this config. With `force` every source goes on at the start of the document that
    the state names.
    """
    found = state.get("version") if isinstance(state, dict) else f"{state!r:.60}"
    if found != STATE_VERSION:
      raise DataStateError(f"data state: version: found {found!r}, expected {STATE_VERSION}")
    for field, kind in (("step", int), ("rows", dict), ("cursors", dict), ("config", dict)):
      if not isinstance(state.get(field), kind):
        found = f"{state.get(field)!r:.60}"
        raise DataStateError(f"data state: {field}: found {found}, expected {kind.__name__}")
    _check_numbers(state)
    mismatch = self._mismatch(state)
    if mismatch and not force:
      raise DataStateError(mismatch)
    for name in {} if mismatch else state["config"]["sources"]:
      if name not in state["cursors"]:
        raise DataStateError(f"data state: cursors.{name}: found none, expected the place in it")
    cursors = {name: dict(cursor) for name, cursor in state["cursors"].items()}
    if mismatch:
      cursors = {name: {"document": cursor["document"]} for name, cursor in cursors.items()}
    self._ahead.halt()
    self._rows.seek(_Position(state["step"], dict(state["rows"]), cursors))
    self._position = self._rows.position()

  def _mismatch(self, state: dict) -> str | None:
    saved, own = state["config"], self._rows.fingerprint(state["step"])
    for field in [*own, *saved]:
      if saved.get(field) != own.get(field):
        return (
          f"data state of step {state['step']}: {field}: found {saved.get(field)!r} in the "
          f"checkpoint, expected {own.get(field)!r} of this config (the data order would change)"
        )
    return None

  def close(self) -> None:
    """Ends the thread and the readers, with their threads and processes."""
    if self._end.alive:  # grain's __del__ calls this again, perhaps after atexit is gone
      atexit.unregister(self._end)
      self._end()
    super().close()


def _check_numbers(state: dict) -> None:
  """Refuses counts that are none; a cursor holds at least its document."""
  counts = {"step": state["step"]} | {f"rows.{n}": found for n, found in state["rows"].items()}
  for name, cursor in state["cursors"].items():
    if not isinstance(cursor, dict) or "document" not in cursor:
      found = f"{cursor!r:.60}"
      raise DataStateError(f"data state: cursors.{name}: found {found}, expected a document")
    counts |= {f"cursors.{name}.{key}": found for key, found in cursor.items()}
  for field, found in counts.items():
    if type(found) is not int or not 0 <= found < 2**62:
      raise DataStateError(f"data state: {field}: found {found!r:.60}, expected an integer >= 0")


def _end(ahead: prefetch_lib.Prefetcher, rows: _Rows) -> None:
  ahead.halt()
  rows.close()
