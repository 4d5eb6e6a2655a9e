"""Speed of our train step.

  python -m experiments.bench_train --suite=peer            against transformers on torch (CPU)
  python -m experiments.bench_train --suite=compile|memory|scaling|mfu|qat

peer: tokens/s of our step and of transformers' Granite on torch (same arithmetic, shapes, float32,
AdamW, clipping, threads), one step each in turn, medians. compile: scan, unrolled scan and a list
of layers, each with an empty and with a filled persistent cache. memory: temporary bytes of the
compiled step and the peak of the process, with and without remat. scaling: one global batch over
1, 2, 4, 8 host devices (on a machine with fewer cores this measures what sharding costs). Every
row of these three is a process of its own. mfu: whole steps of the 0.5B shape on an accelerator
(`_bench_mfu`; convention of MFU: minicpm_jax.core.metrics). qat: the step with low-bit weights
against the plain one, in turn; on an accelerator that of the 0.5B shape, FP8 too. Status 1 where a
row of these two failed. Results go to OUTPUT/bench_train_SUITE[_SIZES].json.
"""

import json
import os
import subprocess
import sys
import tempfile

from absl import flags

from experiments import _command

_SUITES = ("peer", "compile", "memory", "scaling", "mfu", "qat")
VALUES = flags.FlagValues()
_SUITE = flags.DEFINE_enum("suite", "peer", _SUITES, "What to measure.", flag_values=VALUES)
_SIZES = flags.DEFINE_list(
  "sizes", ["20m", "60m"], "Of tiny, 20m, 60m; of whole steps 0p5b.", flag_values=VALUES
)
_BATCH = flags.DEFINE_integer("batch_size", 4, "Rows (scaling: 8).", 1, flag_values=VALUES)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens a row.", 1, flag_values=VALUES)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds.", 1, flag_values=VALUES)
_THREADS = flags.DEFINE_integer("threads", 0, "CPU cores; 0 = all.", flag_values=VALUES)
_OUTPUT = flags.DEFINE_string("output", None, "Folder (benchmarks/results).", flag_values=VALUES)
_PARTS = flags.DEFINE_list("parts", [], "Whole steps: names begin so.", flag_values=VALUES)
_BUDGET = flags.DEFINE_float("budget", 55.0, "Seconds to begin a part in.", flag_values=VALUES)
_ROW = flags.DEFINE_string("row", None, "Internal: this row alone, as JSON.", flag_values=VALUES)


def main(argv: list[str] | None = None) -> int:
  return _command.run(_run, VALUES, argv)


def _run() -> int | None:
  if _THREADS.value:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if not 0 < _THREADS.value <= len(cores):
      raise ValueError(f"--threads: found {_THREADS.value}, expected 0..{len(cores)} here")
    os.sched_setaffinity(0, cores[: _THREADS.value])
  from minicpm_jax.core import host_memory

  suite, sizes, shape = _SUITE.value, _SIZES.value, dict(seq_len=_SEQ_LEN.value)
  shape["batch_size"] = 8 if suite == "scaling" and not _BATCH.present else _BATCH.value
  if suite == "scaling" and _BATCH.value % 8 and _BATCH.present:
    raise ValueError(f"--batch_size: found {_BATCH.value}, expected a multiple of 8 devices")
  is_kept = host_memory.keep() if suite != "memory" else False  # it would hold its peak
  from experiments import _bench_mfu, _bench_train, _results

  _command.refuse_unread(VALUES, _bench_mfu.unread(suite), f"--suite={suite}")
  bench, is_whole = _bench_train, _bench_mfu.is_served(suite)
  known = _bench_mfu.SHAPES if is_whole else bench.SIZES
  if is_whole and not VALUES["sizes"].present:
    sizes = ["0p5b"]
  if not sizes or (wrong := sorted(set(sizes) - set(known))):
    raise ValueError(f"--sizes: found {sizes and wrong}, expected of {sorted(known)}")
  if _ROW.value is not None:
    print(json.dumps(bench.row(json.loads(_ROW.value), _REPEATS.value, **shape)))
    return None
  if is_whole:
    more, shape = dict(budget=_BUDGET.value, only=_PARTS.value), {}
    rows = [r for size in sizes for r in _bench_mfu.rows(suite, size, _REPEATS.value, **more)]
  elif suite == "peer":
    rows = [row for size in sizes for row in bench.peer_rows(size, _REPEATS.value, **shape)]
  elif suite == "qat":
    rows = [row for size in sizes for row in bench.qat_rows(size, _REPEATS.value, **shape)]
  else:
    rows = [row for size in sizes for row in _processes(bench.specs(suite, size))]
  if suite == "scaling":
    for row in rows:
      row["speed-up"] = row["tok/s"] / next(r["tok/s"] for r in rows if r["size"] == row["size"])
  folder = _results.folder(_OUTPUT.value)
  name = f"bench_train_{suite}" + ("" if sizes == ["20m", "60m"] else "_" + "_".join(sizes))
  measured = dict(repeats=_REPEATS.value, is_memory_kept=is_kept, **shape)
  _results.write(folder / f"{name}.json", rows, **measured)
  return int(any("error" in row for row in rows))


def _processes(specs: list[dict]) -> list[dict]:
  """Measures every row in a fresh process, one after the other."""
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    for spec in specs:
      env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
      if spec["suite"] == "compile":
        env |= {
          "JAX_ENABLE_COMPILATION_CACHE": "true",
          "JAX_COMPILATION_CACHE_DIR": cache,
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
          "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
      if spec["suite"] == "scaling":
        count = f"--xla_force_host_platform_device_count={spec['devices']}"
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
      command = [sys.executable, "-m", "experiments.bench_train", *sys.argv[1:]]
      command.append(f"--row={json.dumps(spec)}")
      done = subprocess.run(command, capture_output=True, text=True, env=env)
      if done.returncode:
        raise ValueError(f"row {spec} ended with {done.returncode}:\n{done.stderr}")
      rows.append(json.loads(done.stdout.splitlines()[-1]))
      print(rows[-1], flush=True)
  return rows


if __name__ == "__main__":
  sys.exit(main())
