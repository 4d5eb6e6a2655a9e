"""Gradients of InfLLM v2 against section 11's formula and finite differences, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.nn import sparse_attention
from pallas_kernels.sparse_attention import api as attention_api
from pallas_kernels.sparse_attention import vjp as attention_vjp
from tests.nn import sparse_oracle as oracle
from tests.pallas_kernels import sparse_suite as suite

T = 203  # 13 blocks of 16, budget 5, the last one ragged
select = jax.jit(sparse_attention.select_blocks, static_argnames="cfg")


@functools.partial(jax.jit, static_argnames="form")
def gradients(q, k, v, ids, dout, form):
  """dq, dk, dv with the implementation's own selection ("band") or lists without a promise."""
  if form == "band":
    run = lambda *x: sparse_attention.infllm_attention(*x, oracle.small())  # noqa: E731
  else:
    more = dict(block_size=16, implementation="xla")
    run = lambda *x: attention_api.attend_blocks(*x, ids, **more)[0]  # noqa: E731
  return jax.vjp(run, q, k, v)[1](dout)


@pytest.mark.parametrize("form", ["band", "pairs"])
def test_gradients_against_the_formula(form):
  cfg = oracle.small()
  q, k, v = oracle.draw(13, T, T, 4, 2, 8)
  dout, _, _ = oracle.draw(14, T, T, 4, 2, 8)
  ids, _ = select(q, k, cfg)
  found, again = (gradients(q, k, v, ids, dout, form) for _ in range(2))
  for a, b in zip(found, again, strict=True):
    np.testing.assert_array_equal(a, b)  # bitwise repeatable
  expected = oracle.gradients(q[0], k[0], v[0], dout[0], cfg, np.asarray(ids[0]))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a[0], b, atol=1e-4)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_against_finite_differences(name):
  """Of the float64 definition with the selection held fixed, in one random direction."""
  cfg = oracle.small()
  arrays = dict(zip("qkv", oracle.draw(31, T, T, 4, 2, 8), strict=True))
  dout, _, _ = oracle.draw(32, T, T, 4, 2, 8)
  ids = np.asarray(select(arrays["q"], arrays["k"], cfg)[0])
  found = dict(zip("qkv", gradients(*arrays.values(), ids, dout, "band"), strict=True))[name]
  direction = np.random.default_rng(0).normal(size=found.shape)

  def exact(step):
    moved = arrays | {name: arrays[name].astype(np.float64) + step * direction}
    return np.sum(dout[0] * oracle.attend_with(*(x[0] for x in moved.values()), cfg, ids[0]))

  expected = (exact(1e-4) - exact(-1e-4)) / 2e-4
  np.testing.assert_allclose(np.sum(np.asarray(found, np.float64) * direction), expected, rtol=1e-4)


@pytest.mark.parametrize("num_local", [0, 2])
def test_bfloat16_gradients(num_local):
  """Errors of out, lse, dq, dk, dv against 3 times those of plain bf16 attention (section 20)."""
  suite.check_attend(attention_vjp.attend_xla, num_local=num_local, dtype=jnp.bfloat16)


def test_gradient_of_lse():
  """d lse / d k = sum of P q: finite differences of the float64 definition in one direction."""
  q, k, v = oracle.draw(15, 96, 96, 2, 1, 8)
  ids = oracle.small_lists(5, 96, 6, 4)
  rng = np.random.default_rng(0)
  weights, direction = rng.normal(size=(1, 96, 2)), rng.normal(size=k.shape)

  def f(k):
    more = dict(block_size=16, implementation="xla")
    return jnp.sum(weights * attention_api.attend_blocks(q, k, v, ids, **more)[1])

  def exact(k):
    total = 0.0
    for t, n in np.ndindex(96, 2):
      tokens = [s for s in range(t + 1) if s // 16 in set(ids[0, 0, t].tolist())]
      total += weights[0, t, n] * np.logaddexp.reduce(k[0, tokens, 0] @ q[0, t, n] / np.sqrt(8))
    return total

  found = np.sum(np.asarray(jax.jit(jax.grad(f))(jnp.asarray(k)), np.float64) * direction)
  k = k.astype(np.float64)
  expected = (exact(k + 1e-5 * direction) - exact(k - 1e-5 * direction)) / 2e-5
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_no_gradient_through_the_selection():
  """Keys that no query selected get exactly 0, though they took part in stage 1."""
  cfg = oracle.small()
  q, k, v = oracle.draw(16, T, T, 4, 2, 8)
  ids, _ = select(q, k, cfg)
  last = set(np.asarray(ids[0, 0, -1]).tolist())

  def f(k):
    return sparse_attention.infllm_attention(q, k, v, cfg)

  of_last = np.zeros(q.shape, np.float32)
  of_last[:, -1, 0] = 1
  (grad,) = jax.jit(lambda k, dout: jax.vjp(f, k)[1](dout))(k, of_last)
  grad = np.asarray(grad)[0]
  for b in range(13):
    assert np.any(grad[16 * b : 16 * b + 16, 0]) == (b in last), b
  assert not np.any(grad[:, 1])
