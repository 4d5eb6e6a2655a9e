"""Block packers: the gguf package's bytes, golden bytes worked out by hand, exact ternary rows."""

import numpy as np
import pytest

from minicpm_jax.quant import gguf_types

KINDS = ["q8_0", "q4_0", "q4_1", "tq1_0", "tq2_0"]


def ternary(rng, rows, width, group):
  """Codes times a float16 scale for every `group` values (whole rows for -1)."""
  group = width if group == -1 else group
  scale = rng.uniform(0.5, 2.0, (rows, width // group)).astype(np.float16).astype(np.float32)
  codes = rng.integers(-1, 2, (rows, width)).astype(np.float32)
  return codes * np.repeat(scale, group, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_values_are_those_of_the_gguf_package(kind):
  gguf = pytest.importorskip("gguf")
  rng = np.random.default_rng(0)
  qtype = getattr(gguf.GGMLQuantizationType, kind.upper())
  assert gguf.GGML_QUANT_SIZES[qtype] == gguf_types.TYPES[kind][1:]
  for i in range(100):
    x = rng.normal(0, 10.0 ** rng.integers(-3, 3), (int(rng.integers(1, 5)), 256 * (1 + i % 3)))
    x = x.astype(np.float32)
    if i % 4 == 1:
      x = np.round(x * 2) / 2  # exact halves of the scale's multiples, zeros
    if i % 4 == 2:
      x = ternary(rng, 3, 512, 256)
    if i % 10 == 3:
      x[0] = 0
    packed = gguf_types.pack(x, kind)
    np.testing.assert_array_equal(packed, gguf.quantize(x, qtype))
    np.testing.assert_array_equal(gguf_types.unpack(packed, kind), gguf.dequantize(packed, qtype))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_floats(kind):
  gguf = pytest.importorskip("gguf")
  x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
  qtype = getattr(gguf.GGMLQuantizationType, kind.upper())
  theirs = gguf.quantize(x, qtype)
  packed = gguf_types.pack(x, kind)
  np.testing.assert_array_equal(packed, theirs.view(np.uint8))
  np.testing.assert_array_equal(gguf_types.unpack(packed, kind), gguf.dequantize(theirs, qtype))


def test_golden_bytes():
  """All-zero blocks: 0x55 (codes 1 in four fields), 128 (five digits 1; 127 for qh, whose fifth
  digit is 0: ceil(120 * 256 / 243)); digits 2,2,1,0,2 give 240."""
  zero = np.zeros((1, 256), np.float32)
  assert set(gguf_types.pack(zero, "tq2_0")[0, :64]) == {0x55}
  assert gguf_types.pack(zero, "tq1_0")[0].tolist() == [128] * 48 + [127] * 4 + [0, 0]
  x = zero.copy()
  for j, code in enumerate([2, 2, 1, 0, 2]):
    x[0, 7 + 32 * j] = code - 1
  assert gguf_types.pack(x, "tq1_0")[0, 7] == 240
  assert gguf_types.pack(np.zeros((1, 64), np.float32), "q2_0")[0].tolist() == [0, 0] + [0x55] * 16
  x = np.zeros((1, 64), np.float32)
  x[0, 4:8] = [-0.5, 0.0, 0.5, -0.5]  # byte 1: codes 0, 1, 2, 0, low bits first
  raw = gguf_types.pack(x, "q2_0")[0]
  assert raw[3] == (0 | 1 << 2 | 2 << 4 | 0 << 6)
  assert raw[:2].view(np.float16)[0] == 0.5


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize(
  "group, low, high", [(-1, 0, 0), (256, 0, 0), (512, 0, 0), (128, 4, 9), (64, 9, 17), (32, 15, 28)]
)
def test_ternary_groups(kind, group, low, high):
  """Exact where a block shares one scale; below 256 the stated relative errors (6, 13, 22 %)."""
  rng = np.random.default_rng(1)
  width = 1024
  w = rng.normal(size=(64, width)).astype(np.float32)
  size = width if group == -1 else group
  scale = np.abs(w.reshape(64, -1, size)).mean(-1).astype(np.float16).astype(np.float32)
  scale = np.repeat(scale, size, axis=1)
  fused = np.clip(np.round(w / scale), -1, 1) * scale
  back = gguf_types.unpack(gguf_types.pack(fused, kind), kind)
  error = 100 * np.linalg.norm(back - fused) / np.linalg.norm(fused)
  assert low <= error <= high


def test_q2_0_is_exact_for_groups_of_64_and_reads_code_3():
  x = ternary(np.random.default_rng(2), 8, 256, 64)
  packed = gguf_types.pack(x, "q2_0")
  assert packed.shape == (8, 4 * 18)
  np.testing.assert_array_equal(gguf_types.unpack(packed, "q2_0"), x)
  raw = np.concatenate([np.float16([2.0]).view(np.uint8), np.full(16, 0b11100100, np.uint8)])
  np.testing.assert_array_equal(gguf_types.unpack(raw, "q2_0")[:4], [-2.0, 0.0, 2.0, 4.0])


@pytest.mark.parametrize(
  "x, kind, match",
  [
    (np.zeros((2, 100)), "q4_0", "found rows of 100 values, expected a multiple of the block, 32"),
    (np.zeros((2, 128)), "tq2_0", "multiple of the block, 256"),
    (np.full((1, 32), np.nan), "q8_0", "inf or nan"),
    (np.full((1, 32), 1e5), "q4_1", "float16"),
    (np.full((1, 32), 1e5), "f16", "what the type can hold"),
    (np.zeros((1, 32)), "q9_9", "GGUF type: found 'q9_9'"),
  ],
)
def test_bad_input(x, kind, match):
  with pytest.raises(ValueError, match=match):
    gguf_types.pack(x.astype(np.float32), kind)


def test_bad_bytes():
  with pytest.raises(ValueError, match="q4_0: found code 16, expected 0..15"):
    gguf_types.pack_q4_0(np.full((1, 32), 16, np.uint8), np.ones((1, 1), np.float32))
  with pytest.raises(ValueError, match="found rows of 17 bytes"):
    gguf_types.unpack(np.zeros((1, 17), np.uint8), "q4_0")
