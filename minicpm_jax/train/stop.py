"""SIGTERM becomes "save and leave" at the next step boundary."""

import signal
import threading
from typing import Any

import jax

from minicpm_jax.ckpt import orbax_io


class StopOnSigterm:
  """`with StopOnSigterm(store) as stop: ... if stop.is_requested(step): save, break`.

  Under `jax.distributed` the processes agree on one common step (Orbax's preemption sync); without
  it a signal handler of this process serves. Outside the main thread Python allows no handler, and
  the signal keeps its usual meaning.
  """

  def __init__(self, store: orbax_io.CheckpointStore):
    self._store = store
    self._is_set = False
    self._previous: Any = None
    self._is_distributed = jax.distributed.is_initialized()
    self._has_handler = (
      not self._is_distributed and threading.current_thread() is threading.main_thread()
    )

  def __enter__(self) -> "StopOnSigterm":
    if self._has_handler:
      self._previous = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, *exc_info: Any) -> None:
    if self._has_handler:
      signal.signal(signal.SIGTERM, self._previous)

  def _on_signal(self, signum: int, frame: Any) -> None:
    del signum, frame
    self._is_set = True

  def is_requested(self, step: int) -> bool:
    """Ask once after every step, with the same step on every process."""
    if self._is_distributed:
      return self._store.reached_preemption(step)
    return self._is_set
