"""Rotations: Hadamard matrices by definition, the same function, flatter weights."""

import jax
import numpy as np
import pytest

from minicpm_jax.config import QuantConfig
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import rotate
from tests.models import common


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 28, 36, 52, 60, 64, 100, 128, 244, 576, 1536])
def test_hadamard(width):
  h = rotate.hadamard(width)
  assert set(np.unique(h)) <= {-1.0, 1.0}
  np.testing.assert_array_equal(h @ h.T, width * np.eye(width))


@pytest.mark.parametrize("width", [6, 36, 33])
def test_rotations_are_orthogonal_and_repeatable(width):
  assert (rotate.hadamard(width) is None) == (width != 36)
  r = rotate.rotation(width, 3)
  np.testing.assert_allclose(r @ r.T, np.eye(width), atol=1e-12)
  np.testing.assert_array_equal(r, rotate.rotation(width, 3))
  assert np.any(r != rotate.rotation(width, 4))


@pytest.mark.parametrize("name", ["minicpm4_0p5b", "minicpm4_8b", "minicpm_moe_8x2b"])
@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "list"])
def test_logits_stay(name, scan):
  model, params = common.build(common.config(name, num_layers=2))
  cfg = model.cfg
  if not scan:
    cfg, params = convert.unstack_layers(cfg, params)
  turned, rotated = rotate.rotate(cfg, params, seed=1)
  assert not turned.tie_embeddings
  tokens = common.tokens((2, 12))
  before = common.apply(transformer.Transformer(cfg), params, tokens)
  after = common.apply(transformer.Transformer(turned), rotated, tokens)
  np.testing.assert_allclose(after.logits, before.logits, atol=2e-5, rtol=1e-4)
  plain = np.asarray(after.hidden) @ rotate.draft_features(cfg, params, seed=1)
  np.testing.assert_allclose(plain, before.hidden, atol=2e-5, rtol=1e-4)


def test_logits_stay_in_float64():
  with jax.enable_x64(True):
    model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, "float64"), params)
    turned, rotated = rotate.rotate(model.cfg, params)
    key = params["layers"]["attn"]["v"]["kernel"]
    assert rotated["layers"]["attn"]["v"]["kernel"].dtype == key.dtype == "float64"
  # R1 and R2 undone on the kernels: float64 to 1e-12 (the forward itself computes in float32).
  r1, r2 = rotate.rotation(32, 0), rotate.rotation(8, 0, 2)
  o = np.asarray(rotated["layers"]["attn"]["o"]["kernel"])
  back = np.einsum("ij,lnjd,ed->lnie", r2, o, r1)
  np.testing.assert_allclose(back, params["layers"]["attn"]["o"]["kernel"], atol=1e-12)


def test_outlier_channels_are_spread():
  """Kurtosis of the readers' weights falls where one channel of the stream is large."""
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
  up = np.array(params["layers"]["mlp"]["up"]["kernel"])
  up[:, 5] *= 20
  layers = params["layers"]
  mlp = {**layers["mlp"], "up": {"kernel": jax.numpy.asarray(up)}}
  params = {**params, "layers": {**layers, "mlp": mlp}}
  _, rotated = rotate.rotate(model.cfg, params)

  def kurtosis(x):
    x = np.asarray(x).ravel() - np.mean(x)
    return np.mean(x**4) / np.mean(x**2) ** 2

  assert kurtosis(rotated["layers"]["mlp"]["up"]["kernel"]) < 0.3 * kurtosis(up)


def test_refusals():
  mla = common.config("minicpm3_4b")
  with pytest.raises(ValueError, match="model.mla: found latent attention"):
    rotate.rotate(mla, {})
  latent = common.config(quant=QuantConfig(scheme="ternary"))
  with pytest.raises(ValueError, match="model.quant: found latent weights of scheme 'ternary'"):
    rotate.rotate(latent, {})
