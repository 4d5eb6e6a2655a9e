"""Cross entropy against float64, gradients against the plain form and the equation."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_ce import api, xla


def inputs(T=37, D=8, V=24, seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
  weight = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, V - 3, size=T), jnp.int32)
  mask = jnp.asarray(rng.integers(0, 3, size=T) / 2, jnp.float32)
  return hidden, weight, targets, mask


def by_hand(hidden, weight, targets, mask, *, divisor, z_loss, vocab_size):
  """(sums, d hidden, d weight) in float64 from the definition."""
  hidden, weight, mask = (np.asarray(x, np.float64) for x in (hidden, weight, mask))
  logits = hidden @ weight[:, :vocab_size] / divisor
  z = np.log(np.exp(logits).sum(-1))
  rows = np.arange(len(targets))
  loss = (mask * (z - logits[rows, targets] + z_loss * z**2)).sum()
  correct = (mask * (logits.argmax(-1) == np.asarray(targets))).sum()
  dlogits = np.exp(logits - z[:, None]) * (1 + 2 * z_loss * z)[:, None]
  dlogits[rows, targets] -= 1
  dlogits = np.pad(mask[:, None] * dlogits / divisor, [(0, 0), (0, weight.shape[1] - vocab_size)])
  return (loss, (mask * z_loss * z**2).sum(), correct), dlogits @ weight.T, hidden.T @ dlogits


def check(arguments, how, **options):
  hidden, weight, targets, mask = arguments

  def run(hidden, weight):
    sums = api.fused_cross_entropy(hidden, weight, targets, mask, **options, **how)
    return 3.0 * sums[0] + 7.0 * sums[1], sums

  (_, sums), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(hidden, weight)
  expected, dhidden, dweight = by_hand(*arguments, **options)
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(grads[0], 3 * dhidden, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(grads[1], 3 * dweight, rtol=1e-4, atol=1e-4)
  plain = jax.jit(lambda *a: api.fused_cross_entropy(*a, **options, **how))(*arguments)
  np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [None, 1, 8, 37, 64])
def test_loss_and_gradients_are_the_definition(chunk):
  how = {"implementation": "ref"} if chunk is None else {"config": xla.XlaConfig(chunk=chunk)}
  check(inputs(), how, divisor=2.5, z_loss=1e-2, vocab_size=21)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
  T=st.integers(1, 19),
  V=st.integers(4, 12),
  pad=st.integers(0, 2),
  chunk=st.integers(1, 8),
  z_loss=st.sampled_from([0.0, 0.1]),
  seed=st.integers(0, 99),
)
def test_any_shape(T, V, pad, chunk, z_loss, seed):
  arguments = inputs(T, 4, V, seed)
  vocab_size = V - min(pad, 3)
  how = {"config": xla.XlaConfig(chunk=chunk)}
  check(arguments, how, divisor=1.0, z_loss=z_loss, vocab_size=vocab_size)


@pytest.mark.parametrize("chunk", [None, 8, 64])
def test_loss_of_every_token(chunk):
  """With and without gradients; the weighted sum is the loss without z."""
  how = {"implementation": "ref"} if chunk is None else {"config": xla.XlaConfig(chunk=chunk)}
  hidden, weight, targets, mask = inputs()

  def run(hidden):
    more = dict(divisor=2.5, z_loss=1e-2, vocab_size=21, per_token=True)
    loss, z, _, nll_T = api.fused_cross_entropy(hidden, weight, targets, mask, **more, **how)
    return loss + 5 * jnp.sum(nll_T), (loss - z, nll_T)  # nothing flows back through nll_T

  one_by_one = []
  for t in range(len(targets)):
    only = (jnp.arange(len(targets)) == t).astype(jnp.float32)
    args = dict(divisor=2.5, z_loss=0.0, vocab_size=21)
    one_by_one.append(by_hand(hidden, weight, targets, only, **args)[0][0])
  (_, (_, found)), dhidden = jax.jit(jax.value_and_grad(run, has_aux=True))(hidden)
  sums, plain = jax.jit(lambda h: run(h)[1])(hidden)
  np.testing.assert_allclose(found, one_by_one, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(plain, one_by_one, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(sums, np.dot(mask, one_by_one), rtol=1e-5)
  expected = by_hand(hidden, weight, targets, mask, divisor=2.5, z_loss=1e-2, vocab_size=21)[1]
  np.testing.assert_allclose(dhidden, expected, rtol=1e-4, atol=1e-5)


def test_logits_are_never_held_whole():
  T, D, V = 4096, 16, 512
  hidden, weight, targets, mask = inputs(T, D, V)
  config = xla.XlaConfig(chunk=256)

  def loss(hidden, weight):
    return api.fused_cross_entropy(hidden, weight, targets, mask, config=config)[0]

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, weight).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < T * V * 4 / 2


@pytest.mark.parametrize("V", [73472, 4096, 130560])
def test_chunks_of_an_accelerator_divide_the_usual_batches(V, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  chunk = xla.default_config(V).chunk
  assert (8 * 32768) % chunk == 0 and 2**30 < 4 * V * chunk <= 2**31


def test_bf16_gradients_keep_the_dtype():
  hidden, weight, targets, mask = inputs(64, 16, 32)
  low = [x.astype(jnp.bfloat16) for x in (hidden, weight)]

  def gradients(implementation):
    def loss(hidden, weight):
      how = {"implementation": implementation}
      return api.fused_cross_entropy(hidden, weight, targets, mask, **how)[0]

    return jax.grad(loss, argnums=(0, 1))(*low)

  exact = by_hand(*low, targets, mask, divisor=1.0, z_loss=0.0, vocab_size=32)[1:]
  for ours, plain, true in zip(gradients("xla"), gradients("ref"), exact, strict=True):
    assert ours.dtype == jnp.bfloat16
    error = np.abs(np.asarray(ours, np.float64) - true).max()
    assert error <= 2 * np.abs(np.asarray(plain, np.float64) - true).max() + 1e-3
