"""Summary and picture of `experiments.short_to_long`."""

import pathlib

import numpy as np

from experiments import _short_to_long as toy
from minicpm_jax.core import pictures

ARMS = {  # name in the picture -> key of `final`
  "short model, full attention": "short_trained_full_attention",
  "short model, untrained selection": "short_trained_sparse_attention",
  "long full, full attention": "full_trained_full_attention",
  "long full, untrained selection": "full_trained_sparse_attention",
  "long sparse, selection": "sparse_trained_sparse_attention",
  "long sparse, full attention": "sparse_trained_full_attention",
}
SELECTING = tuple(name for name in ARMS if name.endswith("selection"))
FIRST = 10  # steps that count as the switch


def summary(plan: toy.Plan, seeds: list[dict]) -> dict:
  """Needle accuracy of every arm (means over seeds); per seed, points behind full attention.

  "points_behind_full_attention": of the model trained with it in both stages.
  "loss_jump_at_the_switch", per seed: "mean" and "largest" compare the training losses of equal
  steps of the two arms, the first FIRST whose rows exceed what a query sees (on shorter rows both
  compute the same); "held_out": nats a token of the evaluation's documents, before the first step.
  """
  found: dict = {"num_seeds": len(seeds)}
  for name, key in ARMS.items():
    found[name] = round(float(np.mean([s["final"][key]["needle"] for s in seeds])), 4)
  aim = [s["final"][ARMS["long full, full attention"]]["needle"] for s in seeds]
  found["points_behind_full_attention"] = {
    name: [
      round(100 * (full - s["final"][ARMS[name]]["needle"]), 2)
      for full, s in zip(aim, seeds, strict=True)
    ]
    for name in ("short model, full attention", *SELECTING)
  }
  for name in ("short", "full", "sparse"):
    shares = [np.max(s["selection"][name]["selected"]) for s in seeds]
    found[f"needle block selected by the best head, {name}"] = round(float(np.mean(shares)), 3)
  at = [i for i, length in enumerate(plan.long_lengths()) if length > toy.VISIBLE][:FIRST]
  jumps = [[s["losses"]["sparse"][i] / s["losses"]["full"][i] - 1 for i in at] for s in seeds]
  starts = [s["curves"]["sparse"][0] for s in seeds]
  found["loss_jump_at_the_switch"] = {
    "mean": np.mean(jumps, axis=1).round(4).tolist(),
    "largest": np.max(jumps, axis=1).round(4).tolist(),
    "held_out": [round(row["sparse_nll"] / row["full_nll"] - 1, 4) for row in starts],
  }
  return found


def draw(seeds: list[dict], path: pathlib.Path) -> None:
  """Training losses, needle accuracy over the long stage, share of needle blocks selected."""
  figure, (left, middle, right) = pictures.figure(3, width=4.7, height=3.8)
  colors = {"short": "gray", "full": "C0", "sparse": "C1"}
  lines = (  # model, attention it is read with, style, label
    ("full", "full", "-", "trained and read with full"),
    ("full", "sparse", "--", "full, untrained selection"),
    ("sparse", "sparse", "-", "trained and read with selection"),
    ("sparse", "full", "--", "sparse, read with full"),
  )
  for i, run in enumerate(seeds):
    first = 0
    for name, color in colors.items():
      losses = _smooth(run["losses"][name])
      label = None if i else ("short, full" if name == "short" else f"long, {name}")
      left.plot(first + np.arange(len(losses)), losses, color=color, lw=0.8, label=label)
      first = len(run["losses"]["short"])
    for name, form, style, label in lines:
      rows = run["curves"][name]
      x, y = [r["step"] for r in rows], [r[f"{form}_needle"] for r in rows]
      middle.plot(x, y, style, color=colors[name], lw=1, label=None if i else label)
  for i, (name, color) in enumerate(colors.items()):
    share_LK = np.mean([s["selection"][name]["selected"] for s in seeds], axis=0)
    at = np.arange(share_LK.size) + 0.27 * (i - 1)
    right.bar(at, share_LK.ravel(), 0.25, color=color, label=f"{name} model")
  aim = np.mean([s["final"][ARMS["long full, full attention"]]["needle"] for s in seeds])
  middle.axhspan(aim - 0.02, aim, color="C0", alpha=0.15, lw=0, label="2 points behind full")
  names = [f"{layer}.{head}" for layer, head in np.ndindex(share_LK.shape)]
  right.set_xticks(np.arange(share_LK.size), names)
  left.set(xlabel="step", ylabel="training loss (answers weigh more)")
  middle.set(xlabel="steps at long length", ylabel="needle accuracy", ylim=(None, 1.01))
  right.set(xlabel="layer . key head", ylabel="needle's block selected", ylim=(0, 1.02))
  long = np.concatenate([run["losses"][name] for run in seeds for name in ("full", "sparse")])
  top = np.max(long, where=np.isfinite(long), initial=0.0)
  left.set_ylim(None, 1.1 * top or None)  # the switch, not the first steps of all
  for axis in (left, middle, right):
    axis.legend(fontsize=8)
  pictures.save(figure, path, dpi=120)


def _smooth(values: list[float], size: int = 20) -> np.ndarray:
  padded = np.concatenate((np.full(size - 1, values[0]), values))
  return np.convolve(padded, np.full(size, 1 / size), "valid")
