"""GPTQ words and Marlin tiles against loops written from the format."""

import numpy as np
import pytest

from minicpm_jax.quant import gptq_format, marlin


def layer(seed=0, num_in=64, num_out=32, group=16, symmetric=False, act=False):
  rng = np.random.default_rng(seed)
  groups = num_in // group
  g_idx = np.arange(num_in) // group
  return gptq_format.Codes(
    rng.integers(0, 16, (num_in, num_out)).astype(np.uint8),
    rng.uniform(0.01, 0.1, (groups, num_out)).astype(np.float16),
    np.full((groups, num_out), 8, np.uint8)
    if symmetric
    else rng.integers(0, 16, (groups, num_out)).astype(np.uint8),
    (rng.permutation(g_idx) if act else g_idx).astype(np.int32),
  )


def decode(t, version, symmetric=False, group=16):
  return gptq_format.decode(t, version, group_size=group, is_symmetric=symmetric, name="q")


@pytest.mark.parametrize("version, added", [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("act", [False, True])
def test_values_by_the_formula(version, added, act):
  """Every weight picked out of the words in float64, one at a time, as the format says."""
  codes = layer(act=act)
  t = gptq_format.encode(codes, version)
  assert t.qweight.shape == (8, 32) and t.qzeros.shape == (4, 4) and t.qweight.dtype == np.int32
  assert np.any(t.qweight < 0)  # top codes >= 8
  for k in range(0, 64, 5):
    for n in range(32):
      code = (int(t.qweight[k // 8, n]) >> 4 * (k % 8)) & 15
      g = int(t.g_idx[k])
      zero = (((int(t.qzeros[g, n // 8]) >> 4 * (n % 8)) & 15) + added) & 15
      value = float(t.scales[g, n]) * (code - zero)
      wanted = float(codes.scale_QO[g, n]) * (
        int(codes.codes_IO[k, n]) - int(codes.zero_QO[codes.g_idx_I[k], n])
      )
      assert value == wanted
  for found, expected in zip(decode(t, version), codes, strict=True):
    np.testing.assert_array_equal(found, expected)


def test_constants_of_symmetric_files():
  codes = layer(symmetric=True)
  v1, v2 = (gptq_format.encode(codes, v).qzeros for v in gptq_format.VERSIONS)
  assert set(v1.ravel().tolist()) == {2004318071}
  assert set(v2.ravel().view(np.uint32).tolist()) == {0x88888888}
  decode(gptq_format.encode(codes, "gptq"), "gptq", symmetric=True)
  with pytest.raises(ValueError, match="q.qzeros: found word 0x77777777, expected 0x88888888"):
    decode(gptq_format.encode(codes, "gptq"), "gptq_v2", symmetric=True)


def test_bad_tensors():
  good = gptq_format.encode(layer(), "gptq")
  nan = good.scales.copy()
  nan[0, 0] = np.nan
  for change, match in (
    ({"scales": good.scales[:2]}, r"q.scales: found shape \(2, 32\), expected \(4, 32\)"),
    ({"scales": nan}, "q.scales: found inf or nan"),
    ({"g_idx": good.g_idx + 1}, "q.g_idx: found groups 1..4, expected 0..3"),
    ({"g_idx": good.g_idx * 0}, "q.g_idx: found 0 to 64 inputs a group, expected 16"),
    ({"qzeros": good.qzeros[:, :2]}, "q.qzeros: found shape"),
  ):
    with pytest.raises(ValueError, match=match):
      decode(good._replace(**change), "gptq")
  with pytest.raises(ValueError, match="found 64 inputs, expected a multiple of group_size 48"):
    decode(good, "gptq", group=48)
  with pytest.raises(ValueError, match="found 12 rows of codes, expected a multiple of 8"):
    gptq_format.pack_words(np.zeros((12, 4), np.uint8))
  with pytest.raises(ValueError, match="found code 16"):
    gptq_format.pack_words(np.full((8, 4), 16, np.uint8))
  with pytest.raises(ValueError, match="q.qzeros: found zero point 16, expected 0..15"):
    gptq_format.encode(layer()._replace(zero_QO=np.full((4, 32), 16, np.uint8)), "gptq", "q")


def test_marlin_round_trip_and_one_tile_by_hand():
  codes = np.random.default_rng(0).integers(0, 16, (64, 128)).astype(np.uint8)
  words = marlin.pack(codes)
  assert words.shape == (4, 256) and words.dtype == np.int32
  np.testing.assert_array_equal(marlin.unpack(words), codes)
  # The first word of the first run: i = j = 0, rows 0, 1, 8, 9 of columns 0 and 8 of tile 0,
  # in the order 0, 2, 4, 6, 1, 3, 5, 7 of (b, r).
  eight = [codes[r, c] for c in (0, 8) for r in (0, 1, 8, 9)]
  first = sum(int(eight[k]) << 4 * i for i, k in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
  assert int(words[0, 0]) & 0xFFFFFFFF == first
  # j = 1 is the next tile of 16 columns; i = 1 the rows 2, 3, 10, 11.
  eight = [codes[r, 16 + c] for c in (0, 8) for r in (0, 1, 8, 9)]
  second = sum(int(eight[k]) << 4 * i for i, k in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
  assert int(words[0, 1]) & 0xFFFFFFFF == second
  eight = [codes[r, c] for c in (0, 8) for r in (2, 3, 10, 11)]
  fifth = sum(int(eight[k]) << 4 * i for i, k in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
  assert int(words[0, 4]) & 0xFFFFFFFF == fifth


@pytest.mark.parametrize("groups", [1, 3])
def test_marlin_scales(groups):
  scale = np.arange(groups * 128, dtype=np.float16).reshape(groups, 128)
  stored = marlin.permute_scales(scale)
  np.testing.assert_array_equal(marlin.restore_scales(stored), scale)
  if groups == 1:
    assert stored[0, :8].tolist() == [0, 1, 8, 9, 16, 17, 24, 25]
    assert stored[0, 32:34].tolist() == [32, 33]
  else:
    assert stored[0, :9].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1]
    assert stored[0, 64] == 64


def test_marlin_shapes():
  with pytest.raises(ValueError, match="up: found a kernel of 64 inputs and 96 outputs"):
    marlin.pack(np.zeros((64, 96), np.uint8), "up")
