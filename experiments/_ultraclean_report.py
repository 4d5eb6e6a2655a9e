"""Reports of `experiments.ultraclean` and `verify_data`: report.json, examples, figures."""

import collections
import pathlib
from typing import Any

import numpy as np

from experiments import _ultraclean
from minicpm_jax.core import files, pictures
from minicpm_jax.data import documents, executor, stats
from minicpm_jax.data.documents import Doc

EXAMPLES = 5


def make(
  plan: _ultraclean.Plan,
  scored: executor.Report,
  final: executor.Report,
  seeds_found: dict[str, dict],
) -> dict[str, Any]:
  """Keep rates, drop reasons, score histograms, statistics before and after, examples."""
  raw = stats.Stats()
  for path in documents.expand(plan.inputs):
    for item in plan.reader(path):
      if isinstance(item, Doc):
        raw.add(item)
  clean = stats.collect(executor.read_kept(final.folder))
  kept = [(doc.lang, doc.score, doc.text) for doc in executor.read_kept(scored.folder)]
  quality = [row for row in executor.read_drops(scored.folder) if row["reason"] == "score"]
  scores: dict[str, list[float]] = collections.defaultdict(list)
  for lang, score, _ in kept:
    scores[lang].append(score)
  # a drop carries no language: its excerpt's script tells the two demonstrated ones apart
  for row in quality:
    scores[_lang_of(row["excerpt"], plan.languages)].append(float(row["detail"]))
  return {
    "inputs": list(plan.inputs),
    "languages": list(plan.languages),
    "threshold": plan.threshold,
    "classifiers": seeds_found,
    "read": scored.counts["read"],
    "scored_kept": scored.counts["kept"],
    "clean": final.counts["kept"],
    "keep_rate": final.counts["kept"] / max(scored.counts["read"], 1),
    "dropped": dict(sorted(scored.counts["dropped"].items(), key=lambda kv: -kv[1]))
    | final.counts["dropped"],
    "stages": scored.counts["stages"] + final.counts["stages"][1:],
    "unreadable": {k: n for k, n in scored.counts["dropped"].items() if k.startswith("read/")},
    "score_histogram": {lang: _histogram(values) for lang, values in sorted(scores.items())},
    "statistics": {"raw": raw.as_dict(), "clean": clean.as_dict()},
    "examples": _examples(kept, quality, list(executor.read_drops(scored.folder))),
  }


def _lang_of(text: str, languages: tuple[str, ...]) -> str:
  is_cjk = sum("\u4e00" <= c <= "\u9fff" for c in text) * 5 > len(text)
  return next((lang for lang in languages if (lang in ("zh", "ja")) == is_cjk), languages[0])


def _histogram(values: list[float]) -> list[int]:
  return np.histogram(values, bins=stats.SCORE_BINS, range=(0.0, 1.0))[0].tolist()


def _examples(kept, quality, drops) -> dict[str, list[dict[str, Any]]]:
  """The highest and lowest scores kept, the ones just below the threshold, one of each reason."""
  ordered = sorted(kept, key=lambda row: (-row[1], row[2]))
  missed = sorted(quality, key=lambda row: -float(row["detail"]))

  def shown(rows):
    return [{"score": round(s, 4), "text": text[:200]} for _, s, text in rows]

  reasons: dict[str, dict] = {}
  for row in drops:
    reasons.setdefault(f"{row['stage']}/{row['reason']}", row)
  return {
    "best": shown(ordered[:EXAMPLES]),
    "just_kept": shown(ordered[-EXAMPLES:]),
    "just_dropped": [
      {"score": float(row["detail"]), "text": row["excerpt"]} for row in missed[:EXAMPLES]
    ],
    "worst": [
      {"score": float(row["detail"]), "text": row["excerpt"]} for row in missed[-EXAMPLES:]
    ],
    "one_of_each_reason": [
      {"reason": name, "detail": row["detail"], "text": row["excerpt"]}
      for name, row in sorted(reasons.items())
    ],
  }


def write(report: dict[str, Any], folder: pathlib.Path) -> None:
  """report.json and scores.png, each whole or not at all."""
  files.write_json(folder / "report.json", report)
  pictures.save(plot(report), folder / "scores.png")


def plot(report: dict[str, Any]):
  """A matplotlib figure: score histogram of every language, and where documents went."""
  histograms = report["score_histogram"]
  figure, axes = pictures.figure(len(histograms) + 1, width=4, height=3.2)
  for axis, (lang, counts) in zip(axes, histograms.items(), strict=False):
    left = np.arange(len(counts)) / len(counts)
    axis.bar(left, counts, width=1 / len(counts), align="edge", color="tab:blue")
    axis.axvline(report["threshold"], color="tab:red", linestyle="--")
    axis.set(title=f"{lang}: classifier score", xlabel="score", ylabel="documents", xlim=(0, 1))
  flow = {"clean": report["clean"]} | report["dropped"]
  top = sorted(flow.items(), key=lambda kv: kv[1])[-10:]
  axes[-1].barh([name for name, _ in top], [n for _, n in top], color="tab:gray")
  axes[-1].set(title="where documents went", xlabel="documents")
  axes[-1].tick_params(axis="y", labelsize=7)
  return figure


def plot_verification(report: dict[str, Any], path: pathlib.Path) -> None:
  """Delta of every set, and the interval of their mean that decided."""
  metric = report["decided_by"]
  deltas = {name: found[metric] for name, found in report["deltas"].items() if metric in found}
  figure, (axis,) = pictures.figure(width=6, height=1.2 + 0.4 * len(deltas))
  axis.barh(list(deltas), list(deltas.values()), color="tab:gray")
  low, high = report["interval"]
  axis.barh(["mean"], [report["delta"]], color="tab:blue")
  axis.errorbar(
    [report["delta"]], ["mean"], xerr=[[report["delta"] - low], [high - report["delta"]]]
  )
  axis.axvline(0, color="k", linewidth=0.8)
  axis.set(title=f"{report['candidate']}: {report['decision']}", xlabel=f"better by, {metric}")
  pictures.save(figure, path)
