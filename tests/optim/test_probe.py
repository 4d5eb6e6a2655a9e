"""Diagnostics on a quadratic, where slope, second derivative and curvature are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.optim import probe


def quadratic():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(12, 12))
  return a @ a.T, rng.normal(size=12)


def test_on_a_quadratic_every_number_is_the_closed_form():
  a, b = quadratic()
  x0, x1 = np.random.default_rng(1).normal(size=(2, 12))

  def grad(params):
    x = jnp.concatenate([params["q"]["kernel"].ravel(), params["final_norm"]["scale"]])
    g = jnp.asarray(a, jnp.float32) @ x + jnp.asarray(b, jnp.float32)
    return {"q": {"kernel": g[:8].reshape(2, 4)}, "final_norm": {"scale": g[8:]}}

  def params(x):
    x = jnp.asarray(x, jnp.float32)
    return {"q": {"kernel": x[:8].reshape(2, 4)}, "final_norm": {"scale": x[8:]}}

  run = probe.Probe(grad)
  assert run(params(x0)) == {}
  got = run(params(x1))
  g0, g1, v = a @ x0 + b, a @ x1 + b, x1 - x0
  length = np.linalg.norm(v)
  slope, second = g1 @ v / length, v @ a @ v / length**2  # D2 of a quadratic: the Rayleigh quotient
  want = {
    "grad_norm": np.linalg.norm(g1),
    "grad_cosine": g0 @ g1 / np.linalg.norm(g0) / np.linalg.norm(g1),
    "slope": slope,
    "second": second,
    "curvature": abs(second) / (1 + slope**2) ** 1.5,
    "max_step": np.abs(v[:8]).max(),
  }
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


def test_nothing_moved_gives_zeros_and_survives_donation():
  run = probe.Probe(lambda p: jax.tree.map(lambda x: 2 * x, p))
  params = {"q": {"kernel": jnp.ones((3, 3))}}
  run(params)
  params = jax.jit(lambda p: jax.tree.map(lambda x: x + 0, p), donate_argnums=0)(params)
  got = run(params)
  assert got["slope"] == got["second"] == got["max_step"] == 0.0
  np.testing.assert_allclose(got["grad_cosine"], 1.0, rtol=1e-6)
