"""Does annealing on filtered text beat annealing on the raw text of equal tokens? (data.md 2.6)

  python -m experiments.prove_ultraclean --shared=../shared/data --workdir=runs/prove

Fixed before the first run: a quarter (by article) of five good sets is held out from everything;
the rest seeds the classifiers (textbook, encyclopedia), except SQuAD's articles and half of CMRC's,
which hide among web pages, news, comments and reviews as raw text. `experiments.ultraclean`'s
pipeline with its defaults filters that. Base models see raw text; from the end of their stable
stage one anneal goes on with it, one has the clean text alone, one (control) an equal amount of raw
documents drawn at random. The mean gain over the five sets decides, by paired bootstrap over items,
scores averaged over seeds. Writes prove.json and prove.png.
"""

import pathlib
import sys

from absl import flags

from experiments import _command, _prove_ultraclean, _results
from minicpm_jax.core import files
from minicpm_jax.core import logging as logging_lib

VALUES = flags.FlagValues()
flags.DEFINE_string("shared", None, "shared/data.", flag_values=VALUES)
flags.DEFINE_string("workdir", None, "Folder to write.", flag_values=VALUES)
flags.DEFINE_integer("seeds", 3, "Base runs.", flag_values=VALUES)
flags.DEFINE_integer("stable_steps", 300, "Steps of a base run.", flag_values=VALUES)
flags.DEFINE_integer("anneal_steps", 100, "Steps of an anneal.", flag_values=VALUES)


def _run() -> None:
  logging_lib.quiet_libraries()
  workdir = pathlib.Path(VALUES.workdir)
  found = _prove_ultraclean.run(
    pathlib.Path(VALUES.shared),
    workdir,
    print,
    num_seeds=VALUES.seeds,
    stable_steps=VALUES.stable_steps,
    anneal_steps=VALUES.anneal_steps,
  )
  found["environment"] = _results.environment()
  _prove_ultraclean.plot(found, workdir / "prove.png")
  files.write_json(workdir / "prove.json", found)
  for name, report in found["candidates"].items():
    low, high = report["interval"]
    print(
      f"{name} for raw text: {report['decision']}, {report['delta']:+.4f} bits per byte in "
      f"[{low:.4f}, {high:.4f}], better in {report['wins']} of {report['num_seeds']} seeds"
    )


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("shared", "workdir"))


if __name__ == "__main__":
  sys.exit(main())
