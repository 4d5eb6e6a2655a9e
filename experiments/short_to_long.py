"""Dense pretraining at short length, then sparse training at long length, at toy scale.

  python -m experiments.short_to_long                      2 seeds, 11 to 12 CPU minutes each

The recipe of InfLLM v2 (arXiv 2509.24663 section 4.1; configs/minicpm4_8b_sparse.py at real size)
on a recall task: a model of 0.17M parameters (2 layers, 4 key heads: 8 selections) reads rows of 64
tokens with full attention, then rows of 256 with blocks of 8, of which a query sees 8 (64 tokens, a
quarter of 256): one initial, three local, four chosen of the 28 others (rule "joint", exact
normaliser). --bins=4 mixes lengths in equal shares of tokens, as the paper does. Controls: the same
steps on the same rows with full attention, and both dense models with the selection switched on
untrained. Needles stand anywhere but in the initial and local blocks.

Asked: does the loss jump at the switch, does needle accuracy at 256 come within 2 points of full
attention, and does the untrained selection not? And why: the share of needles whose block is
selected, and its median rank, for every layer and key head (`_selection_probe`). Writes
OUT/short_to_long.json and .png after every seed; seeds recorded there with an equal plan are kept,
so processes may share a folder (--first=0 --seeds=1 beside --first=1 --seeds=1).
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from experiments import _command, _results
from experiments import _short_to_long as toy
from experiments import _short_to_long_report as report
from minicpm_jax.core import files, host_memory

VALUES = flags.FlagValues()
flags.DEFINE_integer("seeds", 2, "Runs.", flag_values=VALUES)
flags.DEFINE_integer("first", 0, "Seed of the first run.", flag_values=VALUES)
flags.DEFINE_string("out", "benchmarks/results", "Folder to write.", flag_values=VALUES)
for _field in dataclasses.fields(toy.Plan):
  _define = flags.DEFINE_float if isinstance(_field.default, float) else flags.DEFINE_integer
  _define(_field.name, _field.default, "A size, see toy.Plan.", flag_values=VALUES)


def _setting(plan: toy.Plan) -> dict:
  """What runs of one file have in common, as JSON holds it."""
  model = dataclasses.asdict(toy.model_config(plan, toy.SPARSE))
  return json.loads(json.dumps({"plan": dataclasses.asdict(plan), "model": model}))


def _recorded(path: pathlib.Path, plan: toy.Plan) -> list[dict]:
  """Runs in the file, if they are of this plan and model."""
  old = json.loads(path.read_text()) if path.is_file() else {}
  return _results.with_nan(old["seeds"]) if old | _setting(plan) == old else []


def _run() -> None:
  for name, least in (("seeds", 1), ("first", 0)):
    if VALUES[name].value < least:
      raise ValueError(f"--{name}: found {VALUES[name].value}, expected {least} or more")
  plan = toy.Plan(**{f.name: getattr(VALUES, f.name) for f in dataclasses.fields(toy.Plan)})
  path = pathlib.Path(VALUES.out) / "short_to_long.json"
  seeds = _recorded(path, plan)
  for seed in range(VALUES.first, VALUES.first + VALUES.seeds):
    if any(run["seed"] == seed for run in seeds):
      continue
    run = toy.run_seed(plan, seed, say=lambda text: print(text, flush=True))
    by_seed = {run["seed"]: run for run in [*_recorded(path, plan), run]}
    seeds = [by_seed[seed] for seed in sorted(by_seed)]
    result = _setting(plan) | {
      "environment": _results.environment(),
      "summary": report.summary(plan, seeds),
      "seeds": seeds,
    }
    files.write_json(path, result, indent=None)
    report.draw(seeds, path.with_suffix(".png"))
  print(files.as_json(report.summary(plan, seeds), indent=1))


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
