"""WSD pretraining of any config, on one device or many machines; starting it again resumes.

  python -m experiments.pretrain --config=minicpm4_0p5b --workdir=runs/a --data=web:data/web
  python -m experiments.pretrain --workdir=runs/a                  # resumes from its config.py
  python -m experiments.pretrain --config=nano --workdir=runs/b --set branch_from=runs/a@800
  srun python -m experiments.pretrain --distributed --config=... --workdir=SHARED_FOLDER

Flags are those of experiments/_flags.py, and --tokenizer=FOLDER, which is copied into the workdir
so that generate and export_hf find it. On several machines every process runs the same command
(with --distributed, or --coordinator, --num_processes, --process_id) and sees the same workdir.
SIGTERM saves a checkpoint and leaves with status 0, Ctrl-C with 130 (twice: without saving).
"""

import sys

from absl import flags

from experiments import _command, _flags
from minicpm_jax.ckpt import run_config
from minicpm_jax.core import host_memory
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.text import tokenizer as tokenizer_lib
from minicpm_jax.train import loop

VALUES = flags.FlagValues()
_flags.define(VALUES)
flags.DEFINE_string(
  "tokenizer", None, "Folder of the tokenizer that the data was made with.", flag_values=VALUES
)


def _run() -> None:
  _flags.start_distributed(VALUES)
  logging_lib.quiet_libraries()
  workdir, tok = _flags.get_workdir(VALUES), None
  if VALUES.config is None and (workdir / run_config.FILE_NAME).exists():
    VALUES.config = str(workdir / run_config.FILE_NAME)
  if VALUES.config is None:
    raise ValueError(
      f"--config: found none, and no {run_config.FILE_NAME} in {workdir} to resume from; expected "
      f"one of {', '.join(_flags.names())} or a path.py"
    )
  cfg = _flags.get_config(VALUES)
  if VALUES.tokenizer is not None:
    tok = tokenizer_lib.load_tokenizer(VALUES.tokenizer)
    if tok is None:
      raise ValueError(f"--tokenizer: found none in {VALUES.tokenizer}")
  loop.train(cfg, workdir, tok=tok)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
