"""Speed of our train step.

  python -m experiments.bench_train --suite=peer            against transformers on torch (CPU)
  python -m experiments.bench_train --suite=compile|memory|scaling|mfu

peer: tokens/s of our step and of transformers' Granite on torch (same arithmetic, shapes, float32,
AdamW, clipping, threads), one step each in turn, medians. compile: scan against a list of layers,
and the persistent cache. memory: temporary bytes of the compiled step with and without remat.
scaling: one global batch over 1, 2, 4, 8 host devices, each in its own process (on a machine with
fewer cores this measures the overhead of sharding). mfu: model FLOPs utilisation on an accelerator
at sequence 4096 (convention: minicpm_jax.core.metrics).
"""

import os
import subprocess
import sys

from absl import app, flags

_SUITES = ("peer", "compile", "memory", "scaling", "mfu")
_SUITE = flags.DEFINE_enum("suite", "peer", _SUITES, "What to measure.")
_SIZES = flags.DEFINE_list("sizes", ["20m", "60m"], "Of 20m, 60m.")
_BATCH = flags.DEFINE_integer("batch_size", 4, "Rows a step.")
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens a row.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds.")
_THREADS = flags.DEFINE_integer("threads", 0, "CPU cores for both sides; 0 = all.")
_DEVICES = flags.DEFINE_integer("host_devices", 0, "Internal: one row of the scaling suite.")


def main(argv: list[str]) -> int:
  del argv
  if _THREADS.value and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
  if _SUITE.value == "scaling" and not _DEVICES.value:
    return _scaling()
  if _DEVICES.value:
    flag = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  from minicpm_jax.core import host_memory

  is_kept = host_memory.keep()
  from experiments import _bench_train as bench

  shape = dict(batch_size=_BATCH.value, seq_len=_SEQ_LEN.value)
  if _DEVICES.value:
    print(bench.scaling_line(_SIZES.value[0], _DEVICES.value, _REPEATS.value, **shape))
    return 0
  rows, more = [], dict(shape, repeats=_REPEATS.value, is_memory_kept=is_kept)
  if _SUITE.value == "mfu":
    rows = bench.mfu_rows(_REPEATS.value)
  for size in _SIZES.value if _SUITE.value != "mfu" else ():
    if _SUITE.value == "peer":
      rows += bench.peer_rows(size, _REPEATS.value, **shape)
    elif _SUITE.value == "compile":
      rows += bench.compile_rows(size, **shape)
    else:
      rows += bench.memory_rows(size, **shape)
  bench.write(_SUITE.value, rows, **more)
  return 0


def _scaling() -> int:
  """Runs every number of devices in a process of its own and gathers the lines."""
  import json

  from experiments import _bench_train as bench

  rows = []
  for count in (1, 2, 4, 8):
    command = [sys.executable, "-m", "experiments.bench_train", *sys.argv[1:]]
    command += [f"--host_devices={count}", "--batch_size=8", f"--sizes={_SIZES.value[0]}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      print(done.stderr, file=sys.stderr)
      return done.returncode
    rows.append(json.loads(done.stdout.splitlines()[-1]))
  for row in rows:
    row["speed-up"] = row["tok/s"] / rows[0]["tok/s"]
  bench.write("scaling", rows, batch_size=8, seq_len=_SEQ_LEN.value, repeats=_REPEATS.value)
  return 0


if __name__ == "__main__":
  app.run(main)
