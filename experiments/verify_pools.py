"""Does efficient verification tell good data from bad? Known pools, several seeds (data.md 2.6).

  python -m experiments.verify_pools --shared=../shared/data --workdir=runs/pools

Chinese text of `shared/data`: the default mixture is news, questions and comments; the good pool
encyclopedia, the bad pool shop reviews; held-out encyclopedia and a textbook are evaluated. The
same documents with shuffled labels make two more pools. Every pool replaces half of the rows of an
anneal of a model of 0.2M parameters. Expected: good beats bad in at least 2 of 3 seeds, and the
shuffled pools differ by less than half as much. Writes pools.json and pools.png; minutes on a CPU.
"""

import pathlib
import sys

from absl import flags

from experiments import _command, _verify_pools
from minicpm_jax.core import files
from minicpm_jax.core import logging as logging_lib

VALUES = flags.FlagValues()
flags.DEFINE_string("shared", None, "shared/data.", flag_values=VALUES)
flags.DEFINE_string("workdir", None, "Folder to write.", flag_values=VALUES)
flags.DEFINE_integer("seeds", 3, "Base runs.", flag_values=VALUES)
flags.DEFINE_integer("stable_steps", 80, "Steps of a base run.", flag_values=VALUES)
flags.DEFINE_integer("anneal_steps", 40, "Steps of an anneal.", flag_values=VALUES)


def _run() -> None:
  logging_lib.quiet_libraries()
  workdir = pathlib.Path(VALUES.workdir)
  found = _verify_pools.run(
    pathlib.Path(VALUES.shared),
    workdir,
    num_seeds=VALUES.seeds,
    stable_steps=VALUES.stable_steps,
    anneal_steps=VALUES.anneal_steps,
  )
  _verify_pools.plot(found, workdir / "pools.png")
  files.write_json(workdir / "pools.json", found)
  print(f"good beats bad in {found['good_beats_bad']} of {found['num_seeds']} seeds")


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("shared", "workdir"))


if __name__ == "__main__":
  sys.exit(main())
