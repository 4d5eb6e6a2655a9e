"""Ternary and int4: hand examples, the zero share, fused checkpoints recognised and recovered."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.ckpt import errors, hf_config, hf_qat
from minicpm_jax.config import QuantConfig
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import int4, leaf, qtensor, schemes, ternary
from tests.models import common

W_KN = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)


def test_absmean_by_hand():
  """[0.9, -0.2, 0.4, -1.7]: mean |W| = 0.8, W/s = 1.125, -0.25, 0.5 (half to even: 0), -2.125."""
  qt = ternary.quantize(jnp.asarray([[0.9], [-0.2], [0.4], [-1.7]]))
  np.testing.assert_array_equal(qt.codes[:, 0], [1, 0, 0, -1])
  np.testing.assert_allclose(qt.scale, [[0.8]], rtol=1e-6)
  zero = ternary.quantize(jnp.zeros((4, 2)))
  np.testing.assert_array_equal(zero.codes, 0)
  np.testing.assert_allclose(zero.scale, 1e-8)


def test_zero_share_of_a_gaussian_and_the_shrinking_second_pass():
  qt = ternary.quantize(jnp.asarray(W_KN))
  share = float(jnp.mean(qt.codes == 0))
  assert abs(share - 0.31) < 0.02  # P(|x| < 0.5 E|x|)
  again = ternary.quantize(qtensor.dequantize(qt))
  np.testing.assert_allclose(
    again.scale / qt.scale, 1 - np.mean(np.asarray(qt.codes) == 0, axis=0)[None], rtol=1e-4
  )


def test_gradient_is_the_identity_also_where_clipped():
  grad = jax.grad(lambda w: jnp.sum(ternary.fake(w, 64) * W_KN))(jnp.asarray(3 * W_KN))
  np.testing.assert_array_equal(grad, W_KN)
  grad = jax.grad(lambda w: jnp.sum(int4.fake(w, 64) * W_KN))(jnp.asarray(W_KN))
  np.testing.assert_array_equal(grad, W_KN)


@pytest.mark.parametrize("lib, g", [(ternary, -1), (ternary, 32), (int4, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_come_back_from_fused_weights(lib, g, dtype):
  qt = lib.quantize(jnp.asarray(W_KN), g, scale_dtype=jnp.float32)
  fused = qtensor.dequantize(qt, dtype)
  assert lib.fused_flag(fused, g, 1, 0) and not lib.fused_flag(jnp.asarray(W_KN), g, 1, 0)
  found = lib.recover(fused, g)
  np.testing.assert_array_equal(found.codes, qt.codes)
  np.testing.assert_allclose(found.scale, qt.scale, rtol=2**-7)
  with pytest.raises(ValueError, match="w: found .* expected fused"):
    lib.recover(jnp.asarray(W_KN), g, name="w")


@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_weights_of_every_code_book_are_told_from_latent_ones(scheme):
  for g in (-1, 32):
    cfg = QuantConfig(scheme=scheme, group_size=g)
    fused = qtensor.dequantize(qtensor.quantize(jnp.asarray(W_KN), scheme, g))
    for dtype in (jnp.float32, jnp.bfloat16):
      kernels = [{"mlp": {"up": {"kernel": w.astype(dtype)}}} for w in (jnp.asarray(W_KN), fused)]
      ternary.check_latent(cfg, kernels[0])
      with pytest.raises(ternary.FusedWeightsError, match="mlp/up/kernel: found weights that are"):
        ternary.check_latent(cfg, kernels[1])


def test_int4_scales_are_float16_and_fake_is_the_stored_model():
  w = jnp.asarray(W_KN)
  qt = int4.quantize(w, 128)
  assert qt.scale.dtype == jnp.float16
  np.testing.assert_array_equal(
    int4.fake(w, 128), qtensor.dequantize(qtensor.unpack(qtensor.pack(qt)))
  )
  peak = np.abs(W_KN.reshape(2, 128, 64)).max(axis=1)
  np.testing.assert_allclose(qt.scale, peak / 7.5, rtol=1e-3)


def test_scale_shards_of_row_parallel_kernels():
  cfg = QuantConfig(scheme="ternary", weights="codes", scale_shards=4)
  down = leaf.quantize_kernel(cfg, "layers/mlp/down/kernel", jnp.asarray(W_KN), num_in=1)
  np.testing.assert_allclose(down.scale, np.abs(W_KN.reshape(4, 64, 64)).mean(1), rtol=1e-5)
  up = leaf.quantize_kernel(cfg, "layers/mlp/up/kernel", jnp.asarray(W_KN), num_in=1)
  assert up.scale.shape == (1, 64)
  with pytest.raises(ValueError, match="layers/attn/o/kernel: quant.scale_shards: found 3"):
    three = dataclasses.replace(cfg, scale_shards=3)
    leaf.quantize_kernel(three, "layers/attn/o/kernel", jnp.asarray(W_KN), num_in=1)


@pytest.fixture(scope="module")
def latent():
  quant = QuantConfig(scheme="ternary", group_size=-1)
  return common.build(common.config("bitcpm4_0p5b", quant=quant))


def test_artefacts(latent, tmp_path):
  """Latent with its `qat` entry, fused without, codes: one function, three forms."""
  model, params = latent
  tokens_BT = common.tokens((2, 12))
  expected = common.apply(model, params, tokens_BT).logits
  ckpt.save_hf(tmp_path / "latent", model, params)
  loaded, again, _ = ckpt.load_hf(tmp_path / "latent")
  assert loaded.cfg.quant == model.cfg.quant
  jax.tree.map(np.testing.assert_array_equal, again, params)
  fused_cfg, fused = convert.fuse(model.cfg, params)
  fused_model = transformer.Transformer(fused_cfg)
  ckpt.save_hf(tmp_path / "fused", fused_model, fused)
  plain, values, _ = ckpt.load_hf(tmp_path / "fused")
  assert plain.cfg.quant is None
  jax.tree.map(np.testing.assert_array_equal, values, fused)
  codes_cfg, codes = convert.to_codes(model.cfg, params, "packed")
  found = common.apply(transformer.Transformer(codes_cfg), codes, tokens_BT).logits
  np.testing.assert_allclose(found, expected, atol=2e-5)
  # A fused checkpoint that claims to be latent is refused, naming the tensor.
  text = (tmp_path / "latent" / "config.json").read_text()
  (tmp_path / "fused" / "config.json").write_text(text)
  with pytest.raises(errors.CheckpointError, match="layers/attn/k/kernel: found weights that are"):
    ckpt.load_hf(tmp_path / "fused")


@pytest.mark.parametrize(
  "qat, message",
  [
    ({"type": "ternary"}, "qat.group_size: found None"),
    ({"type": "float2", "group_size": -1}, "qat.type: found 'float2'"),
    ({"type": "int4", "group_size": 0}, "qat.group_size: found 0"),
    ({"type": "int4", "group_size": 64, "bits": 4}, r"qat: found \['bits'\]"),
  ],
)
def test_bad_qat_entries(latent, qat, message):
  hf = hf_config.to_hf(latent[0].cfg) | {"qat": qat}
  with pytest.raises(errors.ConfigError, match=message):
    hf_config.from_hf(hf)


@pytest.mark.parametrize(
  "qat, message",
  [
    (
      {"group_size": 7},
      r"qat: layers/attn/\w/kernel: group_size: found 7, expected -1 or a divisor",
    ),
    (
      {"group_size": -1, "scale_shards": 5},
      "qat: layers/attn/o/kernel: quant.scale_shards: found 5",
    ),
  ],
)
def test_groups_that_do_not_divide_the_kernels_name_the_file(latent, tmp_path, qat, message):
  ckpt.save_hf(tmp_path / "m", *latent)
  hf = json.loads((tmp_path / "m/config.json").read_text()) | {"qat": {"type": "ternary"} | qat}
  (tmp_path / "m/config.json").write_text(json.dumps(hf))
  with pytest.raises(errors.ConfigError, match=f"m/config.json: {message}"):
    ckpt.load_hf(tmp_path / "m")


def test_int8_activations_have_no_place_in_config_json():
  with pytest.raises(errors.ConfigError, match="model.quant.act_bits: found 8, expected None"):
    hf_qat.to_hf(QuantConfig(act_bits=8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_have_no_codes(value):
  w = np.array(int4.fake(np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32), 16))
  w[5, 1] = value
  with pytest.raises(ValueError, match="off integers by nan, expected fused int4"):
    int4.recover(w, 16)
  with pytest.raises(ternary.FusedWeightsError, match="found groups of -1 with several magnitudes"):
    ternary.recover(np.where(np.isfinite(w), 0, w))


def test_recovered_scales_fit_their_type():
  w = np.zeros((16, 3), np.float32)
  w[2, 1] = 1e6
  with pytest.raises(ValueError, match="scale: found inf or nan, expected .* float16"):
    ternary.recover(w, scale_dtype=jnp.float16)


@pytest.mark.parametrize("scheme", ["ternary", "int4"])
def test_groups_of_one_input_are_no_sign_of_fused_weights(scheme):
  w = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
  params = {"layers": {"mlp": {"up": {"kernel": w}}}}
  ternary.check_latent(QuantConfig(scheme=scheme, group_size=1), params)
