"""Counters of the service, and the memory of the process and its devices."""

import collections
import os
import pathlib
import threading
import time
from typing import Any

import jax

from minicpm_jax.infer.server import responses

_COUNTS = ("requests_accepted", "requests_rejected", "requests_rejected_full")
_COUNTS += ("requests_completed", "requests_failed", "requests_cancelled", "engine_failures")
_COUNTS += ("prompt_tokens", "cached_tokens", "completion_tokens", "tokens_generated")


class Metrics:
  """Sums since the start; safe from any thread."""

  def __init__(self):
    self.started = time.time()
    self._lock = threading.Lock()
    self._sums: collections.Counter[str] = collections.Counter()

  def add(self, name: str, amount: int | float = 1) -> None:
    with self._lock:
      self._sums[name] += amount

  def finished(self, usage: responses.Usage, stats: Any) -> None:
    """An answer that ended well; `stats` are the engine's."""
    with self._lock:
      self._sums["requests_completed"] += 1
      self._sums["prompt_tokens"] += usage.prompt_tokens
      self._sums["cached_tokens"] += usage.cached_tokens
      self._sums["completion_tokens"] += usage.completion_tokens
      if stats is not None:
        self._sums["prefill_seconds"] += stats.prefill_seconds
        self._sums["decode_seconds"] += stats.decode_seconds
        self._sums["rounds"] += len(stats.accepted)
        self._sums["round_tokens"] += sum(stats.accepted)

  def report(self) -> dict[str, Any]:
    """Counts, times, generated tokens a second of engine time, mean accept length."""
    with self._lock:
      sums = dict(self._sums)
    seconds = sums.get("engine_seconds", 0.0) - sums.get("compile_seconds", 0.0)
    tokens, rounds = sums.get("tokens_generated", 0), sums.get("rounds", 0)
    return {
      "uptime_seconds": time.time() - self.started,
      **{name: sums.get(name, 0) for name in _COUNTS},
      **{f"{n}_seconds": sums.get(f"{n}_seconds", 0.0) for n in ("engine", "prefill", "decode")},
      "compile_seconds": sums.get("compile_seconds", 0.0),
      "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
      "mean_accept_length": sums.get("round_tokens", 0) / rounds if rounds else 0.0,
    }


def memory_usage() -> dict[str, int]:
  """Bytes: "process" (resident), and "device" where the backend counts it."""
  usage = {}
  statm = pathlib.Path("/proc/self/statm")
  if statm.is_file():
    usage["process"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_in_use" in stats:
    usage["device"] = int(stats["bytes_in_use"])
  return usage
