"""Attention of few queries against its formula in float64, with heads joined and not."""

import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.nn import attention


@pytest.mark.parametrize(
  "T,N,K", [(1, 6, 3), (1, 4, 4), (4, 8, 4), (5, 8, 4), (16, 2, 1), (17, 2, 1)]
)
def test_equals_softmax_by_head(T, N, K):
  B, S, H, scale = 2, 23, 8, 0.3
  rng = np.random.default_rng(T)
  q, k, v = (rng.normal(size=(B, n, h, H)) for n, h in ((T, N), (S, K), (S, K)))
  mask = rng.random((B, T, S)) < 0.6
  mask[:, :, 0] = True
  expected = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    head = n // (N // K)
    z = np.where(mask[b, t], scale * (k[b, :, head] @ q[b, t, n]), -np.inf)
    p = np.exp(z - z.max())
    expected[b, t, n] = p @ v[b, :, head] / p.sum()
  args = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  out = attention.attend_masked(*args, jnp.asarray(mask), scale)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_the_cases_above_lie_on_both_sides():
  assert 4 * 4 == attention.MAX_JOINED < 5 * 4 and 16 <= attention.MAX_JOINED < 17
