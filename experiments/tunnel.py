"""The model wind tunnel: both papers' training science on small models, with one report.

  python -m experiments.tunnel --suite=paper --scale=toy       everything; under 90 minutes, 2 cores
  python -m experiments.tunnel --suite=paper --quick           the same suites, smaller; about 15
  python -m experiments.tunnel --suite=mup,wsd --workdir=DIR   some suites

Suites: mup, coordinates, constants, wsd, diagnostics, law, batch, steplaw, stages, bench. Text: the
library's source of the running Python, or --data=FOLDER of text files. Stopped runs are resumed,
finished ones read back: start it again with the same --workdir. Writes report.md, report.html and
report.json under WORKDIR/report, one JSON a run, and config.py of a large run (suite "plan").
"""

import os
import pathlib
import sys
import time

from absl import flags

from experiments import _command

VALUES = flags.FlagValues()
flags.DEFINE_list("suite", ["paper"], "Suites, comma-separated.", flag_values=VALUES)
flags.DEFINE_enum("scale", "toy", ("toy", "quick", "tiny"), "How much is run.", flag_values=VALUES)
flags.DEFINE_bool("quick", False, "Short for --scale=quick.", flag_values=VALUES)
flags.DEFINE_string("workdir", "runs/tunnel", "Folder of runs and report.", flag_values=VALUES)
flags.DEFINE_string("data", None, "Folder of text; default: Python's source.", flag_values=VALUES)
flags.DEFINE_integer(
  "jobs", None, "Runs at a time on a CPU; default: its cores, at most 4.", flag_values=VALUES
)


def _set_xla_flags(jobs: int) -> None:
  """As many CPU devices as jobs: the runner spreads the runs of a program over devices.

  One run is too small for two threads. Other accelerators do not look at these flags.
  """
  if jobs < 1:
    raise ValueError(f"--jobs: found {jobs}, expected at least 1")
  found = os.environ.get("XLA_FLAGS", "")
  if "host_platform_device_count" not in found:
    found += f" --xla_force_host_platform_device_count={jobs}"
  os.environ["XLA_FLAGS"] = f"{found} --xla_cpu_multi_thread_eigen=false"


def _run() -> None:
  _set_xla_flags(min(4, os.cpu_count() or 1) if VALUES.jobs is None else VALUES.jobs)
  from experiments import _tunnel, _tunnel_suites
  from minicpm_jax.core import host_memory
  from minicpm_jax.core import logging as logging_lib
  from minicpm_jax.tunnel import corpus, report

  host_memory.keep()
  workdir, scale = pathlib.Path(VALUES.workdir), "quick" if VALUES.quick else VALUES.scale
  names = _tunnel_suites.resolve(VALUES.suite)
  logging_lib.quiet_libraries()
  text = corpus.python_source() if VALUES.data is None else corpus.from_folder(VALUES.data)
  ctx = _tunnel.Context(_tunnel.SCALES[scale], text, workdir / scale)
  sections = []
  for name in names:
    wall, cpu = time.perf_counter(), time.process_time()
    section = _tunnel_suites.SUITES[name](ctx)
    spent = (time.perf_counter() - wall, time.process_time() - cpu)
    section.data |= {"suite": name, "seconds": _tunnel_suites.note_cost(ctx, name, *spent)}
    print(f"suite {name}: {spent[0]:.0f} s, {spent[1]:.0f} s CPU")
    for claim in section.claims:
      print(f"  {'shown    ' if claim.is_shown else 'NOT SHOWN'} {claim.text}: {claim.numbers}")
    sections.append(section)
    path = report.write(
      workdir / "report",
      "Model wind tunnel",
      _tunnel_suites.intro(ctx, scale, names),
      [*sections, _tunnel_suites.cost(ctx)],
    )
  print(f"report: {path}")


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  sys.exit(main())
