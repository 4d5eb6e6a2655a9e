"""Report, tables and picture of `experiments.qat_study`."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from experiments import _qat_study as study_lib
from experiments import _results
from minicpm_jax.core import pictures
from minicpm_jax.models import zoo


def load(path: pathlib.Path, size: study_lib.Size) -> dict[str, Any]:
  """The report so far, or an empty one; a report of another size is refused."""
  if path.exists():
    report = json.loads(path.read_text())
    if report["size"] != dataclasses.asdict(size):
      raise ValueError(f"{path}: found size {report['size']}, expected {dataclasses.asdict(size)}")
    for run in (run for runs in report["arms"].values() for run in runs.values()):
      run |= {k: np.nan for k in ("heldout", "loss_at_switch") if run.get(k, 0) is None}
    return report
  return {
    "size": dataclasses.asdict(size),
    "parameters": zoo.param_counts(size.model(None)).total,
    "tokens": size.steps * size.rows * size.length,
    "environment": _results.environment(),
    "arms": {},
  }


def table(report: dict[str, Any], suite: str) -> list[dict[str, Any]]:
  """One row an arm: held-out loss by seed, their mean, and the paired difference to the first."""
  rows, first = [], None
  for arm in study_lib.arms_of(suite):
    runs = report["arms"].get(arm.name, {})
    losses = {seed: run["heldout"] for seed, run in sorted(runs.items())}
    if not losses:
      continue
    first = first or losses
    pairs = [losses[s] - first[s] for s in losses if s in first]
    rows.append(
      {
        "arm": arm.name,
        "mean": float(np.mean(list(losses.values()))),
        "losses": list(losses.values()),
        "minus first": float(np.mean(pairs)) if pairs else None,
        "wins over first": sum(p < 0 for p in pairs),
        "at switch": float(np.mean([r.get("loss_at_switch", np.nan) for r in runs.values()])),
      }
    )
  return rows


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
  """One panel a suite: held-out loss of every arm and seed, and loss curves of the first one."""
  shown = [s for s in study_lib.SUITES if len(table(report, s)) > 1]
  figure, axes = pictures.figure(len(shown) + 1, width=4.2, height=3.6)
  for axis, suite in zip(axes, shown, strict=False):
    for i, row in enumerate(table(report, suite)):
      axis.plot(row["losses"], [i] * len(row["losses"]), "o", color="tab:blue", markersize=4)
      axis.plot([row["mean"]], [i], "|", color="k", markersize=14)
    axis.set_yticks(range(len(table(report, suite))), [r["arm"] for r in table(report, suite)])
    axis.invert_yaxis()
    axis.set(title=suite, xlabel="held-out nats a byte")
  for arm in study_lib.arms_of(shown[0]) if shown else ():
    run = report["arms"].get(arm.name, {}).get("0")
    if run and "loss" in run:
      quantised = arm.share * report["size"]["steps"]
      first, num = report["size"]["steps"] - quantised, sum(run.get("steps", [quantised]))
      x = np.linspace(first, first + num, len(run["loss"]))
      axes[-1].plot(x, run["loss"], label=arm.name, linewidth=1)
  axes[-1].set(title="training loss, seed 0", xlabel="step", ylabel="nats a byte")
  if axes[-1].lines:
    axes[-1].legend(fontsize=7)
  pictures.save(figure, path, dpi=90)
