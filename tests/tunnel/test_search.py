"""Searches on planted bowls, against random points and the kernel algebra written out."""

import math

import numpy as np
import pytest

from minicpm_jax.tunnel import search

SPACE = {"lr": search.Log(1e-3, 1.0), "std": search.Log(0.01, 1.0)}
BEST = {"lr": 0.03, "std": 0.2}


def bowl(points):
  """A tilted parabola in the logarithms; minimum 2 at BEST."""
  found = []
  for p in points:
    a, b = (math.log(p[name] / BEST[name]) for name in ("lr", "std"))
    found.append(2.0 + 0.05 * a * a + 0.1 * b * b + 0.05 * a * b)
  return found


def test_bayesian_beats_random_points():
  batches = []

  def evaluate(points):
    batches.append(len(points))
    return bowl(points)

  found = search.bayesian(evaluate, SPACE, num_calls=20, batch_size=4, seed=0)
  point, value = found.best
  random = [min(bowl(search.random_points(SPACE, 20, seed=s))) for s in range(10)]
  assert value - 2 < 0.2 * (np.median(random) - 2)
  assert point["lr"] == pytest.approx(BEST["lr"], rel=0.5)
  assert sum(batches) == 20 and max(batches) == 4 and len(found.points) == 20


def test_bayesian_survives_divergence_and_keeps_the_start():
  start = {"lr": 0.5, "std": 0.5}

  def evaluate(points):
    return [math.inf if p["lr"] > 0.2 else v for p, v in zip(points, bowl(points), strict=True)]

  found = search.bayesian(evaluate, SPACE, num_calls=16, batch_size=4, start=[start])
  assert found.points[0] == start and found.values[0] == math.inf
  assert found.best[1] < 2.1


def test_coordinate_descends_to_the_bowl():
  found = search.coordinate(bowl, SPACE, {"lr": 0.2, "std": 0.05}, rounds=3)
  assert found.best[1] < 2.05
  assert len({tuple(p.values()) for p in found.points}) == len(found.points)


def test_process_interpolates_and_knows_its_ignorance():
  rng = np.random.default_rng(0)
  xs = rng.random((12, 2))
  ys = np.sin(3 * xs[:, 0]) + xs[:, 1]
  process = search.fit_process(xs, ys, rng=rng)
  mean, std = process.predict(xs)
  np.testing.assert_allclose(mean, ys, atol=0.05)
  assert process.predict(np.array([[3.0, 3.0]]))[1][0] > 3 * std.max()
  # Against the textbook formula with the same kernel, written with an inverse.
  kernel = search._kernel(xs, xs, process.length)
  noisy = process.factor @ process.factor.T
  np.testing.assert_allclose(noisy - kernel, noisy[0, 0] * np.eye(12) - np.eye(12), atol=1e-9)
  at = np.array([[0.3, 0.6]])
  cross = search._kernel(at, xs, process.length)
  expected = ys.mean() + cross @ np.linalg.inv(noisy) @ (ys - ys.mean())
  np.testing.assert_allclose(process.predict(at)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda: search.Log(0.0, 1.0), "low < high"),
    (lambda: search.bayesian(bowl, SPACE, num_calls=4, start=[{"lr": 0.1}]), "settings"),
    (lambda: search.bayesian(bowl, SPACE, num_calls=4, start=[{"lr": 5, "std": 0.1}]), "start.lr"),
    (lambda: search.coordinate(lambda p: [], SPACE, BEST), "found 0 values"),
    (lambda: search.coordinate(bowl, SPACE, BEST, factor=1.0), "factor"),
  ],
)
def test_bad_searches_are_named(call, match):
  with pytest.raises(ValueError, match=match):
    call()
