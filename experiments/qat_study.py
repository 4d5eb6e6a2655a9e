"""How to train to low bits, at toy scale: when to switch, how to warm up, which groups and codes.

  python -m experiments.qat_study --suite=share,rewarmup --output=benchmarks/results/qat_study.json

Suites: share (what part of the steps is quantised; MiniCPM4 section 3.3 says 40%), rewarmup (with
and without, moments reset and kept), group (scales a group against a channel), scheme (the five
code books of BitCPM-CANN 3.1), fp8 (block-wise FP8 against float32), distill (a teacher twice as
wide for all of the quantised stage, or for its second half), decoupled (that teacher in a stage of
its own after QAT has run to its end, BitCPM-CANN 3.3, against teaching throughout as long, at equal
steps and at equal cost). A model of 0.2M parameters (--dim=64) on the bytes of Python's own
documentation and source; arms that are in the output already are kept.
"""

import pathlib
import sys

from absl import flags

from experiments import _command
from minicpm_jax.core import files, host_memory

_SUITES = ("share", "rewarmup", "group", "scheme", "fp8", "distill", "decoupled")
VALUES = flags.FlagValues()
_SUITE = flags.DEFINE_list("suite", list(_SUITES), f"Of {', '.join(_SUITES)}.", flag_values=VALUES)
_OUTPUT = flags.DEFINE_string(
  "output", "benchmarks/results/qat_study.json", "JSON; PNG beside it.", flag_values=VALUES
)
_SEEDS = flags.DEFINE_integer(
  "seeds", 3, "Seeds 0, 1, ...: initial weights and data order.", lower_bound=1, flag_values=VALUES
)
_STEPS = flags.DEFINE_integer(
  "steps", 400, "Steps of a whole run.", lower_bound=1, flag_values=VALUES
)
_DIM = flags.DEFINE_integer("dim", 64, "Width of the model: 32, 64, ...", flag_values=VALUES)
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1, flag_values=VALUES)
_ROWS = flags.DEFINE_integer("rows", 16, "Rows of 128 bytes.", lower_bound=1, flag_values=VALUES)


def _run() -> None:
  host_memory.keep()
  from experiments import _qat_study as study_lib
  from experiments import _qat_study_report as report_lib

  path = pathlib.Path(_OUTPUT.value)
  shape = dict(dim=_DIM.value, layers=_LAYERS.value)
  size = study_lib.Size(steps=_STEPS.value, rows=_ROWS.value, **shape)
  report = report_lib.load(path, size)
  arms = {a.name: a for suite in _SUITE.value for a in study_lib.arms_of(suite)}
  study = study_lib.Study(size)
  for seed in range(_SEEDS.value):

    def is_done(arm, seed=seed):
      return str(seed) in report["arms"].get(arm.name, {})

    for arm, result in study.run_seed(list(arms.values()), seed, is_done):
      report["arms"].setdefault(arm.name, {})[str(seed)] = result
      files.write_json(path, report)
      print(f"seed {seed}: {arm.name}: held-out {result['heldout']:.4f}", flush=True)
  for suite in _SUITE.value:
    report.setdefault("tables", {})[suite] = rows = report_lib.table(report, suite)
    print(f"\n{suite}")
    for row in rows:
      spread = " ".join(f"{x:.4f}" for x in row["losses"])
      print(f"  {row['arm']:32} {row['mean']:.4f}  ({spread})  {row['minus first']:+.4f}")
  files.write_json(path, report)
  report_lib.plot(report, path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  sys.exit(main())
