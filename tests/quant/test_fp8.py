"""FP8 block-wise matmul (quantization.md 9) against numpy and against the unquantised gradient."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from minicpm_jax.config import FP8Config, MeshConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.quant import fp8
from pallas_kernels.common import spec

RNG = np.random.default_rng(0)
CFG, TENSOR = FP8Config(), FP8Config(granularity="tensor")


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def error(found, expected):
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def blocks_in_numpy(x, row_block, col_block):
  """Values after block quantisation, one block at a time with ml_dtypes' cast."""
  out = np.zeros(x.shape)
  for i in range(0, x.shape[0], row_block):
    for j in range(0, x.shape[1], col_block):
      part = x[i : i + row_block, j : j + col_block]
      s = np.float32(np.abs(part).max() * np.float32(1 / 448)) or np.float32(1)
      q = np.clip(part / s, -448, 448).astype(ml_dtypes.float8_e4m3fn)
      out[i : i + row_block, j : j + col_block] = q.astype(np.float32) * s
  return out


def linear_of(x, w, cfg):
  """`linear` of float weights: their codes once, as a train step makes them."""
  codes = fp8.quantize_blocks(jax.lax.stop_gradient(jnp.asarray(w)), cfg)
  return fp8.linear(jnp.asarray(x), jnp.asarray(w), *codes, cfg)


@pytest.mark.parametrize("M, K, N", [(8, 256, 128), (5, 200, 130)], ids=["whole", "edges"])
def test_forward_and_gradients_against_numpy(M, K, N):
  x, w, dy = normal(M, K), normal(K, N), normal(M, N)

  @jax.jit
  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: linear_of(x, w, CFG), x, w)
    return y, *pull(dy)

  y, dx, dw = run(x, w, dy)
  wq = blocks_in_numpy(w, 128, 128)
  np.testing.assert_allclose(y, blocks_in_numpy(x, 1, 128) @ wq, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dx, blocks_in_numpy(dy, 1, 128) @ wq.T, rtol=1e-5, atol=1e-4)
  low = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, dy)]
  np.testing.assert_allclose(dw, low[0].T @ low[1], rtol=1e-5, atol=1e-5)  # nothing quantised
  for found, plain in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
    cosine = np.vdot(found, plain) / np.linalg.norm(found) / np.linalg.norm(plain)
    assert cosine >= 0.999


def test_outliers_stay_in_their_block():
  """One outlier row in 64: the other rows keep 3.7% noise, with one scale a tensor they do not."""
  others, base, w = np.arange(64) != 7, normal(64, 512), normal(512, 256)

  def noise(cfg, outlier):
    x = base.copy()
    x[7] *= outlier
    y = np.asarray(jax.jit(linear_of, static_argnums=2)(x, w, cfg))
    assert np.all(np.isfinite(y))
    return error(y[others], (x @ w)[others])

  assert noise(CFG, 3e4) <= 0.045 and noise(CFG, 1e6) <= 0.045
  assert noise(TENSOR, 3e4) >= 3 * noise(CFG, 3e4)


@pytest.mark.parametrize("cfg", [CFG, TENSOR], ids=["block", "tensor"])
def test_no_rows_give_no_rows(cfg):
  found, pull = jax.vjp(lambda x, w: linear_of(x, w, cfg), jnp.zeros((0, 130)), normal(130, 3))
  assert found.shape == (0, 3)
  np.testing.assert_array_equal(pull(found)[1], np.zeros((130, 3)))


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("is_power", [False, True])
def test_values_that_are_not_finite_stay_seen(value, is_power):
  x = normal(2, 128)
  x[0, 3] = value
  codes, scale = fp8.quantize_rows(jnp.asarray(x), FP8Config(power_of_two_scales=is_power))
  found = np.asarray(codes, np.float32) * np.asarray(scale)
  assert not np.isfinite(found[0]).all() and np.isfinite(found[1]).all()


def test_zeros_powers_of_two_and_e5m2():
  q, s = fp8.quantize_rows(jnp.zeros((2, 130)), CFG)
  np.testing.assert_array_equal(s, 1)
  np.testing.assert_array_equal(q.astype(jnp.float32), 0)
  x = jnp.asarray(normal(4, 256))
  _, s = fp8.quantize_rows(x, FP8Config(power_of_two_scales=True))
  np.testing.assert_array_equal(np.log2(s) % 1, 0)
  exact = 2.0 ** np.arange(-100, 100, dtype=np.float32)
  for name, largest in (("e4m3", 448), ("e5m2", 57344)):
    cfg = FP8Config(power_of_two_scales=True, format=name)
    for call in (fp8.scale_of, jax.jit(fp8.scale_of, static_argnums=1)):
      np.testing.assert_array_equal(call(jnp.asarray(largest * exact), cfg), exact)
      np.testing.assert_array_equal(call(jnp.asarray(largest * 1.01 * exact), cfg), 2 * exact)
  q, s = fp8.quantize_rows(x, FP8Config(format="e5m2"))
  assert q.dtype == jnp.float8_e5m2 and 0.03 < error(fp8.dequantize_rows(q, s), x) < 0.12


def test_every_device_multiplies_its_own_rows_and_gradients_are_those_of_one():
  """dp 2 x fsdp 4: kernels see 2 of 16 rows; 12 rows, or tp: the XLA form on the whole."""
  w = jnp.asarray(normal(256, 130))
  seen = []

  def recorded(op, implementation, servers):
    seen.append((implementation, jax.typeof(servers["xla"]()).shape[0]))
    return servers["xla"]()

  @jax.jit
  def run(x, w):
    y, pull = jax.vjp(lambda x, w: linear_of(x, w, CFG), x, w)
    return y, *pull(y)

  for rows, sizes, expected in (
    (16, MeshConfig(dp=2, fsdp=4), ("auto", 2)),
    (12, MeshConfig(dp=2, fsdp=4), ("xla", 12)),
    (16, MeshConfig(fsdp=4, tp=2), ("xla", 16)),
  ):
    x = jnp.asarray(normal(rows, 256))
    one = run(x, w)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh_lib.make_mesh(sizes)):
      patch.setattr(spec, "dispatch", recorded)
      found = run(x, w)
    for a, b in zip(found, one, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))
    assert seen == [expected, expected]  # forward, input gradient
    seen.clear()


@pytest.mark.parametrize("cfg", [CFG, FP8Config(power_of_two_scales=True)], ids=["f32", "pow2"])
@pytest.mark.parametrize("size", [1e-35, 1e-36, 1e-37, 1e-39])
def test_tiny_gradients_beside_zeros_are_finite(cfg, size):
  x = np.zeros((3, 256), np.float32)
  x[0, 5], x[1, 130:] = size, size
  rows, w = fp8.quantize_rows(x, cfg), fp8.quantize_blocks(x.T, cfg)
  for found in (fp8.dequantize_rows(*rows), fp8.dequantize_blocks(*w).T):
    np.testing.assert_allclose(found, x, atol=1e-35)
