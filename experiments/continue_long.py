"""Long context: 4K -> 32K with LongRoPE (MiniCPM4 §5.1), 4K -> 32K -> 128K (MiniCPM §7.2).

  python -m experiments.continue_long --config=minicpm4_0p5b_long --workdir=runs/long \\
      --set init_from=MiniCPM4-0.5B --data=books:data/books:0.5 --data=web:data/web:0.5
  python -m experiments.continue_long --config=minicpm_2b_32k --workdir=runs/2b_32k \\
      --set init_from=runs/minicpm_2b@252000            # the last stable checkpoint
  python -m experiments.continue_long --config=minicpm_2b_128k --workdir=runs/2b_128k \\
      --set init_from=runs/2b_32k@4500 --lengths=65536,131072
  python -m experiments.continue_long --config=minicpm4_8b_sparse --workdir=runs/8b_sparse \\
      --set init_from=runs/minicpm4_8b                  # dense at 4K, then sparse at 32K

The weights come from a run folder, a Hugging Face folder or a GGUF file; rope and head are those of
the config: a tied source under an untied config gets a head equal to its embedding, so the logits
of step 0 are unchanged. --lengths is a curriculum (the paper names one without its steps, so the
equal shares are ours): every length gets the same number of steps and of tokens a step, in
WORKDIR/length_N, and goes on from the one before with its optimiser state, its place in the
schedule and its place in every source.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import _command, _flags
from minicpm_jax import config
from minicpm_jax.core import host_memory
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.train import loop

VALUES = flags.FlagValues()
_flags.define(VALUES)
flags.DEFINE_list(
  "lengths", [], "Row lengths in order; default: data.seq_len alone.", flag_values=VALUES
)


def stages(
  cfg: config.TrainConfig, workdir: pathlib.Path, lengths: Sequence[int]
) -> list[tuple[config.TrainConfig, pathlib.Path]]:
  """(config, workdir) of every length; one schedule runs through all of them."""
  if cfg.init_from is None:
    raise ValueError("init_from: found None, expected the model to continue (--set init_from=...)")
  lengths = list(lengths) or [cfg.data.seq_len]
  if lengths != sorted(set(lengths)):
    raise ValueError(f"--lengths: found {lengths}, expected growing lengths")
  limit = cfg.model.max_position
  if lengths[-1] > limit:
    raise ValueError(f"--lengths: found {lengths[-1]}, expected at most max_position {limit}")
  if len(lengths) == 1:
    return [(_with_length(cfg, lengths[0]), workdir)]
  planned: list[tuple[config.TrainConfig, pathlib.Path]] = []
  for i, length in enumerate(lengths):
    stage = dataclasses.replace(
      _with_length(cfg, length), num_steps=cfg.num_steps * (i + 1) // len(lengths)
    )
    if planned:
      before, folder = planned[-1]
      source = f"{folder}@{before.num_steps}"
      stage = dataclasses.replace(stage, init_from=None, branch_from=source)
    planned.append((stage, workdir / f"length_{length}"))
  return planned


def _with_length(cfg: config.TrainConfig, length: int) -> config.TrainConfig:
  """`cfg` with rows of `length`, as many as keep the tokens of a step."""
  tokens = cfg.data.batch_size * cfg.data.seq_len
  rows = tokens // length
  if rows * length != tokens:
    raise ValueError(f"--lengths: found {length}, expected a divisor of {tokens} tokens a step")
  return dataclasses.replace(
    cfg, data=dataclasses.replace(cfg.data, seq_len=length, batch_size=rows)
  )


def _run() -> None:
  _flags.start_distributed(VALUES)
  logging_lib.quiet_libraries()
  planned = stages(
    _flags.get_config(VALUES),
    _flags.get_workdir(VALUES),
    _command.integers(VALUES, "lengths") if VALUES.lengths else [],
  )
  for cfg, workdir in planned:
    rope, sparse = cfg.model.rope, cfg.model.sparse
    kind = "dense" if sparse is None else f"sparse from {max(sparse.dense_len, 0)} tokens on"
    print(
      f"rows of {cfg.data.seq_len} tokens, rope {rope.kind!r} with theta {rope.theta:g}, "
      f"attention {kind}"
    )
    if loop.train(cfg, workdir).is_stopped:
      return


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
