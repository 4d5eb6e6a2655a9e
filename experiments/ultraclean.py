"""Raw documents -> clean, scored, deduplicated Parquet -> shards for `experiments.pretrain`.

  python -m experiments.ultraclean --shared=../shared/data --output=runs/clean      # demonstration
  python -m experiments.ultraclean --input=crawl/ --good=en:books/ --good=zh:wiki.jsonl.gz \\
      --output=runs/clean --workers=8
  python -m experiments.ultraclean --input=crawl/ --classifier=en:models/ultraclean_en.bin ...

Reads JSONL, Parquet, WARC and text (data.md 2). Trains a fastText classifier for each language of
--good, with --bad or a part of the inputs as negatives; then language, heuristics, PII, benchmarks,
quality, duplicates. Writes clean/ (Parquet), shards/, report.json, scores.png, and prints the
pretraining command. Run again, it keeps the finished input files.
"""

import pathlib
import sys
import time

from absl import flags

from experiments import _command, _ultraclean, _ultraclean_report
from minicpm_jax.data import executor, tolerant

VALUES = flags.FlagValues()  # own set: other scripts have flags of the same names


def _flag(define, *args):
  return define(*args, flag_values=VALUES)


_flag(flags.DEFINE_multi_string, "input", [], "File or folder of raw documents; repeatable.")
_flag(flags.DEFINE_string, "output", None, "Folder to write.")
_flag(flags.DEFINE_string, "shared", None, "shared/data: the demonstration's inputs and seeds.")
_flag(flags.DEFINE_multi_string, "good", [], "LANG:PATH of good text; repeatable.")
_flag(flags.DEFINE_multi_string, "bad", [], "LANG:PATH of negatives; default: from the inputs.")
_flag(flags.DEFINE_multi_string, "classifier", [], "LANG:MODEL.bin, instead of training one.")
_flag(flags.DEFINE_multi_string, "benchmark", [], "Evaluation file to decontaminate against.")
_flag(flags.DEFINE_enum, "preset", "test", ["test", "small", "published"], "fastText settings.")
_flag(flags.DEFINE_float, "threshold", 0.5, "Least score that is kept.")
_flag(flags.DEFINE_integer, "negative_permille", 300, "Inputs in a thousand used as negatives.")
_flag(flags.DEFINE_bool, "heuristics", True, "Gopher, C4 and FineWeb filters.")
_flag(flags.DEFINE_bool, "mask_pii", True, "Mask e-mail and IP addresses, phone numbers, ids.")
_flag(flags.DEFINE_string, "text_field", "text", "JSON key or Parquet column of the text.")
_flag(flags.DEFINE_string, "tokenizer", None, "Folder of a tokenizer; default: train a BPE.")
_flag(flags.DEFINE_integer, "vocab", 8192, "Size of the trained BPE.", 261)
_flag(flags.DEFINE_integer, "heldout_permille", 50, "Clean documents in a thousand held out.")
_flag(flags.DEFINE_integer, "workers", 1, "Processes.", 0)


def _by_lang(name: str) -> dict[str, tuple[str, ...]]:
  found: dict[str, tuple[str, ...]] = {}
  for text in VALUES[name].value:
    lang, sep, path = text.partition(":")
    if not lang or not sep or not path:
      raise ValueError(f"--{name}: found {text!r}, expected LANG:PATH")
    found[lang] = (*found.get(lang, ()), path)
  return found


def _plan() -> _ultraclean.Plan:
  if VALUES.output is None:
    raise ValueError("--output: found none, expected a folder to write")
  given = dict(
    output=pathlib.Path(VALUES.output),
    preset=VALUES.preset,
    threshold=VALUES.threshold,
    negative_permille=VALUES.negative_permille,
    heuristics=VALUES.heuristics,
    mask_pii=VALUES.mask_pii,
    num_workers=VALUES.workers,
    reader=tolerant.Reader(text_field=VALUES.text_field),
    tokenizer=VALUES.tokenizer,
    vocab_size=VALUES.vocab,
    heldout_permille=VALUES.heldout_permille,
  )
  if VALUES.shared is not None:
    return _ultraclean.shared_plan(pathlib.Path(VALUES.shared), **given)
  return _ultraclean.Plan(
    inputs=tuple(VALUES.input),
    good=_by_lang("good"),
    bad=_by_lang("bad"),
    models={lang: paths[-1] for lang, paths in _by_lang("classifier").items()},
    benchmarks=tuple(VALUES.benchmark),
    **given,
  )


def _run() -> None:
  began = time.time()

  def tell(line: str):
    print(f"{time.time() - began:7.1f} s  {line}", flush=True)

  plan = _plan()
  _ultraclean.check(plan)
  models, seeds_found = _ultraclean.train_classifiers(plan, tell)
  scored, final = _ultraclean.clean(plan, models, tell)
  report = _ultraclean_report.make(plan, scored, final, seeds_found)
  _ultraclean_report.write(report, plan.output)
  for name, count in list(report["dropped"].items())[:8]:
    tell(f"dropped {count:>7,}  {name}")
  tell(f"{report['clean']:,} of {report['read']:,} documents are clean")
  made = _ultraclean.write_shards(plan, final, tell)
  tell(f"report.json, scores.png, clean/, shards/ in {plan.output}; then:")
  print(_ultraclean.next_command(plan, made))


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""

  def work():
    _command.parse(VALUES, sys.argv if argv is None else argv, __doc__)
    _run()

  return _command.guard(__file__, work, (*_command.BAD_INPUT, executor.ExecutorError))


if __name__ == "__main__":
  sys.exit(main())
