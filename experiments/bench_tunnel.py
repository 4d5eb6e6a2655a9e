"""Sweep throughput: a learning-rate sweep through one program against the same runs one by one.

  python -m experiments.bench_tunnel --output=benchmarks/results/bench_tunnel.json

The sweep: `--runs` learning rates of one model. one by one: every run builds its own model,
optimiser and jitted step as a script of its own would, and calls the step from Python, with the
same rows and evaluation. loop: `tunnel.run`, one compiled program, run after run. vmap: the same
program over stacked runs. Runs per hour of wall and of CPU time, compilation included; compile
caches are off. One thread, so that the sides compare.
"""

import os
import sys
import tempfile
import time

from absl import flags

from experiments import _command

SIDES = ["one_by_one", "loop", "vmap"]  # of _bench_tunnel, which imports jax
VALUES = flags.FlagValues()
flags.DEFINE_integer("width", 32, "Model width.", flag_values=VALUES)
flags.DEFINE_integer("runs", 6, "Learning rates.", lower_bound=1, flag_values=VALUES)
flags.DEFINE_integer("steps", 150, "Steps a run.", lower_bound=20, flag_values=VALUES)
flags.DEFINE_list("sides", SIDES, "What to time.", flag_values=VALUES)
flags.DEFINE_string("output", None, "JSON file to write.", flag_values=VALUES)


def _run() -> None:
  if not VALUES.sides or set(VALUES.sides) - set(SIDES):
    raise ValueError(f"--sides: found {VALUES.sides}, expected some of {SIDES}")
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
  os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
  from minicpm_jax.core import files, host_memory

  host_memory.keep()
  import jax

  from experiments import _bench_tunnel, _results

  jax.config.update("jax_enable_compilation_cache", False)
  specs, text = _bench_tunnel.sweep(VALUES.width, VALUES.runs, VALUES.steps)
  rows = []
  for side in VALUES.sides:
    jax.clear_caches()
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
      losses = _bench_tunnel.SIDES[side](specs, text, folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row = {"side": side, "wall_seconds": wall, "cpu_seconds": cpu, "losses": losses}
    row |= {"runs_per_hour": 3600 * len(specs) / wall, "runs_per_cpu_hour": 3600 * len(specs) / cpu}
    rows.append(row)
    print(f"{side}: {row['runs_per_hour']:.0f} runs/h, {row['runs_per_cpu_hour']:.0f} per CPU hour")
  for row in rows:
    row["speed_up"] = row["runs_per_hour"] / rows[0]["runs_per_hour"]
    row["cpu_speed_up"] = row["runs_per_cpu_hour"] / rows[0]["runs_per_cpu_hour"]
  if VALUES.output is not None:
    sizes = {name: VALUES[name].value for name in ("width", "steps", "runs")}
    files.write_json(VALUES.output, _results.environment() | sizes | {"sides": rows})


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  sys.exit(main())
