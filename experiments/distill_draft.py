"""Trains a draft (EAGLE, MiniCPM4's EAGLE, EAGLE-3, BiTA) for a target; a second start resumes.

  python -m experiments.distill_draft --target=runs/a --workdir=runs/a_eagle --kind=minicpm \\
    --data=text:data/text --data=held:data/held:eval --steps=2000 --set optim.peak_lr=1e-3
  python -m experiments.distill_draft --workdir=runs/a_eagle          # resumes from its config.py

--target is a Hugging Face folder, a run folder[@step] or a GGUF file, --data as for pretrain.
--kind=eagle3 with --draft_vocab=25% has a head for the most frequent tokens. --from_mtp starts from
the target's own MTP module. --regenerate=DOCS first lets the target continue the beginnings of DOCS
training documents, and trains on that (advised where the target's own text differs from the data);
with --prompts=FILE.jsonl[.gz] it answers those prompts in its chat template instead, sources of
--data then add to the mixture by their weights (the answers have 1) and may be left out.
--int4=GROUP or --ternary=GROUP trains with fake quantisation (start it with
--init_from=FOLDER/draft). The draft is written to WORKDIR/draft, what runs of a quantised one to
draft_int4 (GPTQ tensors) or draft_ternary (floats), acceptance curves to acceptance.json and .png.
Losses, batch, clip and betas default to EAGLE's recipes; their learning rate is for long runs (800k
steps).
"""

import dataclasses
import sys

from absl import flags

from experiments import _command, _regenerate
from experiments import _distill_draft as lib
from minicpm_jax import config
from minicpm_jax.ckpt import run_config
from minicpm_jax.core import host_memory
from minicpm_jax.core import logging as logging_lib

VALUES = flags.FlagValues()
_OWN = {"flag_values": VALUES}
flags.DEFINE_string("target", None, "HF folder, run folder[@step] or GGUF file.", **_OWN)
flags.DEFINE_string("workdir", None, "Folder of this run.", **_OWN)
flags.DEFINE_enum("kind", "minicpm", ["eagle", "minicpm", "eagle3", "bita"], "Of draft.", **_OWN)
flags.DEFINE_multi_string("data", [], "NAME:PATH[:WEIGHT|:eval]; repeatable.", **_OWN)
flags.DEFINE_integer("steps", 2000, "Optimiser steps.", lower_bound=1, **_OWN)
flags.DEFINE_string("draft_vocab", None, "eagle3: head rows, or a share (25%).", **_OWN)
flags.DEFINE_bool("from_mtp", False, "Start from the target's MTP module.", **_OWN)
flags.DEFINE_string("init_from", None, "Start from this draft folder.", **_OWN)
flags.DEFINE_integer("window", 0, "Tokens that a draft row sees; 0 is all.", **_OWN)
flags.DEFINE_integer("int4", 0, "Fake-quantise with this group size; 0 is off.", **_OWN)
flags.DEFINE_integer("ternary", 0, "The same with ternary weights; -1: a channel.", **_OWN)
flags.DEFINE_integer("regenerate", 0, "Documents that the target writes itself.", **_OWN)
flags.DEFINE_multi_string("prompts", [], "JSONL for --regenerate; repeatable.", **_OWN)
flags.DEFINE_integer("regenerate_tokens", 192, "New tokens of each of them.", **_OWN)
flags.DEFINE_float("regenerate_temperature", 0.0, "At which they are drawn.", **_OWN)
flags.DEFINE_multi_string("set", [], "FIELD=VALUE override of the config.", **_OWN)


def _run() -> None:
  logging_lib.quiet_libraries()
  from minicpm_jax.align import draft_run

  workdir = lib.folder(VALUES.workdir)
  if VALUES.target is None:
    if not (workdir / run_config.FILE_NAME).exists():
      raise ValueError(f"--target: found none and no {workdir / run_config.FILE_NAME}")
    cfg = run_config.read(workdir, config.DistillConfig)
    cfg = config.overrides(cfg, VALUES["set"].value)
    draft_run.train(cfg, workdir)
    return
  if VALUES.prompts and not VALUES.regenerate:
    raise ValueError("--prompts: found without --regenerate, expected how many to answer")
  target = draft_run.load_target(VALUES.target)
  cfg = lib.make_config(VALUES, target[0].cfg)
  if VALUES.regenerate:
    cfg = _regenerate.regenerate(cfg, target, workdir, VALUES)
  cfg = config.overrides(cfg, VALUES["set"].value)
  draft_run.train(dataclasses.replace(cfg, name=workdir.name), workdir, target=target)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("workdir",))


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
