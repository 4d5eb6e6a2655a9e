"""Norm, activations and head against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from minicpm_jax.nn import functional

rng = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_rms_norm_rounds_before_the_weight(dtype):
  """y = dtype(x / rms(x)) * w in x's dtype: exact in bf16 only with this order of casts."""
  x, w = rng.normal(size=(5, 16)).astype(dtype), rng.normal(size=16).astype(np.float32)
  x64 = x.astype(np.float64)
  normed = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-5)
  expected = (normed.astype(dtype) * w.astype(dtype)).astype(np.float64)
  found = functional.rms_norm(jnp.asarray(x), jnp.asarray(w), 1e-5)
  assert found.dtype == dtype
  rtol = 1e-6 if dtype == np.float32 else 0
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_gradient_of_rms_norm(dtype):
  """Against the equation in float64; of bf16 inputs no float32 copy waits for the backward pass."""
  x, w, dy = (rng.normal(size=s).astype(dtype) for s in ((5, 16), (16,), (5, 16)))
  _, pull = jax.vjp(lambda x, w: functional.rms_norm(x, w, 1e-5), jnp.asarray(x), jnp.asarray(w))
  if dtype != np.float32:
    assert not any(r.shape == x.shape and r.dtype == jnp.float32 for r in jax.tree.leaves(pull))
  x64, w64, dy64 = (a.astype(np.float64) for a in (x, w, dy))
  inverse = 1 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-5)
  dn = dy64 * w64
  dx = inverse * (dn - x64 * inverse**2 * np.mean(dn * x64, axis=-1, keepdims=True))
  found = [np.asarray(g, np.float64) for g in pull(jnp.asarray(dy))]
  tolerance = 1e-5 if dtype == np.float32 else 0.04
  np.testing.assert_allclose(found[0], dx, atol=tolerance, rtol=tolerance)
  np.testing.assert_allclose(found[1], (dy64 * x64 * inverse).sum(0), atol=2 * tolerance)


def test_fatrelu_is_strict():
  x = jnp.asarray([-1.0, 0.02, 0.03, 0.031, 2.0], jnp.float32)
  found = functional.activation(x, "fatrelu", 0.03)
  np.testing.assert_array_equal(found, np.asarray([0.0, 0.0, 0.0, 0.031, 2.0], np.float32))


def test_silu_gate():
  gate, up = rng.normal(size=(2, 7)).astype(np.float32), rng.normal(size=(2, 7)).astype(np.float32)
  expected = gate / (1 + np.exp(-gate)) * up
  found = functional.gated(jnp.asarray(gate), jnp.asarray(up), "silu")
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
def test_head_divides_the_hidden_state_and_returns_float32(is_tied):
  hidden = rng.normal(size=(1, 3, 8)).astype(ml_dtypes.bfloat16)
  head = rng.normal(size=(11, 8) if is_tied else (8, 11)).astype(ml_dtypes.bfloat16)
  divided = (hidden / ml_dtypes.bfloat16(9)).astype(np.float64)  # rounds to bf16 first
  expected = divided @ (head.T if is_tied else head).astype(np.float64)
  found = functional.unembed(jnp.asarray(hidden), jnp.asarray(head), 9.0, is_tied=is_tied)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-5)
