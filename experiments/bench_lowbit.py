"""One row times a low-bit kernel on a CPU: formulations of the product against a float32 dot.

  python -m experiments.bench_lowbit                       (shape of gate|up of the 135M model)
  python -m experiments.bench_lowbit --num_in=1024 --num_out=8192 --layers=8     (of the 0.5B)

A row a formulation: time a product, weights and bytes a second, speed relative to float32, and the
error that rounding the weights makes. Whole models: `bench_decode --suite=lowbit`. Result:
OUTPUT/bench_lowbit_NUM_IN_NUM_OUT.json.
"""

import sys

from absl import flags

from experiments import _command

VALUES = flags.FlagValues()
_IN = flags.DEFINE_integer("num_in", 576, "Inputs.", lower_bound=64, flag_values=VALUES)
_OUT = flags.DEFINE_integer("num_out", 3072, "Outputs.", lower_bound=64, flag_values=VALUES)
_LAYERS = flags.DEFINE_integer(
  "layers", 24, "Kernels read one after the other.", lower_bound=1, flag_values=VALUES
)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed passes.", lower_bound=1, flag_values=VALUES)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder; default: benchmarks/results.", flag_values=VALUES
)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


def _run() -> None:
  from experiments import _bench_lowbit as bench
  from experiments import _results

  for name, value in (("--num_in", _IN.value), ("--num_out", _OUT.value)):
    if value % 64:
      raise ValueError(f"{name}: found {value}, expected a multiple of 64")
  rows = bench.measure(_IN.value, _OUT.value, _LAYERS.value, _REPEATS.value)
  folder = _results.folder(_OUTPUT.value)
  shape = dict(num_in=_IN.value, num_out=_OUT.value, layers=_LAYERS.value, repeats=_REPEATS.value)
  _results.write(folder / f"bench_lowbit_{_IN.value}_{_OUT.value}.json", rows, **shape)


if __name__ == "__main__":
  sys.exit(main())
