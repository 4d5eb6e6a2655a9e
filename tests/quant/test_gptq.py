"""The GPTQ solver against a float64 numpy oracle, and the P-GPTQ construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.quant import calib, gptq, qtensor
from tests.quant import gptq_oracle as oracle

SHAPES = [(96, 256, 128), (64, 192, 64), (40, 300, -1), (24, 96, 32), (130, 384, 96)]
OPTIONS = {
  "plain": {},
  "asym": {"sym": False},
  "act": {"act": True},
  "static": {"static": True},
  "act_static": {"act": True, "static": True},
  "act_asym": {"act": True, "sym": False},
  "bits3": {"bits": 3},
  "damp": {"damp": 0.1, "block": 64},
}


def config(*, bits=4, g=128, sym=True, act=False, static=False, damp=0.01, block=128, **more):
  return gptq.GPTQConfig(
    bits=bits, group_size=g, symmetric=sym, act_order=act, static_groups=static, damp=damp,
    block_size=block, **more,
  )  # fmt: skip


def check(solution, expected, atol):
  codes, scales, zeros, g_idx, out = expected
  np.testing.assert_array_equal(np.asarray(solution.codes_IO).T, codes)
  np.testing.assert_allclose(np.asarray(solution.scale_QO).T, scales, rtol=atol)
  np.testing.assert_array_equal(np.asarray(solution.zero_QO).T, zeros)
  np.testing.assert_array_equal(solution.g_idx_I, g_idx)
  np.testing.assert_allclose(np.asarray(gptq.dequantize(solution)).T, out, atol=10 * atol)


@pytest.mark.parametrize("rows, cols, g", SHAPES)
def test_codes_of_the_oracle_in_float32(rows, cols, g):
  w, x = oracle.correlated(np.random.default_rng(rows), rows, cols, 2 * cols)
  w[:, :: 128 if g == -1 else g] *= 0.5  # no maximum, an exact tie, where no error has come yet
  w = w.astype(np.float32)
  h = x.T @ x
  expected = oracle.gptq(w, h, g=g)
  solution = gptq.solve(jnp.asarray(w.T), jnp.asarray(h, jnp.float32), config(g=g))
  check(solution, expected, 1e-5)
  np.testing.assert_allclose(solution.error, oracle.error(expected[-1], w, x), rtol=1e-2)
  nearest = gptq.round_to_nearest(jnp.asarray(w.T), config(g=g), jnp.asarray(h, jnp.float32))
  assert solution.error < 0.9 * nearest.error


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_in_float64(option):
  rows, cols, g = (24, 192, 64) if option != "damp" else (24, 160, 32)
  w, x = oracle.correlated(np.random.default_rng(3), rows, cols, 500)
  w[:, ::g] *= 0.25  # not the maximum, an exact tie, behind the errors of earlier blocks either
  w[:, 7] = 100 * w[:, 7]
  x[:, 11] = 0  # a dead input
  w[5, 64:128] = 0  # an empty group
  h = x.T @ x
  expected = oracle.gptq(w, h, g=g, **OPTIONS[option])
  with jax.enable_x64(True):
    cfg = config(g=g, **OPTIONS[option])
    solution = gptq.solve(jnp.asarray(w.T), jnp.asarray(h), cfg)
    assert solution.scale_QO.dtype == jnp.float64
    check(solution, expected, 1e-9)
    scaled = gptq.solve(jnp.asarray(w.T), jnp.asarray(h / 7), cfg)
    np.testing.assert_array_equal(scaled.codes_IO, solution.codes_IO)
    leaf = gptq.to_qtensor(solution, cfg, (cols, 4, rows // 4))
    assert (leaf.zero is None) == cfg.symmetric
    assert (leaf.g_idx is None) == (not cfg.act_order or cfg.static_groups)
    value = np.asarray(qtensor.dequantize(leaf)).reshape(cols, rows).T
  np.testing.assert_allclose(value, expected[-1], rtol=1e-5, atol=1e-5)
  dead = np.asarray(solution.codes_IO)[11] - np.asarray(solution.zero_QO)[solution.g_idx_I[11]]
  assert not np.any(dead)


def test_identity_hessian_is_round_to_nearest():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(128, 32)), jnp.float32)
  for sym in (True, False):
    cfg = config(g=32, sym=sym)
    solved, nearest = gptq.solve(w, jnp.eye(128), cfg), gptq.round_to_nearest(w, cfg)
    for a, b in zip(solved[1:4], nearest[1:4], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)
    ratio = np.asarray(w) / np.asarray(solved.scale_QO)[solved.g_idx_I]
    is_tie = np.abs(ratio + 7.5) < 1e-4  # a symmetric group's maximum may get either neighbour
    codes = [np.where(is_tie, 0, np.asarray(s.codes_IO)) for s in (solved, nearest)]
    np.testing.assert_array_equal(*codes)
    assert is_tie.mean() < 0.02
    np.testing.assert_allclose(solved.error, nearest.error, rtol=1e-4)


def test_mse_is_the_best_of_eighty_ranges():
  w = np.random.default_rng(0).standard_t(3, size=(20, 64)).astype(np.float32)
  for sym in (True, False):
    solution = gptq.round_to_nearest(jnp.asarray(w.T), config(g=-1, sym=sym, mse=True))
    best = np.full(20, np.inf)
    scale0, zero0 = oracle.params(w.astype(np.float64), 4, sym)
    low = np.minimum(w.min(1), 0)
    for i in range(80):
      s = scale0 * (1 - i / 100)
      z = zero0 if sym else np.rint(-low * (1 - i / 100) / s)
      q = np.clip(np.rint(w / s[:, None]) + z[:, None], 0, 15)
      best = np.minimum(best, (np.abs(s[:, None] * (q - z[:, None]) - w) ** 2.4).sum(1))
    found = (np.abs(np.asarray(gptq.dequantize(solution)).T - w) ** 2.4).sum(1)
    np.testing.assert_allclose(found, best, rtol=1e-4)


def test_float16_scales_are_rounded_before_the_codes():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32)
  cfg = config(g=32, scale_dtype="f16")
  solution = gptq.solve(w, jnp.eye(64), cfg)
  half = np.asarray(solution.scale_QO).astype(np.float16)
  np.testing.assert_array_equal(half.astype(np.float32), solution.scale_QO)
  leaf = gptq.to_qtensor(solution, cfg, (64, 16))
  assert leaf.scale.dtype == jnp.float16
  np.testing.assert_array_equal(qtensor.dequantize(leaf), gptq.dequantize(solution))


def test_indefinite_hessians_get_more_damping_or_are_refused():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
  h = rng.normal(size=(32, 32))
  h = h @ h.T
  h -= 0.055 * np.trace(h) / 32 * np.eye(32)  # the least eigenvalue is below 0 at damp 0.01
  solution = gptq.solve(w, jnp.asarray(h, jnp.float32), config(g=32))
  assert 0.05 < float(solution.damp) < 0.08
  with pytest.raises(ValueError, match="q: found a Hessian or weights that are not finite"):
    gptq.solve(w, jnp.full((32, 32), jnp.nan), config(g=32), name="q")
  with pytest.raises(ValueError, match="stays indefinite"):
    gptq.solve(w, jnp.asarray(-10.0 * np.eye(32), jnp.float32), config(g=32))


def test_known_weights_may_meet_a_trace():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
  found = jax.jit(lambda: gptq.round_to_nearest(w, config(g=32)))()
  np.testing.assert_array_equal(found.codes_IO, gptq.round_to_nearest(w, config(g=32)).codes_IO)


def test_bad_input():
  w, h = jnp.ones((96, 4)), jnp.eye(96)
  with pytest.raises(ValueError, match="up: group_size: found 64, expected -1 or a divisor of 96"):
    gptq.solve(w, h, config(g=64), name="up")
  with pytest.raises(ValueError, match=r"hessian: found shape \(4, 4\), expected \(96, 96\)"):
    gptq.solve(w, jnp.eye(4), config(g=32))
  for name, bad in (("bits", 8), ("group_size", 0), ("damp", -1.0)):
    with pytest.raises(ValueError, match=f"gptq.{name}: found"):
      gptq.GPTQConfig(**{name: bad})
  for value in (jnp.nan, jnp.inf):
    for run in (gptq.round_to_nearest, lambda w, cfg, name: gptq.solve(w, h, cfg, name)):
      with pytest.raises(ValueError, match="up: found weights that are not finite"):
        run(w.at[3, 1].set(value), config(g=32), name="up")


# ------------------------------------------------------------------------------ calibration


def test_positions_restart_in_every_document():
  ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3, 3, 3]])
  assert calib.positions(ids).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], list(range(8))]
  kept = calib.keep_mask(ids, 2).tolist()
  assert kept == [[False, False, True, False, False, True, True, False], [False] * 2 + [True] * 6]
  assert calib.keep_mask(ids).sum() == 15
  with pytest.raises(ValueError, match="skip: found -1"):
    calib.keep_mask(ids, -1)


def test_hessians_stream_and_shard():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 16, 4, 8)).astype(np.float32)
  ids = jnp.asarray(np.repeat([[1] * 6 + [2] * 9 + [0]], 8, 0))
  keep = np.asarray(calib.keep_mask(ids, 4))
  x[0, 0, 0, 0] = np.nan  # a dropped token may be anything
  rows = x.reshape(8, 16, 32)[keep]
  expected = rows.T.astype(np.float64) @ rows
  h = calib.hessian_init(32)
  for i in range(0, 8, 2):
    h = calib.hessian_update(h, jnp.asarray(x[i : i + 2]), jnp.asarray(keep[i : i + 2]))
  np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-4)
  mesh = jax.make_mesh((8,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    shard = jax.NamedSharding(mesh, jax.P("dp"))
    put = [jax.device_put(a, shard) for a in (x, keep)]
    whole = jax.device_put(np.zeros((32, 32), np.float32), jax.NamedSharding(mesh, jax.P()))
    sharded = calib.hessian_update(whole, *put)
  assert sharded.sharding.is_fully_replicated and len(sharded.devices()) == 8
  np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-4)
  total, count = calib.abs_update((jnp.zeros(32), jnp.zeros(())), jnp.asarray(x), jnp.asarray(keep))
  np.testing.assert_allclose(total, np.abs(rows).sum(0), rtol=1e-5)
  assert count == len(rows)


def test_p_gptq_on_planted_outliers():
  """quantization.md 5.1: the first 4 positions are fixed vectors 10 times as large."""
  gains = []
  for seed in range(3):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(256, 64)).astype(np.float32)
    x = rng.normal(size=(32, 64, 256)) @ (np.eye(256) + 0.3 * rng.normal(size=(256, 256)) / 4)
    x[:, :4] = 10 * rng.normal(size=(4, 256))
    x = jnp.asarray(x, jnp.float32)
    ids = jnp.ones((32, 64), jnp.int32)
    later = calib.hessian_update(calib.hessian_init(256), x, calib.keep_mask(ids, 4))

    def error(skip, w=w, x=x, ids=ids, later=later):
      h = calib.hessian_update(calib.hessian_init(256), x, calib.keep_mask(ids, skip))
      solution = gptq.solve(jnp.asarray(w), h, config(g=128))
      return float(gptq.relative_error(gptq.dequantize(solution), jnp.asarray(w), later))

    gains.append(1 - error(4) / error(0))
    plain = calib.hessian_update(calib.hessian_init(256), x)
    zero = calib.hessian_update(calib.hessian_init(256), x, calib.keep_mask(ids, 0))
    np.testing.assert_array_equal(plain, zero)
  assert min(gains) > 0.03, gains


def test_bfloat16_weights_are_solved_as_float32():
  w, x = oracle.correlated(np.random.default_rng(5), 16, 128, 256)
  h, low = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(w.T, jnp.bfloat16)
  for solve in (gptq.solve, lambda w, h, cfg: gptq.round_to_nearest(w, cfg, h)):
    found, expected = solve(low, h, config()), solve(low.astype(jnp.float32), h, config())
    np.testing.assert_array_equal(found.codes_IO, expected.codes_IO)
    np.testing.assert_array_equal(found.scale_QO, expected.scale_QO)
    assert found.scale_QO.dtype == jnp.float32


def test_scales_beyond_float16_are_refused():
  w = jnp.full((16, 8), 6e5, jnp.float32)
  cfg = gptq.GPTQConfig(group_size=16, scale_dtype="f16")
  for run in (lambda: gptq.round_to_nearest(w, cfg), lambda: gptq.solve(w, jnp.eye(16), cfg)):
    with pytest.raises(ValueError, match="kernel: found weights up to 6e.05, expected group"):
      run()
  gptq.round_to_nearest(w, gptq.GPTQConfig(group_size=16))
  with pytest.raises(ValueError, match="kernel: found weights up to 6e.05, expected finite w"):
    qtensor.quantize(w, "int4", 16, scale_dtype=jnp.float16)
