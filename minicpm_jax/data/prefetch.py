"""One thread that makes values ahead of their use."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
  """The results of `make()`, one after the other, `depth` of them ahead; 0 calls it when asked."""

  def __init__(self, make: Callable[[], T], depth: int):
    self._make, self._depth = make, depth
    self._thread: threading.Thread | None = None
    self._stop = threading.Event()

  def next(self) -> T:
    """The next value, or the exception that `make` raised in its place."""
    if not self._depth:
      return self._make()
    if self._thread is None:
      self._queue: queue.Queue = queue.Queue(self._depth)
      self._stop = threading.Event()
      args = (self._make, self._queue, self._stop)
      self._thread = threading.Thread(target=_produce, args=args, daemon=True)
      self._thread.start()
    value, error = self._queue.get()
    if error is not None:
      raise error
    return value

  def halt(self) -> None:
    """Ends the thread and forgets what it made; `next` starts a new one."""
    self._stop.set()
    thread, self._thread = self._thread, None
    if thread is not None and thread is not threading.current_thread():  # a collector may call it
      thread.join()


def _produce(make: Callable, out: queue.Queue, stop: threading.Event) -> None:
  while not stop.is_set():
    try:
      item = (make(), None)
    except Exception as error:  # raised by `next` in the caller's thread
      item = (None, error)
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        out.put(item, timeout=0.1)
        break
    if item[1] is not None:
      return
