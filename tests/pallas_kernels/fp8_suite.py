"""One suite for every backend of the FP8 product: inputs by numpy, a float64 sum over blocks.

A backend is a function with the arguments of `matmul_ref`.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BLOCK = 128


def inputs(case, dtype=jnp.float8_e4m3fn):
  """(xq, xs, wq, ws): values over the whole range of the type, scales over a factor of 16."""
  rng = np.random.default_rng(case.num_in + case.num_out)
  M, K, N = case.rows, case.num_in, case.num_out
  Q, P = -(-K // BLOCK), -(-N // BLOCK)
  limit = float(ml_dtypes.finfo(dtype).max) if dtype == jnp.float8_e4m3fn else 448.0

  def codes(*shape):
    return np.clip(rng.normal(size=shape) * limit / 4, -limit, limit).astype(dtype)

  def scales(*shape):
    return (2 ** rng.uniform(-2, 2, shape) * 4 / limit / K**0.25).astype(np.float32)

  return codes(M, K), scales(M, Q), codes(K, N), scales(Q, P)


def product(xq, xs, wq, ws):
  """Output by output column block, input block by input block, in float64."""
  y = np.zeros((xq.shape[0], wq.shape[1]))
  for q in range(ws.shape[0]):
    for p in range(ws.shape[1]):
      k, n = slice(q * BLOCK, (q + 1) * BLOCK), slice(p * BLOCK, (p + 1) * BLOCK)
      part = xq[:, k].astype(np.float64) @ wq[k, n].astype(np.float64)
      y[:, n] += xs[:, q, None].astype(np.float64) * np.float64(ws[q, p]) * part
  return y


def check(backend, case, dtype=jnp.float8_e4m3fn, out_dtype=jnp.float32, tolerance=1e-5):
  """`tolerance` relative, and of outputs of size 1; bf16 outputs also round by 2^-8."""
  arrays = inputs(case, dtype)
  found = jax.jit(lambda *a: backend(*a, out_dtype))(*map(jnp.asarray, arrays))
  assert found.dtype == out_dtype and found.shape == (case.rows, case.num_out)
  rtol = max(tolerance, 2**-8 if out_dtype == jnp.bfloat16 else 0)
  found, expected = np.asarray(found.astype(jnp.float32)), product(*arrays)
  assert 0.1 < np.std(expected) < 1000
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=tolerance * np.std(expected) * 2)
