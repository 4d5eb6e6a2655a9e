"""A pool of local processes that survives the death of its workers.

`concurrent.futures` gives up on the whole pool when one process is killed. Here each worker has
its own pipe, so the parent knows which task died with it, starts a new worker and tries again.
"""

import collections
import errno
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any


def run_here(
  function: Callable[..., Any],
  common: tuple,
  tasks: Sequence[tuple],
  on_result: Callable[[Any], None],
) -> dict[int, str]:
  """`run` in this process, one task after the other."""
  failures = {}
  for index, task in enumerate(tasks):
    ok, value, is_fatal = _call(function, common, task)
    if ok:
      on_result(value)
    else:
      failures[index] = value
      if is_fatal:
        break
  return failures


def run(
  function: Callable[..., Any],
  common: tuple,
  tasks: Sequence[tuple],
  on_result: Callable[[Any], None],
  *,
  num_workers: int,
  max_attempts: int,
) -> dict[int, str]:
  """Calls `function(*task, *common)` for every task in spawned processes.

  Results go to `on_result` as they come, in no fixed order. Returns {task index: why} of the
  tasks that raised, or whose worker died `max_attempts` times. A full disk stops the rest.
  """
  context = multiprocessing.get_context("spawn")
  queue = collections.deque(range(len(tasks)))
  attempts = collections.Counter()
  failures, busy, idle = {}, {}, []  # busy: pipe -> (process, task index)
  try:
    while queue or busy:
      while queue and (idle or len(busy) < num_workers):
        pipe, process = idle.pop() if idle else _start(context, function, common)
        index = queue.popleft()
        attempts[index] += 1
        busy[pipe] = (process, index)
        _send(pipe, tasks[index])
      for pipe in connection.wait(list(busy)):
        process, index = busy.pop(pipe)
        try:
          ok, value, is_fatal = pipe.recv()
        except (EOFError, OSError):
          process.join()
          if attempts[index] < max_attempts:
            queue.append(index)
          else:
            failures[index] = f"worker died {max_attempts} times (exit code {process.exitcode})"
          continue
        idle.append((pipe, process))
        if ok:
          on_result(value)
        else:
          failures[index] = value
          if is_fatal:
            queue.clear()
  finally:
    stop = idle + [(pipe, process) for pipe, (process, _) in busy.items()]
    for pipe, process in stop:
      if pipe in busy:
        process.terminate()  # only after an error of the caller or an interrupt
      pipe.close()
    for _, process in stop:
      process.join()
  return failures


def _start(context, function, common):
  ours, theirs = context.Pipe()
  process = context.Process(target=_serve, args=(theirs, function, common), daemon=True)
  process.start()
  theirs.close()  # so that a dead worker reads as end of file here
  return ours, process


def _send(pipe, task) -> None:
  try:
    pipe.send(task)
  except OSError:
    pass  # the worker is dead: the receive that follows sees it


def _serve(pipe, function, common) -> None:
  while True:
    try:
      task = pipe.recv()
    except (EOFError, KeyboardInterrupt):
      return
    pipe.send(_call(function, common, task))


def _call(function, common, task) -> tuple[bool, Any, bool]:
  """(succeeded, result or traceback, must the other tasks be given up?)."""
  try:
    return True, function(*task, *common), False
  except Exception as error:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False, "".join(traceback.format_exception(error)).rstrip(), is_full
