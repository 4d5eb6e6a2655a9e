"""Is this data worth training on? Two short anneals from one checkpoint decide (data.md 2.6).

  python -m experiments.verify_data --checkpoint=runs/a@800 --candidate=clean:data/clean \\
      --text=good:heldout.jsonl.gz --workdir=runs/verify --stage2_steps=200
  ... --choices=eval/arc_easy.jsonl.gz --decide_by=accuracy_per_byte     # from about 1B parameters

--checkpoint is the last stable step of a WSD run, several of them are seeds. The baseline goes on
with the run's own mixture; the candidate has --share of the rows replaced. --text is held-out good
text, --choices a multiple-choice set; both may be repeated. Writes verification-NAME.json and .png.
"""

import pathlib
import sys

from absl import flags

from experiments import _command, _ultraclean_report
from minicpm_jax import config
from minicpm_jax.ckpt import run_config
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.data import documents
from minicpm_jax.text import tokenizer as tokenizer_lib
from minicpm_jax.tunnel import likelihood, verification

VALUES = flags.FlagValues()  # own set: other scripts have flags of the same names


def _flag(define, *args):
  return define(*args, flag_values=VALUES)


_flag(flags.DEFINE_multi_string, "checkpoint", [], "RUN@STEP of a stable stage; repeatable.")
_flag(flags.DEFINE_string, "candidate", None, "NAME:PATH of a shard folder under test.")
_flag(flags.DEFINE_float, "share", 0.3, "Share of the rows that the candidate replaces.")
_flag(flags.DEFINE_integer, "stage1_steps", 0, "Steps of the shared decay before.")
_flag(flags.DEFINE_integer, "stage2_steps", 100, "Steps of the two anneals.")
_flag(flags.DEFINE_multi_string, "text", [], "NAME:PATH of held-out good text; repeatable.")
_flag(flags.DEFINE_multi_string, "choices", [], "Multiple-choice file; repeatable.")
_flag(flags.DEFINE_integer, "limit", 200, "Documents or questions of every set.", 1)
_flag(
  flags.DEFINE_enum,
  "decide_by",
  "bits_per_byte",
  ["bits_per_byte", "accuracy", "accuracy_per_byte"],
  "What decides; bits per byte for small models.",
)
_flag(flags.DEFINE_string, "tokenizer", None, "Folder; default: that of the checkpoint.")
_flag(flags.DEFINE_string, "workdir", None, "Folder to write.")


def _pair(name: str, text: str | None) -> tuple[str, str]:
  first, sep, path = (text or "").partition(":")
  if not first or not sep or not path:
    raise ValueError(f"--{name}: found {text!r}, expected NAME:PATH")
  return first, path


def _eval_sets() -> list[likelihood.EvalSet]:
  sets = [likelihood.choice_set(path, limit=VALUES.limit) for path in VALUES.choices]
  for text in VALUES.text:
    name, path = _pair("text", text)
    docs = list(documents.read([path]))
    sets.append(likelihood.text_set(name, docs[:: max(len(docs) // VALUES.limit, 1)]))
  if not sets:
    raise ValueError("--text, --choices: found neither, expected something to evaluate on")
  return sets


def _run() -> None:
  logging_lib.quiet_libraries()
  name, path = _pair("candidate", VALUES.candidate)
  folder = VALUES.tokenizer or run_config.split_step(VALUES.checkpoint[0])[0] / "tokenizer"
  tok = tokenizer_lib.load_tokenizer(folder)
  if tok is None:
    raise ValueError(f"--tokenizer: found none in {folder}")
  cfg = verification.VerificationConfig(
    checkpoints=tuple(VALUES.checkpoint),
    candidate=config.SourceConfig(name=name, path=path),
    share=VALUES.share,
    stage1_steps=VALUES.stage1_steps,
    stage2_steps=VALUES.stage2_steps,
    decide_by=VALUES.decide_by,
  )
  workdir = pathlib.Path(VALUES.workdir)
  report = verification.verify(cfg, workdir, tok, _eval_sets(), on_run=print)
  _ultraclean_report.plot_verification(report, workdir / f"verification-{name}.png")
  low, high = report["interval"]
  print(f"{report['decision']}: {report['delta']:+.4f} {report['decided_by']}", end=" ")
  print(f"in [{low:.4f}, {high:.4f}], better in {report['wins']} of {report['num_seeds']} seeds")


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("checkpoint", "workdir"))


if __name__ == "__main__":
  sys.exit(main())
