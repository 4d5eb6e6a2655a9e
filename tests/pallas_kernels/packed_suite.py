"""One suite for every backend of the packed matmuls: inputs by numpy, a float64 product, the bars.

A backend is a function with the arguments of `matmul_xla`.
"""

import jax
import jax.numpy as jnp
import numpy as np

RANGES = {8: (-127, 127), 4: (-8, 7), 2: (-1, 1)}


def pack(codes_KN, bits: int):
  """Bytes one code at a time: input k goes to byte k // f, shifted by bits * (k % f)."""
  per_byte, low = 8 // bits, RANGES[bits][0]
  K, N = codes_KN.shape
  packed = np.zeros((-(-K // per_byte), N), np.uint8)
  for k in range(K):
    packed[k // per_byte] |= ((codes_KN[k] - low) << (bits * (k % per_byte))).astype(np.uint8)
  return packed


def inputs(case, bits: int, dtype=jnp.float32, scale_dtype=jnp.float32):
  """(x, codes, scale, zero or None) as arrays and the float64 kernel that they stand for."""
  rng = np.random.default_rng(case.num_in + case.num_out)
  K, N = case.num_in, case.num_out
  g = K if case.group_size == -1 else case.group_size
  low, high = RANGES[bits]
  codes = rng.integers(low, high + 1, (K, N))
  scale = jnp.asarray(rng.uniform(0.5, 2.0, (K // g, N)) / 8 / np.sqrt(K), scale_dtype)
  zero = rng.integers(-3, 4, (K // g, N)).astype(np.int8) if case.has_zero else None
  shifted = codes - (0 if zero is None else np.repeat(zero.astype(np.int64), g, axis=0))
  w = shifted * np.repeat(np.asarray(scale.astype(jnp.float32), np.float64), g, axis=0)
  x = jnp.asarray(rng.normal(size=(case.rows, K)), dtype)
  return (x, jnp.asarray(pack(codes, bits)), scale, None if zero is None else jnp.asarray(zero)), w


def check_wide(backend, case, bits: int, bar: float = 2**-9):
  """bfloat16 inputs, float32 results: nothing is rounded behind the sum."""
  arrays, w = inputs(case, bits, jnp.bfloat16)
  code = dict(bits=bits, low=RANGES[bits][0], out_dtype=jnp.dtype(jnp.float32))
  found = jax.jit(lambda *a: backend(*a, **code))(*arrays)
  exact = np.asarray(arrays[0].astype(jnp.float32), np.float64) @ w
  assert found.dtype == jnp.float32
  # Kernels that scale weights before the product round them once.
  assert np.abs(found - exact).max() < bar * np.abs(exact).max()
  return found


def check(backend, case, bits: int, dtype=jnp.float32):
  """float32: 1e-5. bf16: twice the error of the plain product in bf16, + 1e-3 (style.md 2.8)."""
  arrays, w = inputs(case, bits, dtype)
  found = jax.jit(lambda *a: backend(*a, bits=bits, low=RANGES[bits][0]))(*arrays)
  assert found.dtype == dtype and found.shape == (case.rows, case.num_out)
  found = np.asarray(found.astype(jnp.float32))
  exact = np.asarray(arrays[0].astype(jnp.float32), np.float64) @ w
  if dtype == jnp.float32:
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
  else:
    plain = np.asarray((arrays[0] @ jnp.asarray(w, dtype)).astype(jnp.float32))
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - exact).max() + 1e-3
