"""Fits of small runs: parabolas in log space, power laws, L(N, D) and its optimum, the batch law.

Nonlinear fits are variable projections in numpy: for given exponents the rest is linear, so only
the exponents are searched, on a grid that zooms in. Units are the caller's (training.md section 5:
the ratio D/N depends on compute and must be reported with it).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Number = float | int
Vector = Sequence[Number] | np.ndarray


class FitError(ValueError):
  """Points that do not determine the fit; names what was found and what is needed."""


def _arrays(least: int, **columns: Vector) -> list[np.ndarray]:
  arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
  sizes = {name: len(values) for name, values in arrays.items()}
  if len(set(sizes.values())) > 1 or min(sizes.values()) < least:
    raise FitError(f"points: found lengths {sizes}, expected equal ones of at least {least}")
  for name, values in arrays.items():
    if not np.all(np.isfinite(values)):
      raise FitError(f"{name}: found {values[~np.isfinite(values)][0]}, expected finite numbers")
  return list(arrays.values())


def _need_positive(name: str, values: np.ndarray) -> None:
  if np.any(values <= 0):
    raise FitError(f"{name}: found {values.min()}, expected positive numbers")


# --- Parabolas and lines in log space ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Minimum:
  """The minimum of a parabola in ln x; `is_inside` where it lies between the points used."""

  x: float
  y: float
  curvature: float
  is_inside: bool


def log_parabola_minimum(x: Vector, y: Vector, *, around: int | None = None) -> Minimum:
  """Least-squares parabola in ln x; `around` keeps that many points nearest the lowest one.

  Raises FitError where the parabola opens downwards: the points show no minimum.
  """
  xs, ys = _arrays(3, x=x, y=y)
  _need_positive("x", xs)
  order = np.argsort(xs)
  xs, ys = np.log(xs[order]), ys[order]
  if around is not None and around < len(xs):
    first = min(max(int(np.argmin(ys)) - around // 2, 0), len(xs) - around)
    xs, ys = xs[first : first + around], ys[first : first + around]
  if len(np.unique(xs)) < 3:
    raise FitError(f"x: found {np.exp(np.unique(xs))}, expected three different ones")
  center = xs.mean()
  a, b, c = np.polyfit(xs - center, ys, 2)
  if a <= 0:
    raise FitError(f"parabola: found curvature {a:.3g}, expected > 0: no minimum in these points")
  at = center - b / (2 * a)
  return Minimum(math.exp(at), c - b * b / (4 * a), a, bool(xs[0] <= at <= xs[-1]))


@dataclasses.dataclass(frozen=True)
class BatchLaw:
  """bs = coefficient / L^exponent: the batch that needs fewest tokens to loss L (MiniCPM 3.2)."""

  coefficient: float
  exponent: float

  def batch(self, loss: Number) -> float:
    """Tokens a step for the loss that one expects to reach."""
    if loss <= 0:
      raise ValueError(f"loss: found {loss}, expected nats > 0")
    return self.coefficient / loss**self.exponent


# C4 and the paper's tokenizer; other data has other constants.
PUBLISHED_BATCH_LAW = BatchLaw(1.21e9, 6.24)


def tokens_to_loss(tokens: Vector, losses: Vector, target: Number) -> float | None:
  """Tokens at which a falling loss curve first reaches `target`, linear in ln tokens; or None."""
  ts, ls = _arrays(2, tokens=tokens, losses=losses)
  _need_positive("tokens", ts)
  below = np.nonzero(ls <= target)[0]
  if not len(below) or below[0] == 0:
    return None
  i = below[0]
  share = (ls[i - 1] - target) / (ls[i - 1] - ls[i])
  return float(np.exp(np.log(ts[i - 1]) + share * (np.log(ts[i]) - np.log(ts[i - 1]))))


def optimal_batch(batches: Vector, tokens_needed: Vector) -> Minimum:
  """Minimum of the parabola of ln(tokens needed) in ln(batch) (MiniCPM 3.2)."""
  bs, ts = _arrays(3, batches=batches, tokens_needed=tokens_needed)
  _need_positive("tokens_needed", ts)
  found = log_parabola_minimum(bs, np.log(ts))
  return dataclasses.replace(found, y=math.exp(found.y))


def fit_batch_law(losses: Vector, batches: Vector) -> BatchLaw:
  """Line through (ln L, ln bs) of the optima of all models."""
  ls, bs = _arrays(2, losses=losses, batches=batches)
  _need_positive("losses", ls)
  _need_positive("batches", bs)
  if np.ptp(np.log(ls)) == 0:
    raise FitError(f"losses: found only {ls[0]}, expected at least two different ones")
  slope, intercept = np.polyfit(np.log(ls), np.log(bs), 1)
  return BatchLaw(math.exp(intercept), -float(slope))


# --- Curves of one variable ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
  """y = scale * shape(x, rate) + floor; `rmse` of the fit in units of y."""

  kind: str  # "power": x^-rate; "exponential": exp(-rate x)
  scale: float
  rate: float
  floor: float
  rmse: float

  def __call__(self, x: Vector) -> np.ndarray:
    return np.asarray(self.scale * _shape(self.kind, np.asarray(x), self.rate) + self.floor)


def _shape(kind: str, x: np.ndarray, rate: float) -> np.ndarray:
  return x**-rate if kind == "power" else np.exp(-rate * x)


def fit_curve(x: Vector, y: Vector, kind: str = "power") -> Curve:
  """Least squares with scale >= 0 and floor >= 0 (MiniCPM 4.3: which of the two is better?)."""
  xs, ys = _arrays(4, x=x, y=y)
  _need_positive("x", xs)
  if kind not in ("power", "exponential"):
    raise ValueError(f"kind: found {kind!r}, expected 'power' or 'exponential'")
  unit = float(np.exp(np.mean(np.log(xs))))

  def solve(logs: np.ndarray) -> tuple[float, np.ndarray]:
    design = np.stack([_shape(kind, xs / unit, math.exp(logs[0])), np.ones_like(xs)], 1)
    return _nonnegative_least_squares(design, ys)

  logs, error, (scale, floor) = _zoom(solve, [(math.log(1e-2), math.log(20.0))])
  rate = math.exp(logs[0])
  if kind == "power":
    scale *= unit**rate
  else:
    rate /= unit
  return Curve(kind, float(scale), rate, float(floor), math.sqrt(error / len(xs)))


def _nonnegative_least_squares(design: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
  """(squared error, coefficients >= 0): the best unconstrained subset; few columns only."""
  columns = design.shape[1]
  best = (float(y @ y), np.zeros(columns))
  for subset in range(1, 2**columns):
    chosen = [i for i in range(columns) if subset >> i & 1]
    found, *_ = np.linalg.lstsq(design[:, chosen], y, rcond=None)
    if np.all(found >= 0):
      error = float(np.sum((design[:, chosen] @ found - y) ** 2))
      if error < best[0]:
        full = np.zeros(columns)
        full[chosen] = found
        best = (error, full)
  return best


def _zoom(solve, bounds, *, points: int = 13):
  """Minimises solve(p)[0] on a grid over the box that shrinks around the best point."""
  low, high = (np.array(side, np.float64) for side in zip(*bounds, strict=True))
  box_low, box_high, best = low.copy(), high.copy(), None
  for _ in range(14):
    axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
    for point in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)):
      error, coefficients = solve(point)
      if best is None or error < best[1]:
        best = (point, error, coefficients)
    half = (high - low) / (points - 1) * 2
    low, high = np.maximum(best[0] - half, box_low), np.minimum(best[0] + half, box_high)
  return best


# --- L(N, D) -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
  """L(N, D) = c_n N^-alpha + c_d D^-beta + floor (MiniCPM 4.5); C = 6 N D."""

  alpha: float
  beta: float
  c_n: float
  c_d: float
  floor: float
  rmse: float = 0.0
  r_squared: float = 1.0

  def loss(self, n: Vector | Number, d: Vector | Number) -> np.ndarray:
    n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
    return np.asarray(self.c_n * n**-self.alpha + self.c_d * d**-self.beta + self.floor)

  @property
  def eta(self) -> float:
    """Exponent of compute in the optimal ratio N/D."""
    return (self.beta - self.alpha) / (self.alpha + self.beta)

  @property
  def k_squared(self) -> float:
    """K^2 of N_opt/D_opt = K^2 (C/6)^eta."""
    k = (self.alpha * self.c_n / (self.beta * self.c_d)) ** (1 / (self.alpha + self.beta))
    return k * k

  def optimum(self, compute: Number) -> tuple[float, float]:
    """(N, D) of the lowest loss at C = 6 N D, in closed form (MiniCPM eq. 3)."""
    if compute <= 0:
      raise ValueError(f"compute: found {compute}, expected > 0")
    if self.c_n <= 0 or self.c_d <= 0:
      raise FitError(
        f"c_n, c_d: found {self.c_n:.3g}, {self.c_d:.3g}, expected both > 0: without a gain from "
        "size or from data there is no optimal ratio"
      )
    ratio = self.k_squared * (compute / 6) ** self.eta  # N / D
    n = math.sqrt(ratio * compute / 6)
    return n, compute / 6 / n

  def tokens_to_match(self, n: Number, target: Number) -> float:
    """D at which a model of size n reaches `target`; inf where its size alone forbids it."""
    rest = target - self.floor - self.c_n * n**-self.alpha
    return math.inf if rest <= 0 else (self.c_d / rest) ** (1 / self.beta)


def fit_scaling_law(n: Vector, d: Vector, losses: Vector) -> ScalingLaw:
  """Least squares over all five constants, coefficients >= 0, exponents in [0.02, 2]."""
  ns, ds, ls = _arrays(6, n=n, d=d, losses=losses)
  for name, values in (("n", ns), ("d", ds), ("losses", ls)):
    _need_positive(name, values)
  for name, values in (("n", ns), ("d", ds)):
    if len(np.unique(values)) < 3:
      raise FitError(f"{name}: found {len(np.unique(values))} different values, expected 3 or more")
  n_unit, d_unit = (float(np.exp(np.mean(np.log(values)))) for values in (ns, ds))

  def solve(logs: np.ndarray) -> tuple[float, np.ndarray]:
    alpha, beta = np.exp(logs)
    design = np.stack([(ns / n_unit) ** -alpha, (ds / d_unit) ** -beta, np.ones_like(ns)], 1)
    return _nonnegative_least_squares(design, ls)

  box = (math.log(0.02), math.log(2.0))
  logs, error, (c_n, c_d, floor) = _zoom(solve, [box, box], points=11)
  alpha, beta = np.exp(logs)
  return ScalingLaw(
    alpha=float(alpha),
    beta=float(beta),
    c_n=float(c_n * n_unit**alpha),
    c_d=float(c_d * d_unit**beta),
    floor=float(floor),
    rmse=math.sqrt(error / len(ls)),
    r_squared=1.0 - error / float(np.sum((ls - ls.mean()) ** 2)),
  )
