"""Runs and report of `compare_drafts`."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import _distill_draft, _regenerate, _results
from minicpm_jax import config
from minicpm_jax.align import draft_run
from minicpm_jax.core import files, pictures

HELD_OUT = "generated_heldout"
BEST_OF = ("acc_1", "acc_2", "acc_3")


def variants(texts: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
  """(name, kind, overrides) of NAME:KIND[:FIELD=VALUE+...]."""
  for text in texts:
    name, _, rest = text.partition(":")
    kind, _, changes = rest.partition(":")
    if not name or kind not in _distill_draft.PEAK_LR:
      kinds = "|".join(_distill_draft.PEAK_LR)
      raise ValueError(f"--variant: found {text!r}, expected NAME:({kinds})[:FIELD=VALUE+...]")
    yield name, kind, [change for change in changes.split("+") if change]


class Runs:
  """All runs of one comparison: one target in memory, one folder of generated text."""

  def __init__(self, values: flags.FlagValues):
    self.values = values
    self.workdir = _distill_draft.folder(values.workdir)
    self.target = draft_run.load_target(values.target)

  def run(
    self, name: str, kind: str, changes: Sequence[str], rate: float, seed: int
  ) -> dict[str, Any]:
    """One row of the report."""
    values, model_cfg = self.values, self.target[0].cfg
    cfg = _distill_draft.distill_config(model_cfg, values.target, kind, values.data, values.steps)
    cfg = _regenerate.regenerate(cfg, self.target, self.workdir, values)
    tokens = values.seq_len * values.rows
    # All of the generated text once, as whole rows; about 5% of the first epoch may be left over.
    length = _regenerate.PROMPT_TOKENS + values.regenerate_tokens
    stored = values.regenerate * length // tokens * values.rows
    cfg = dataclasses.replace(
      cfg,
      data=dataclasses.replace(cfg.data, seq_len=values.seq_len, batch_size=values.rows),
      optim=dataclasses.replace(cfg.optim, peak_lr=rate),
      seed=seed,
      stored_rows=stored,
      eval_batches=16,
    )
    cfg = config.overrides(cfg, list(changes))
    workdir = self.workdir / f"{name}-{rate:g}-{seed}"
    began = time.monotonic()
    if not (workdir / "draft").exists():
      draft_run.train(dataclasses.replace(cfg, name=workdir.name), workdir, target=self.target)
    curves = read_curve(workdir)
    row = {"variant": name, "kind": kind, "changes": list(changes), "rate": rate, "seed": seed}
    row |= {"curve": curves, "seconds": time.monotonic() - began}
    last = {k: v for k, v in curves[-1].items() if k.startswith("acc")}
    print(workdir.name, " ".join(f"{k} {v:.3f}" for k, v in last.items()), flush=True)
    return row


def read_curve(workdir: pathlib.Path) -> list[dict[str, float]]:
  """Acceptance on held-out text over the steps of a finished run."""
  curves = json.loads((workdir / "acceptance.json").read_text())["curves"]
  return _results.with_nan(curves[HELD_OUT])


def score(row: dict[str, Any]) -> float:
  """A run that diverged comes last."""
  return float(np.nan_to_num(np.mean([row["curve"][-1][name] for name in BEST_OF]), nan=-1.0))


def write(path: pathlib.Path, values: flags.FlagValues, rows: list[dict[str, Any]]) -> None:
  """JSON at `path` (in .json), and acc_1 and acc_3 over steps: each variant at its best rate."""
  names = ("target", "regenerate", "regenerate_tokens", "steps", "rows", "seq_len")
  result = {name: values[name].value for name in names}
  result |= {"rows": rows, "environment": _results.environment()}
  files.write_json(path, result)
  fig, axes = pictures.figure(2, width=5, height=4, sharey=True)
  for number, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
    own = [row for row in rows if row["variant"] == name]
    best = max(own, key=score)["rate"]
    shown = [row for row in own if row["rate"] == best]
    for row in shown:
      label = f"{name}, rate {best:g}" if row is shown[0] else None
      for ax, key in zip(axes, ("acc_1", "acc_3"), strict=True):
        points = [(point["step"], point[key]) for point in row["curve"]]
        ax.plot(*zip(*points, strict=True), color=f"C{number}", label=label)
        ax.set(xlabel="step", ylabel=key, ylim=(0, 1))
  axes[0].legend()
  fig.suptitle(f"Drafts at equal steps, held-out text that the target wrote: {values.target}")
  pictures.save(fig, path.with_suffix(".png"), dpi=120)
