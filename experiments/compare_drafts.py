"""Kinds of drafts at equal steps on one target: learning rates, seeds, acceptance curves.

  python -m experiments.compare_drafts --target=workdir/quickstart/train --workdir=runs/compare \\
    --data=text:workdir/quickstart/shards/source --regenerate=1024 --steps=1000 \\
    --rates=1e-3,2e-3,4e-3 --seeds=2 --output=benchmarks/results/drafts_nano_compare

Every run is one of distill_draft's, on the same text that the target wrote itself, with the
target's features stored; a stopped comparison goes on. Rates are compared with seed 0 by the mean
of acc_1 .. acc_3 on held-out generated text, the other seeds run at each kind's best rate.
--variant=NAME:KIND[:FIELD=VALUE+...] adds a kind with other settings of its config.
"""

import pathlib
import sys

from absl import flags

from experiments import _command
from experiments import _compare_drafts as lib
from minicpm_jax.core import host_memory
from minicpm_jax.core import logging as logging_lib

VALUES = flags.FlagValues()
_define = {"flag_values": VALUES}
flags.DEFINE_string("target", None, "HF folder, run folder[@step] or GGUF file.", **_define)
flags.DEFINE_string("workdir", None, "Folder of the runs.", **_define)
flags.DEFINE_multi_string("data", [], "NAME:PATH[:eval], begun documents.", **_define)
flags.DEFINE_multi_string("variant", ["eagle:eagle", "eagle3:eagle3"], "What runs.", **_define)
flags.DEFINE_integer("regenerate", 1024, "Documents that the target writes.", **_define)
flags.DEFINE_integer("regenerate_tokens", 192, "New tokens of each of them.", **_define)
flags.DEFINE_float("regenerate_temperature", 0.0, "At which they are drawn.", **_define)
flags.DEFINE_multi_string("prompts", [], "JSONL prompts, answered instead.", **_define)
flags.DEFINE_integer("steps", 1000, "Steps of every run.", lower_bound=1, **_define)
flags.DEFINE_list("rates", ["1e-3", "2e-3"], "Learning rates.", **_define)
flags.DEFINE_integer("seeds", 2, "At the best rate.", lower_bound=1, **_define)
flags.DEFINE_integer("rows", 8, "Rows of a batch.", lower_bound=1, **_define)
flags.DEFINE_integer("seq_len", 128, "Tokens of a row.", **_define)
flags.DEFINE_string("output", "benchmarks/results/drafts_compare", "Without suffix.", **_define)


def run() -> None:
  runs = lib.Runs(VALUES)
  rows = []
  for name, kind, changes in lib.variants(VALUES.variant):
    found = [runs.run(name, kind, changes, float(rate), 0) for rate in VALUES.rates]
    best = max(found, key=lib.score)
    rows += found
    rows += [runs.run(name, kind, changes, best["rate"], seed) for seed in range(1, VALUES.seeds)]
    lib.write(pathlib.Path(f"{VALUES.output}.json"), VALUES, rows)


def main(argv: list[str] | None = None) -> int:
  logging_lib.quiet_libraries()
  return _command.run(run, VALUES, argv, needed=("target", "workdir", "data"))


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
