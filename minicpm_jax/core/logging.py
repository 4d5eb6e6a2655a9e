"""Metrics to JSONL and TensorBoard (main process only), progress bar on a TTY, lines elsewhere."""

import io
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from minicpm_jax.core import files, mesh, types

JSONL = "metrics.jsonl"


def quiet_libraries() -> None:
  """Drops what orbax, matplotlib and jax's search for devices tell; scripts call it in main()."""
  logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.ERROR or "/orbax/" not in record.pathname
  )
  for name in ("matplotlib", "jax._src.xla_bridge"):
    logging.getLogger(name).setLevel(logging.ERROR)


class MetricWriter:
  """Appends `{"step": ..., name: value}` lines to `workdir/metrics.jsonl` and TensorBoard events.

  `resume_step=k` is the last step that the restored state has done (-1: a run from scratch): what
  an earlier attempt logged after k is dropped, so no step is there twice. Other processes write
  nothing.
  """

  def __init__(self, workdir: str | os.PathLike, *, resume_step: int = -1):
    self._file: io.TextIOBase | None = None
    self._board: Any = None
    if not mesh.is_main_process():
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    drop_after(folder / JSONL, resume_step)
    self._file = open(folder / JSONL, "a", encoding="utf-8")
    self._board = _Board(folder / "tensorboard", resume_step + 1)

  def write(self, step: int, values: Mapping[str, types.ArrayLike]) -> None:
    """One line; a number that is not finite is null in it."""
    if self._file is None:
      return
    numbers = {name: float(value) for name, value in values.items()}
    self._file.write(files.as_json({"step": int(step), **numbers}) + "\n")
    self._file.flush()
    self._board.write(step, numbers)

  def close(self) -> None:
    if self._file is not None:
      try:
        self._file.close()
      finally:
        self._board.close()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


class _Board:
  """TensorBoard events, written by the caller: tensorboardX's own thread dies with a full disk, and
  whoever then waits for it waits for ever. Steps from `purge_step` on of earlier files are hidden.
  """

  _FLUSH_SECONDS = 30.0

  def __init__(self, folder: pathlib.Path, purge_step: int):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._event, self._summary = event_pb2.Event, summary
    suffix = f".{time.time_ns()}"  # the names have seconds: a second writer would empty the file
    self._writer = event_file_writer.EventsWriter(str(folder / "events"), suffix)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))
    self._writer.flush()
    self._flushed = time.monotonic()

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
      value = self._summary.scalar(name, number)
      self._writer.write_event(self._event(wall_time=time.time(), step=int(step), summary=value))
    if time.monotonic() - self._flushed > self._FLUSH_SECONDS:
      self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()


def drop_after(path: str | os.PathLike, step: int) -> None:
  """Rewrites a metrics file without lines after `step` and without a torn last line."""
  path = pathlib.Path(path)
  if not path.exists():
    return
  text = path.read_text(encoding="utf-8")
  kept = "".join(files.as_json(row) + "\n" for row in _rows(text, path) if row["step"] <= step)
  if kept != text:
    files.write(path, kept)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | int | None]]:
  """Rows of `workdir/metrics.jsonl` in order."""
  path = pathlib.Path(workdir) / JSONL
  return _rows(path.read_text(encoding="utf-8"), path)


def _rows(text: str, path: pathlib.Path) -> list[dict[str, Any]]:
  rows = []
  lines = text.splitlines()
  for i, line in enumerate(lines):
    try:
      row = json.loads(line)
      row["step"] = int(row["step"])
    except (ValueError, KeyError, TypeError):
      if i == len(lines) - 1:
        break  # a process that died while writing
      raise ValueError(
        f"{path} line {i + 1}: found {line[:80]!r}, expected JSON with a step"
      ) from None
    rows.append(row)
  return rows


class Progress:
  """Shows a run: a rich bar with the last values on a TTY, one plain line per update elsewhere."""

  def __init__(self, total: int, *, start: int = 0, stream: io.TextIOBase | None = None):
    self._total, self._start, self._began = total, start, time.monotonic()
    self._stream = stream or sys.stdout
    self._bar: Any = None
    self._is_quiet = not mesh.is_main_process()
    if not self._is_quiet and self._stream.isatty():
      from rich import console, progress

      self._bar = progress.Progress(
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
        console=console.Console(file=self._stream),
      )
      self._task = self._bar.add_task("", total=total, completed=start)
      self._bar.start()

  def update(self, step: int, values: Mapping[str, types.ArrayLike] | None = None) -> None:
    """After `step` steps; without values a plain stream prints nothing."""
    if self._is_quiet:
      return
    text = "  ".join(f"{name} {_format(value)}" for name, value in (values or {}).items())
    if self._bar is not None:
      shown = {"description": text} if text else {}
      self._bar.update(self._task, completed=step, **shown)
    elif text:
      self._say(f"step {step}/{self._total}  {text}  eta {self._eta(step)}")

  def message(self, text: str) -> None:
    """A line of its own, above the bar."""
    if self._is_quiet:
      return
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      self._say(text)

  def _say(self, text: str) -> None:
    """Until nobody reads: Ctrl-C ends the tee of `2>&1 | tee log` too, and the run still has to
    save. The numbers are in the run's metrics file."""
    try:
      print(text, file=self._stream, flush=True)
    except BrokenPipeError:
      self._is_quiet = True

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _eta(self, step: int) -> str:
    done = max(step - self._start, 1)
    seconds = int((time.monotonic() - self._began) / done * max(self._total - step, 0))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def progress(total: int, *, start: int = 0, stream: io.TextIOBase | None = None) -> Progress:
  """`with progress(num_steps, start=k) as bar: bar.update(step, {"loss": ...})`."""
  return Progress(total, start=start, stream=stream)


def _format(value: types.ArrayLike) -> str:
  number = float(value)
  if number and (abs(number) >= 1e5 or abs(number) < 1e-3):
    return f"{number:.3g}"
  return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
