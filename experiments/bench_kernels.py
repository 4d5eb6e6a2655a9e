"""Every kernel's bench on the accelerator of this machine, in one process.

  python -m experiments.bench_kernels                    (all of the table in benchmarks/README.md)
  python -m experiments.bench_kernels --ops=sparse_topk,fp8_gemm --tune
  python -m experiments.bench_kernels --ops=w4a16_gemm --implementation=xla --cases=NAME,...

The same as `python -m pallas_kernels.OP.bench` one after the other, without starting a process for
each, which is most of the time on a machine lent for minutes. A bench that fails is named, the
others go on, and the status is 1. After every bench its rows replace those of the same op, case and
implementation in OUTPUT/kernels_DEVICE.json; a row's `command` repeats it alone. --tune searches
tiles first and writes pallas_kernels/OP/tuned.json.
"""

import dataclasses
import importlib
import json
import re
import sys
import time

from absl import flags

from experiments import _command

# Op -> (implementation, cases) in the order of what one wants to know first.
_8B = "minicpm4_8b"
PLAN = {
  "sparse_attention": [("mosaic_gpu", f"{_8B}_32k,{_8B}_128k"), ("triton", f"{_8B}_32k")],
  "sparse_topk": [("triton", f"{_8B}_128k_coarse"), ("mosaic_gpu", f"{_8B}_128k_coarse")],
  "sparse_decode": [("triton", f"{_8B}_128k_batch1,{_8B}_128k_batch8,{_8B}_128k_batch32")],
  "w4a16_gemm": [
    ("mosaic_gpu", f"{_8B}_up_m1,{_8B}_up_m16,{_8B}_up_m64"),
    ("triton", f"{_8B}_up_m1"),
  ],
  "ternary_gemm": [("auto", f"{_8B}_up_m1")],
  "fp8_gemm": [("mosaic_gpu", f"{_8B}_up_m4096")],
  "vocab_topk": [("triton", f"{_8B}_root,{_8B}_level,{_8B}_level_fr")],
}

VALUES = flags.FlagValues()
_OPS = flags.DEFINE_list("ops", list(PLAN), "Folders of pallas_kernels.", flag_values=VALUES)
_IMPLEMENTATION = flags.DEFINE_string(
  "implementation", None, "Instead of the plan's; needs --cases.", flag_values=VALUES
)
_CASES = flags.DEFINE_list(
  "cases", None, "Of the one op of --ops; needs --implementation.", flag_values=VALUES
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls.", lower_bound=1, flag_values=VALUES)
_TUNE = flags.DEFINE_bool("tune", False, "Search tiles first.", flag_values=VALUES)
_BUDGET = flags.DEFINE_float(
  "budget", None, "Seconds after which no further bench starts.", flag_values=VALUES
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder; default: benchmarks/results.", flag_values=VALUES
)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and a line on stderr for bad input and for every bench that failed."""
  return _command.run(_run, VALUES, argv)


def _plan() -> list[tuple[str, str, str]]:
  """(op, implementation, cases) of every bench to run."""
  if not _OPS.value or set(_OPS.value) - set(PLAN):
    raise ValueError(f"--ops: found {_OPS.value}, expected some of {sorted(PLAN)}")
  if (_IMPLEMENTATION.value is None) != (_CASES.value is None):
    raise ValueError("--implementation, --cases: found one of them, expected both or neither")
  if _CASES.value is None:
    return [(op, *what) for op in _OPS.value for what in PLAN[op]]
  if len(_OPS.value) != 1:
    raise ValueError(f"--ops: found {_OPS.value}, expected the one op that has these --cases")
  return [(_OPS.value[0], _IMPLEMENTATION.value, ",".join(_CASES.value))]


def _run() -> int:
  import jax

  from experiments import _results

  plan = _plan()
  kind = jax.devices()[0].device_kind
  if jax.default_backend() == "cpu" and any(what[1] != "xla" for what in plan):
    raise ValueError(f"no accelerator: found {kind!r}; on a CPU only --implementation=xla runs")
  folder = _results.folder(_OUTPUT.value)
  path = folder / f"kernels_{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"
  old = json.loads(path.read_text())["rows"] if path.is_file() else []
  rows = {(row["op"], row["case"], row["implementation"]): row for row in old}
  start, failed = time.perf_counter(), []
  for op, implementation, cases in plan:
    name = f"{op} {implementation}"
    if _BUDGET.value is not None and time.perf_counter() - start > _BUDGET.value:
      failed.append(f"{name}: not started, --budget={_BUDGET.value:g} s was spent")
      continue
    args = [f"--implementation={implementation}", f"--cases={cases}", f"--repeats={_REPEATS.value}"]
    command = " ".join(["python", "-m", f"pallas_kernels.{op}.bench", *args])
    bench = importlib.import_module(f"pallas_kernels.{op}.bench")
    try:
      found = bench.main([*args, *(["--tune"] if _TUNE.value else [])])
    except (SystemExit, Exception) as error:  # a kernel that this device refuses: the others go on
      lines = str(error).splitlines() or [""]
      failed.append(f"{name}: {type(error).__name__}: {lines[0][:200]}")
      continue
    environment = _results.environment()
    for row in map(dataclasses.asdict, found):
      key = (row["op"], row["case"], row["implementation"])
      rows[key] = row | dict(command=command, jax=environment["jax"], date=environment["date"])
    _results.save(path, list(rows.values()))
  for line in failed:
    print(line, file=sys.stderr)
  print(f"{len(plan) - len(failed)} of {len(plan)} benches: {path}")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
