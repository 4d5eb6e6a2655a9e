"""From text to a trained, exported, talking MiniCPM: `python -m experiments.quickstart`.

A nano MiniCPM4 (MTP on) is pretrained on text that every Python carries (language reference,
docstrings and source of the standard library): tokenizer, shards, a stable stage, one resume, a
decay stage with a better mixture (MiniCPM sections 4 and 5), bits per byte against an n-gram model
and gzip, export to Hugging Face form, greedy and sampled text. Minutes on two CPU cores, no
network. Starting it again continues or repeats only what is missing.

  python -m experiments.quickstart --data=PATH [--decay_data=PATH]   # your own text
  python -m experiments.quickstart --steps=5000 --set model.model_dim=256 --set model.mlp_dim=768
"""

import sys
import time

from absl import flags

from configs import nano
from experiments import _command
from experiments import _quickstart as steps
from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.core import host_memory
from minicpm_jax.core import logging as logging_lib

VALUES = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  "workdir", "workdir/quickstart", "Everything is written below it.", flag_values=VALUES
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "File or folder of JSONL, Parquet or text to train on instead of Python's text.",
  flag_values=VALUES,
)
_DECAY_DATA = flags.DEFINE_string(
  "decay_data", None, "With --data: better text that the decay stage mixes in.", flag_values=VALUES
)
_STEPS = flags.DEFINE_integer(
  "steps",
  steps.DEFAULT_STEPS,
  "Optimiser steps, decay included.",
  lower_bound=20,
  flag_values=VALUES,
)
_VOCAB = flags.DEFINE_integer(
  "vocab_size", 2048, "Size of the tokenizer that is trained.", lower_bound=261, flag_values=VALUES
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Override of the configuration, FIELD=VALUE.", flag_values=VALUES
)


def _run() -> None:
  logging_lib.quiet_libraries()
  began = time.monotonic()
  config.overrides(nano.get_config(f"steps={_STEPS.value}"), _SET.value)  # before any work
  run = steps.Run(_WORKDIR.value)

  run.say("1/8 corpus")
  corpus = steps.read_corpus(run, _DATA.value, _DECAY_DATA.value)
  run.say("2/8 tokenizer")
  tok = steps.make_tokenizer(run, corpus, _VOCAB.value)
  run.say("3/8 shards")
  indices = steps.write_shards(run, corpus, tok)
  cfg = steps.make_config(run, corpus, tok, _STEPS.value, _SET.value)

  run.say(f"4/8 training, part one: to step {steps.pause_step(cfg)} of {cfg.num_steps}")
  steps.train_first_part(run, cfg)
  run.say("5/8 training, part two: resumed from the checkpoint, through the decay stage")
  values = steps.train_to_the_end(run, cfg)
  steps.plot_losses(run, cfg)

  run.say("6/8 held-out bits per byte")
  steps.report_bits_per_byte(run, corpus, indices, values)

  run.say("7/8 export to Hugging Face form, reload, compare")
  model, params, tok = orbax_io.load_run(run.workdir / "train")
  steps.export_and_compare(run, model, params, tok)

  run.say("8/8 text")
  steps.write_samples(run, model, params, tok, corpus)
  run.finish(time.monotonic() - began)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
