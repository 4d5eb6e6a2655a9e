"""RoPE tables and factor lists against complex numbers, the specification's values and files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.config import RopeConfig
from minicpm_jax.nn import rope

HALF = 4


@pytest.mark.smoke
@pytest.mark.parametrize(
  "family, extension, samples, tolerance",
  [
    ("minicpm3_4b", 1, {0: 1.0591234137867171, 15: 16.940876586213285}, 1e-9),
    ("minicpm4_0p5b", 1, {0: 1.0004360675811768, 31: 49.85338592529297}, 1e-5),
    ("minicpm4_8b", 1, {0: 0.9977997200264581, 63: 31.02392307921529}, 1e-9),
    ("minicpm4p1_8b", 1, {0: 0.9982316082870437}, 1e-9),
    (
      "minicpm4_8b",
      4,
      {
        21: 4.752651957515948,
        31: 22.417131025031697,
        45: 103.57086856690864,
        63: 124.09569231686116,
      },
      1e-9,
    ),
    (
      "minicpm4p1_8b",
      2,
      {21: 8.6357018163639, 45: 112.82253283014026, 63: 126.01712561287873},
      1e-9,
    ),
  ],
)
def test_longrope_factors_have_the_released_values(family, extension, samples, tolerance):
  factors = rope.longrope_factors(family, extension=extension)
  for index, expected in samples.items():
    assert factors[index] == pytest.approx(expected, abs=tolerance)


def test_an_extension_below_1_is_refused():
  for extension in (0, 0.5, float("nan")):
    with pytest.raises(ValueError, match=f"extension: found {extension}, expected a number >= 1"):
      rope.longrope_factors("minicpm4_8b", extension=extension)


def test_longrope_factors_equal_the_released_config(shared_dir):
  path = shared_dir / "models/minicpm4-0.5b-tokenizer/config.json"
  released = json.loads(path.read_text())["rope_scaling"]["long_factor"]
  np.testing.assert_allclose(rope.longrope_factors("minicpm4_0p5b"), released, atol=1e-5)


def turn(x, angles):
  """The half rotation as multiplication of x_i + j x_{i + H/2} by exp(j angle), float64."""
  z = (x[..., :HALF] + 1j * x[..., HALF:]) * np.exp(1j * angles)[:, :, None, :]
  return np.concatenate((z.real, z.imag), axis=-1)


THETA = 10000.0 ** (-2 * np.arange(HALF) / (2 * HALF))
SHORT, LONG = (1.0, 1.1, 1.3, 1.7), (1.0, 2.0, 3.5, 6.0)
LONGROPE = RopeConfig(
  kind="longrope", short_factor=SHORT, long_factor=LONG, original_max_position=32
)
# theta' of models.md 3.4 for n = 50 positions and a window of 32.
THETA_NTK = (10000.0 * (4 * 50 / 32 - 3) ** (8 / 6)) ** (-2 * np.arange(HALF) / (2 * HALF))


@pytest.mark.parametrize(
  "config, max_position, last, inv_freq, m",
  [
    (RopeConfig(), 32, 49, THETA, 1.0),
    (RopeConfig(kind="linear", factor=4.0), 32, 49, THETA / 4, 1.0),
    (RopeConfig(kind="dynamic", factor=4.0), 32, 31, THETA, 1.0),
    (RopeConfig(kind="dynamic", factor=4.0), 32, 49, THETA_NTK, 1.0),
    (LONGROPE, 32, 31, THETA / SHORT, 1.0),
    (LONGROPE, 32, 32, THETA / LONG, 1.0),
    (LONGROPE, 64, 32, THETA / LONG, np.sqrt(1 + np.log(2) / np.log(32))),
  ],
  ids=["none", "linear", "dynamic-in", "dynamic-beyond", "short", "long", "long-m"],
)
def test_rotation_equals_complex_multiplication(config, max_position, last, inv_freq, m):
  positions_BT = np.array([[0, 1, 2, last], [3, 5, 7, 11]])
  x = np.random.default_rng(0).normal(size=(2, 4, 3, 2 * HALF))
  tables = rope.tables(config, 2 * HALF, max_position, jnp.asarray(positions_BT))
  found = rope.apply_rope(jnp.asarray(x, jnp.float32), tables)
  expected = m * turn(x, positions_BT[:, :, None] * inv_freq)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_given_length_scales_like_the_largest_position():
  """The static bucket of cached decoding and the traced length agree."""
  config = RopeConfig(kind="dynamic", factor=4.0)
  positions_BT = jnp.arange(50)[None]
  traced = rope.tables(config, 8, 32, positions_BT)
  static = rope.tables(config, 8, 32, positions_BT[:, :10], 50)
  np.testing.assert_array_equal(traced.cos[:, :10], static.cos)
  assert not np.allclose(rope.tables(config, 8, 32, positions_BT[:, :10]).cos, static.cos)


def test_published_128k_theta():
  """MiniCPM-2B-128k at 131072 tokens: theta' = 1e6 * 5^(64/62) = 5.27e6 (models.md 3.4)."""
  config = RopeConfig(kind="dynamic", theta=1e6, factor=4.0)
  _, inv_freq = rope.frequencies(config, 64, 65536, 131072)
  theta = float(inv_freq[1]) ** (-64 / 2)
  assert theta == pytest.approx(1e6 * 5 ** (64 / 62), rel=1e-4)


def test_long_positions_follow_the_float32_order_of_the_released_code():
  """(p / lambda) rounds to float32 before the frequency is applied (models.md 3.5)."""
  config = RopeConfig(
    kind="longrope",
    short_factor=rope.longrope_factors("minicpm4_8b"),
    long_factor=rope.longrope_factors("minicpm4_8b"),
    original_max_position=32768,
  )
  position = np.float32(100_003)
  tables = rope.tables(config, 128, 32768, jnp.asarray([[100_003]]))
  inverse = np.asarray(1.0 / np.asarray(config.long_factor), np.float32)
  inv_freq = np.asarray(10000.0 ** (-np.arange(0, 128, 2) / 128), np.float32)
  angles = ((position * inverse) * inv_freq).astype(np.float64)
  np.testing.assert_allclose(tables.cos[0, 0, 0], np.cos(angles), atol=1e-6)
  exact = 100_003 / np.asarray(config.long_factor) * 10000.0 ** (-np.arange(0, 128, 2) / 128)
  np.testing.assert_allclose(tables.cos[0, 0, 0], np.cos(exact), atol=2e-2)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_packed_positions_restart_in_every_run(ids):
  expected, previous = [], None
  for segment in ids:
    expected.append(expected[-1] + 1 if segment == previous else 0)
    previous = segment
  assert rope.packed_positions(jnp.asarray([ids])).tolist() == [expected]
