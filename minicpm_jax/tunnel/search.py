"""Searches over continuous settings: coordinate descent, Gaussian process, random points.

All take `evaluate(points) -> losses`, a batch at a time, so that the runs of a batch share one
program. A diverged run (inf) counts as worse than everything seen.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minicpm_jax.config import validate

Number = float | int
Point = dict[str, Number]
Evaluate = Callable[[list[Point]], Sequence[Number] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Log:
  """A positive setting, searched on a log scale between `low` and `high`."""

  low: Number
  high: Number

  def __post_init__(self):
    validate.require_hints(self, "Log.")
    if not 0 < self.low < self.high < math.inf:
      raise ValueError(f"Log: found {self.low}..{self.high}, expected 0 < low < high")

  def at(self, unit: Number) -> float:
    return float(math.exp(math.log(self.low) + unit * math.log(self.high / self.low)))

  def unit(self, value: Number) -> float:
    return math.log(value / self.low) / math.log(self.high / self.low)


Space = Mapping[str, Log]


@dataclasses.dataclass
class Found:
  """All evaluations in order."""

  points: list[Point]
  values: list[Number]

  @property
  def best(self) -> tuple[Point, Number]:
    i = int(np.argmin(np.where(np.isnan(self.values), np.inf, self.values)))
    return self.points[i], self.values[i]


def _check(space: Space, points: Sequence[Point]) -> None:
  if not space:
    raise ValueError("space: found no setting, expected at least one")
  for point in points:
    if set(point) != set(space):
      raise ValueError(f"start: found settings {sorted(point)}, expected {sorted(space)}")
    for name, value in point.items():
      if not space[name].low <= value <= space[name].high:
        raise ValueError(
          f"start.{name}: found {value}, expected {space[name].low}..{space[name].high}"
        )


def random_points(space: Space, count: int, *, seed: int) -> list[Point]:
  """Uniform on the log scales."""
  _check(space, [])
  draws = np.random.default_rng(seed).random((count, len(space)))
  return [_point(space, row) for row in draws]


def _point(space: Space, units: np.ndarray) -> Point:
  return {name: axis.at(float(u)) for (name, axis), u in zip(space.items(), units, strict=True)}


def _call(evaluate: Evaluate, found: Found, points: list[Point]) -> None:
  values = [float(v) for v in evaluate(points)]
  if len(values) != len(points):
    raise ValueError(f"evaluate: found {len(values)} values, expected {len(points)}")
  found.points += points
  found.values += values


# --- Coordinate descent --------------------------------------------------------------------------


def coordinate(
  evaluate: Evaluate, space: Space, start: Point, *, factor: Number = 2.0, rounds: int = 2
) -> Found:
  """One setting after another: a grid of `factor` around the best, all its points in one batch.

  MiniCPM 3.2 searches lr, batch, lr this way. A round's grid has the neighbours and those after
  them; the best point so far is not run again.
  """
  _check(space, [start])
  if factor <= 1:
    raise ValueError(f"factor: found {factor}, expected > 1")
  found = Found([], [])
  _call(evaluate, found, [dict(start)])
  for r in range(rounds):
    step = factor ** (0.5**r)
    for name, axis in space.items():
      best, _ = found.best
      values = (best[name] * step**k for k in (-2, -1, 1, 2))
      points = [{**best, name: v} for v in values if axis.low <= v <= axis.high]
      points = [p for p in points if p not in found.points]
      if points:
        _call(evaluate, found, points)
  return found


# --- Gaussian process ----------------------------------------------------------------------------


def bayesian(
  evaluate: Evaluate,
  space: Space,
  *,
  num_calls: int,
  batch_size: int = 4,
  seed: int = 0,
  start: Sequence[Point] = (),
) -> Found:
  """Expected improvement of a Gaussian process, `batch_size` points a round.

  The points of a round are chosen one after another, each with the process's own mean in place of
  the results still missing. The first round is `start` and random points.
  """
  _check(space, list(start))
  if num_calls < 1 or batch_size < 1:
    raise ValueError(f"num_calls, batch_size: found {num_calls}, {batch_size}, expected >= 1")
  rng = np.random.default_rng(seed)
  found = Found([], [])
  num_random = max(0, min(num_calls, max(batch_size, len(space) + 1)) - len(start))
  first = [dict(p) for p in start] + random_points(space, num_random, seed=seed)
  first = first[:num_calls]
  for i in range(0, len(first), batch_size):
    _call(evaluate, found, first[i : i + batch_size])
  while len(found.points) < num_calls:
    xs = np.array([[space[name].unit(p[name]) for name in space] for p in found.points])
    ys = _finite(found.values)
    chosen = []
    for _ in range(min(batch_size, num_calls - len(found.points))):
      x, mean = _propose(xs, ys, rng)
      chosen.append(_point(space, x))
      xs, ys = np.vstack([xs, x]), np.append(ys, mean)
    _call(evaluate, found, chosen)
  return found


def _finite(values: Sequence[Number]) -> np.ndarray:
  """Diverged runs at the worst finite value plus the range: bad, without bending the process."""
  ys = np.asarray(values, np.float64)
  good = ys[np.isfinite(ys)]
  if not len(good):
    return np.zeros(len(ys))
  return np.where(np.isfinite(ys), ys, good.max() + max(np.ptp(good), 1e-3))


def _kernel(a: np.ndarray, b: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Matern 5/2 with one length a setting."""
  r = np.sqrt(np.maximum(((a[:, None] - b[None]) / length) ** 2, 0).sum(-1)) * math.sqrt(5)
  return (1 + r + r * r / 3) * np.exp(-r)


