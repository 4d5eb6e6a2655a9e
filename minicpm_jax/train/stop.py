"""SIGTERM and Ctrl-C become "save and leave" at the next step boundary."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax

from minicpm_jax.ckpt import orbax_io


class Stopped(KeyboardInterrupt):
  """A run was told to stop and has saved; like Ctrl-C it passes through `except Exception`."""


class StopOnSignal:
  """`with StopOnSignal(store) as stop: ... if stop.is_requested(step): save, break`.

  Under `jax.distributed` the processes agree on one common step (Orbax's preemption sync, SIGTERM
  only); without it a signal handler of this process serves. The second Ctrl-C does not wait.
  Outside the main thread Python allows no handler, and the signals keep their usual meaning.
  """

  def __init__(self, store: orbax_io.CheckpointStore):
    self._store = store
    self._is_set = False
    self.is_interrupted = False  # by Ctrl-C: the caller does not go on either
    self._previous: dict[int, Any] = {}
    self._is_distributed = jax.distributed.is_initialized()
    self._has_handler = (
      not self._is_distributed and threading.current_thread() is threading.main_thread()
    )

  @property
  def reason(self) -> str:
    return "Ctrl-C" if self.is_interrupted else "SIGTERM"

  def __enter__(self) -> "StopOnSignal":
    if self._has_handler:
      signals = [signal.SIGTERM]
      if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else its owner's
        signals.append(signal.SIGINT)
      self._previous = {number: signal.signal(number, self._on_signal) for number in signals}
    return self

  def __exit__(self, *exc_info: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, signum: int, frame: Any) -> None:
    del frame
    self._is_set = True
    if signum == signal.SIGINT:
      self.is_interrupted = True
      signal.signal(signal.SIGINT, signal.default_int_handler)
      with contextlib.suppress(OSError):  # `2>&1 | tee log`: Ctrl-C has ended tee too
        # Not through sys.stderr, whose lock this thread may hold.
        os.write(2, b"\nCtrl-C: saving after this step (once more: leave at once)\n")

  @property
  def has_come(self) -> bool:
    """Whether this process got a signal; also where no step follows that would ask."""
    return self._is_set

  def is_requested(self, step: int) -> bool:
    """Ask once after every step, with the same step on every process."""
    if self._is_distributed:
      return self._store.reached_preemption(step)
    return self._is_set
