"""ScalingBench: loss on reasoning + label given the question, and accuracy as a sigmoid of it.

MiniCPM4 section 2.3.1: across models of one vocabulary task accuracy is a sigmoid of the loss, so
that losses of small models predict accuracies of large ones. The report does not say how losses
are averaged; three ways are offered:

  task   token mean inside an item, item mean inside a task, mean of the tasks (the default)
  item   token mean inside an item, mean over all items
  token  all nats over all tokens

acc(l) = lo + (hi - lo) / (1 + exp(k (l - l0))), k > 0; lo is the chance level where it is known.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from minicpm_jax.core import types
from minicpm_jax.data import scalingbench
from minicpm_jax.tunnel import fit, likelihood

Averaging = Literal["task", "item", "token"]
Unit = Literal["nats_per_token", "bits_per_byte"]


@dataclasses.dataclass(frozen=True)
class ItemScores:
  """Per item: nats of the target given the input, its tokens and bytes, and its task."""

  tasks: tuple[str, ...]
  nats: np.ndarray
  num_tokens: np.ndarray
  num_bytes: np.ndarray
  correct: np.ndarray | None = None  # 0 or 1; nan for items without choices

  def mean(self, averaging: Averaging = "task", unit: Unit = "nats_per_token") -> float:
    """The conditional loss; bits per byte compares models of different vocabularies."""
    if averaging not in ("task", "item", "token"):
      raise ValueError(f"averaging: found {averaging!r}, expected 'task', 'item' or 'token'")
    if unit not in ("nats_per_token", "bits_per_byte"):
      raise ValueError(f"unit: found {unit!r}, expected 'nats_per_token' or 'bits_per_byte'")
    size = self.num_tokens if unit == "nats_per_token" else self.num_bytes * math.log(2)
    if averaging == "token":
      return float(self.nats.sum() / size.sum())
    each = self.nats / size
    if averaging == "item":
      return float(each.mean())
    names = np.array(self.tasks)
    return float(np.mean([each[names == task].mean() for task in dict.fromkeys(self.tasks)]))

  def by_task(self, unit: Unit = "nats_per_token") -> dict[str, float]:
    """The item mean of every task."""
    names = np.array(self.tasks)
    found = {}
    for task in dict.fromkeys(self.tasks):
      mine = names == task
      part = ItemScores(
        (task,) * int(mine.sum()), self.nats[mine], self.num_tokens[mine], self.num_bytes[mine]
      )
      found[task] = part.mean("item", unit)
    return found

  def accuracy(self) -> float:
    """Share of the items with choices whose gold choice is the likeliest."""
    if self.correct is None or np.all(np.isnan(self.correct)):
      raise ValueError("correct: found no item with choices, expected some for an accuracy")
    return float(np.nanmean(self.correct))


def score(
  scorer: likelihood.Scorer, params: types.Params, items: Sequence[scalingbench.Item]
) -> ItemScores:
  """Scores of every item under one model. Inputs longer than a row keep their end."""
  if not items:
    raise ValueError("items: found none, expected at least one")
  targets = tuple(likelihood.Item(i.id, ((i.input, i.target),)) for i in items)
  found = scorer.score(params, likelihood.EvalSet("scalingbench", "text", targets))
  correct = np.full(len(items), np.nan)
  with_choices = [n for n, item in enumerate(items) if item.choices]
  if with_choices:
    options = tuple(
      likelihood.Item(item.id, tuple((item.input, c) for c in item.choices), item.gold)
      for item in (items[n] for n in with_choices)
    )
    chosen = scorer.score(params, likelihood.EvalSet("choices", "choice", options))
    correct[with_choices] = chosen.correct
  tokens = np.array([len(scorer.tok.encode(item.target)) for item in items], np.float64)
  num_bytes = np.array([item.target_bytes for item in items], np.float64)
  return ItemScores(tuple(i.task for i in items), found.nats, tokens, num_bytes, correct)


# --- Loss to accuracy ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sigmoid:
  """acc(l) = lo + (hi - lo) / (1 + exp(k (l - l0)))."""

  lo: float
  hi: float
  k: float
  l0: float

  def __call__(self, loss: fit.Vector | fit.Number) -> np.ndarray:
    shape = _falling(np.asarray(loss, np.float64), self.k, self.l0)
    return np.asarray(self.lo + (self.hi - self.lo) * shape)


def _falling(
  loss: np.ndarray, k: np.ndarray | fit.Number, l0: np.ndarray | fit.Number
) -> np.ndarray:
  return np.asarray(1 / (1 + np.exp(np.clip(k * (loss - l0), -500, 500))))


def fit_sigmoid(
  losses: fit.Vector,
  accuracies: fit.Vector,
  *,
  chance: fit.Number | None = None,
  num_items: int | None = None,
) -> Sigmoid:
  """Bounded least squares, 0 <= lo <= hi <= 1, k > 0; lo = `chance` where that is known.

  `num_items` weights a point by the inverse binomial variance of its accuracy. FitError below four
  points.
  """
  ls, accs = np.asarray(losses, np.float64), np.asarray(accuracies, np.float64)
  if ls.shape != accs.shape or ls.ndim != 1 or len(ls) < 4:
    raise fit.FitError(
      f"points: found shapes {ls.shape} and {accs.shape}, expected at least 4 pairs for a sigmoid"
    )
  if not (np.all(np.isfinite(ls)) and np.all((accs >= 0) & (accs <= 1))):
    raise fit.FitError("points: expected finite losses and accuracies in [0, 1]")
  if chance is not None and not 0 <= chance < 1:
    raise ValueError(f"chance: found {chance}, expected in [0, 1)")
  if num_items is not None and num_items < 1:
    raise ValueError(f"num_items: found {num_items}, expected at least 1")
  width = float(np.ptp(ls))
  if width == 0:
    raise fit.FitError(f"losses: found only {ls[0]}, expected different ones")
  weights = np.ones_like(accs)
  if num_items is not None:
    p = (accs * num_items + 1) / (num_items + 2)  # no zero variance at 0 and 1
    weights = num_items / (p * (1 - p))

  low = np.array([math.log(0.2 / width), ls.min() - width])
  high = np.array([math.log(200 / width), ls.max() + width])
  box, best = (low, high), None
  for _ in range(16):  # a grid over (ln k, l0) that zooms in on its best point
    axes = [np.linspace(a, b, 41) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    shapes = _falling(ls, np.exp(grid[:, :1]), grid[:, 1:])
    errors, los, his = _levels(shapes, accs, weights, chance)
    i = int(np.argmin(errors))
    if best is None or errors[i] < best[0]:
      best = (errors[i], grid[i], float(los[i]), float(his[i]))
    half = (high - low) / 40 * 4
    low, high = np.maximum(best[1] - half, box[0]), np.minimum(best[1] + half, box[1])
  return Sigmoid(best[2], best[3], math.exp(best[1][0]), float(best[1][1]))


def _levels(
  shapes: np.ndarray, accs: np.ndarray, weights: np.ndarray, chance: fit.Number | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(error, lo, hi) of the best 0 <= lo <= hi <= 1 for every shape [G, points].

  Linear least squares under bounds: the free solution where it is allowed, else the best on a face.
  """

  def total(x: np.ndarray) -> np.ndarray:
    return np.sum(weights * x, axis=-1)

  def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / np.maximum(b, 1e-300)

  def error(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    return total((lo[:, None] + (hi - lo)[:, None] * shapes - accs) ** 2)

  count, rest = len(shapes), 1 - shapes
  lo = np.full(count, 0.0 if chance is None else float(chance))
  hi = lo + np.clip(ratio(total(shapes * (accs - lo[:, None])), total(shapes**2)), 0, 1 - lo)
  if chance is not None:
    return error(lo, hi), lo, hi
  one, flat = np.ones(count), np.full(count, np.average(accs, weights=weights))
  under_one = np.clip(ratio(total(rest * (accs - shapes)), total(rest**2)), 0, 1)
  a, b, c = total(rest**2), total(rest * shapes), total(shapes**2)
  determinant = a * c - b * b
  x, y = total(rest * accs), total(shapes * accs)
  free_lo, free_hi = ratio(c * x - b * y, determinant), ratio(a * y - b * x, determinant)
  los = np.stack([lo, flat, under_one, free_lo])
  his = np.stack([hi, flat, one, free_hi])
  is_allowed = (los >= 0) & (los <= his) & (his <= 1)
  errors = np.stack([error(*pair) for pair in zip(los, his, strict=True)])
  errors = np.where(is_allowed, errors, np.inf)
  pick = (np.argmin(errors, axis=0), np.arange(count))
  return errors[pick], los[pick], his[pick]


@dataclasses.dataclass(frozen=True)
class Extrapolation:
  """Accuracy of held-out models: measured, by the sigmoid and by a line fitted on the others."""

  measured: np.ndarray
  sigmoid: np.ndarray
  line: np.ndarray
  fitted: Sigmoid
  line_coefficients: tuple[float, float]  # slope, intercept

  @property
  def sigmoid_error(self) -> float:
    return float(np.abs(self.sigmoid - self.measured).mean())

  @property
  def line_error(self) -> float:
    return float(np.abs(self.line - self.measured).mean())


def extrapolate(
  losses: fit.Vector,
  accuracies: fit.Vector,
  is_heldout: Sequence[bool] | np.ndarray,
  *,
  chance: fit.Number | None = None,
  num_items: int | None = None,
) -> Extrapolation:
  """Fits on the models that are not held out (the smaller ones) and predicts the others."""
  ls, accs = np.asarray(losses, np.float64), np.asarray(accuracies, np.float64)
  held = np.asarray(is_heldout, bool)
  if not held.any():
    raise ValueError("is_heldout: found no held-out model, expected at least the largest")
  fitted = fit_sigmoid(ls[~held], accs[~held], chance=chance, num_items=num_items)
  slope, intercept = np.polyfit(ls[~held], accs[~held], 1)
  line = (float(slope), float(intercept))
  return Extrapolation(accs[held], fitted(ls[held]), slope * ls[held] + intercept, fitted, line)