@dataclasses.dataclass(frozen=True)
class Process:
  """A fitted Gaussian process on the unit box; values are standardised inside."""

  xs: np.ndarray
  length: np.ndarray
  mean: float
  scale: float
  factor: np.ndarray  # Cholesky of the noisy kernel
  weights: np.ndarray

  def predict(self, xs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) at [P, settings]."""
    cross = _kernel(xs, self.xs, self.length)
    solved = np.linalg.solve(self.factor, cross.T)
    variance = np.maximum(1 - np.sum(solved**2, axis=0), 1e-12)
    return self.mean + self.scale * (cross @ self.weights), self.scale * np.sqrt(variance)


def fit_process(xs: np.ndarray, ys: np.ndarray, *, rng: np.random.Generator) -> Process:
  """Lengths and noise by maximum marginal likelihood over random candidates."""
  mean, scale = float(np.mean(ys)), float(np.std(ys)) or 1.0
  z = (ys - mean) / scale
  best = None
  candidates = np.exp(rng.uniform(math.log(0.1), math.log(3.0), (64, xs.shape[1])))
  for length in [np.full(xs.shape[1], 0.5), *candidates]:
    for noise in (1e-4, 1e-2):
      kernel = _kernel(xs, xs, length) + noise * np.eye(len(xs))
      factor = np.linalg.cholesky(kernel)
      half = np.linalg.solve(factor, z)
      likelihood = -0.5 * half @ half - np.log(np.diag(factor)).sum()
      if best is None or likelihood > best[0]:
        best = (likelihood, length, factor, np.linalg.solve(factor.T, half))
  return Process(xs, best[1], mean, scale, best[2], best[3])


def _propose(xs: np.ndarray, ys: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
  """(the point of largest expected improvement, the process's mean there)."""
  process = fit_process(xs, ys, rng=rng)
  near = xs[np.argmin(ys)] + rng.normal(0, 0.1, (256, xs.shape[1]))
  candidates = np.clip(np.vstack([rng.random((1024, xs.shape[1])), near]), 0, 1)
  mean, std = process.predict(candidates)
  gap = ys.min() - mean
  z = gap / std
  erf = np.vectorize(math.erf)
  improvement = gap * 0.5 * (1 + erf(z / math.sqrt(2)))
  improvement += std * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
  best = int(np.argmax(improvement))
  return candidates[best], float(mean[best])
