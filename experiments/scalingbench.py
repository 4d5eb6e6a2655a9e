"""Conditional loss of models on ScalingBench items, and accuracy as a sigmoid of it.

  python -m experiments.scalingbench --items=data/ --limit=20 --model=DIR --output=bench.json
  python -m experiments.scalingbench --items=mine.jsonl --model=A ... --model=E --held_out=1

Items: JSON lines {input, target[, task, label, choices, gold]}, or a folder of benchmark files
(`minicpm_jax.data.scalingbench.PANELS`). Models: HF folder, run folder or .gguf, small to large.
From five models on (four fitted, --held_out predicted) the sigmoid is fitted to the accuracy over
the items with choices and drawn. Without reasoning by a strong model the targets are human
solutions, or the answer's text alone.
"""

import pathlib
import sys

from absl import flags

from experiments import _command

VALUES = flags.FlagValues()
flags.DEFINE_string("items", None, "JSON lines, or a folder of benchmarks.", flag_values=VALUES)
flags.DEFINE_integer("limit", None, "Items a task, of a folder.", lower_bound=1, flag_values=VALUES)
flags.DEFINE_multi_string("model", [], "Repeatable, small to large.", flag_values=VALUES)
flags.DEFINE_integer("held_out", 1, "Largest models to predict.", lower_bound=0, flag_values=VALUES)
flags.DEFINE_float(
  "chance",
  None,
  "Accuracy of guessing, if known.",
  lower_bound=0.0,
  upper_bound=1.0,
  flag_values=VALUES,
)
flags.DEFINE_integer("seq_len", 512, "Tokens a row.", flag_values=VALUES)
flags.DEFINE_string("output", None, "JSON to write, with a PNG beside it.", flag_values=VALUES)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("items", "model"))


def _run() -> None:
  from experiments import _models
  from minicpm_jax.core import files
  from minicpm_jax.core import logging as logging_lib
  from minicpm_jax.data import scalingbench
  from minicpm_jax.tunnel import bench, likelihood

  logging_lib.quiet_libraries()
  if pathlib.Path(VALUES.items).is_dir():
    items = scalingbench.build(VALUES.items, limit=VALUES.limit)
  else:
    items = scalingbench.read(VALUES.items)
  rows = []
  for path in VALUES.model:
    model, params, tok = _models.load(path)
    seq_len = min(VALUES.seq_len, model.cfg.max_position)
    found = bench.score(likelihood.Scorer(model, tok, seq_len=seq_len), params, items)
    row = {"model": path, "by_task": found.by_task(), "items": len(items)}
    for averaging in ("task", "item", "token"):
      row[averaging] = found.mean(averaging)
      row[f"{averaging}_bits_per_byte"] = found.mean(averaging, "bits_per_byte")
    if any(item.choices for item in items):
      row["accuracy"] = found.accuracy()
    rows.append(row)
    print(files.as_json(row))
  result = {"models": rows, "sigmoid": _sigmoid(rows, sum(bool(i.choices) for i in items))}
  if VALUES.output is not None:
    files.write_json(VALUES.output, result)


def _sigmoid(rows: list[dict], num_items: int) -> dict | None:
  """The fit and its held-out errors; None for fewer models than it needs."""
  from minicpm_jax.core import pictures
  from minicpm_jax.tunnel import bench

  if len(rows) < 4 + VALUES.held_out or "accuracy" not in rows[0]:
    return None
  losses, accuracies = ([row[name] for row in rows] for name in ("task", "accuracy"))
  is_held = [i >= len(rows) - VALUES.held_out for i in range(len(rows))]
  found = bench.extrapolate(losses, accuracies, is_held, chance=VALUES.chance, num_items=num_items)
  print(f"held out: sigmoid off by {found.sigmoid_error:.4f}, a line by {found.line_error:.4f}")
  if VALUES.output is not None:
    figure, (axis,) = pictures.figure()
    axis.plot(losses, accuracies, "o")
    line = [min(losses) + (max(losses) - min(losses)) * i / 99 for i in range(100)]
    axis.plot(line, found.fitted(line))
    axis.set(xlabel="conditional loss, nats per token", ylabel="accuracy")
    pictures.save(figure, pathlib.Path(VALUES.output).with_suffix(".png"))
  s = found.fitted
  errors = {"sigmoid_error": found.sigmoid_error, "line_error": found.line_error}
  return {"lo": s.lo, "hi": s.hi, "k": s.k, "l0": s.l0} | errors


if __name__ == "__main__":
  sys.exit(main())
