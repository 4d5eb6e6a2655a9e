"""Conversions keep the function: logits before and after, and the way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import MoEConfig, MTPConfig, QuantConfig
from minicpm_jax.models import convert, transformer
from minicpm_jax.models import draft as draft_lib
from tests.models import common

TOKENS = common.tokens((2, 24))


def logits(cfg, params):
  return np.asarray(common.apply(transformer.Transformer(cfg), params, TOKENS).logits)


@pytest.fixture(scope="module")
def dense():
  cfg = common.config()
  params = common.build(cfg)[1]
  return cfg, params, logits(cfg, params)


def test_fold_and_back(dense):
  cfg, params, expected = dense
  folded_cfg, folded = convert.fold_to_llama(cfg, params)
  assert folded_cfg.arch == "llama" and not folded_cfg.tie_embeddings
  assert (folded_cfg.scale_emb, folded_cfg.residual_scale, folded_cfg.logit_divisor) == (1, 1, 1)
  np.testing.assert_allclose(logits(folded_cfg, folded), expected, atol=1e-5)
  back_cfg, back = convert.unfold_from_llama(folded_cfg, folded, cfg)
  assert back_cfg == cfg
  common.assert_trees_close(back, params, atol=0, rtol=1e-6)


def test_fold_rounds_once_in_bf16(dense):
  """12 and 0.286 are no powers of two: the product is rounded once, from float32."""
  cfg, params, _ = dense
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  folded = convert.fold_to_llama(cfg, low)[1]
  table = np.asarray(low["embed"]["embedding"], np.float64) * 12
  expected = jnp.asarray(table, jnp.float32).astype(jnp.bfloat16)
  np.testing.assert_array_equal(folded["embed"]["embedding"], expected)


def test_fold_refuses_what_llama_lacks():
  cfg = common.config("minicpm3_4b")
  with pytest.raises(ValueError, match="model.arch: found 'minicpm3'"):
    convert.fold_to_llama(cfg, {})
  with pytest.raises(ValueError, match="model.mtp"):
    convert.fold_to_llama(common.config(mtp=MTPConfig()), {})
  with pytest.raises(ValueError, match="model.quant: found latent weights of scheme 'int4'"):
    convert.fold_to_llama(common.config(quant=QuantConfig(scheme="int4", group_size=8)), {})
  original = common.config(quant=QuantConfig(scheme="int4", group_size=8))
  with pytest.raises(ValueError, match="model.quant: found latent weights of scheme 'int4'"):
    convert.unfold_from_llama(dataclasses.replace(common.config(), arch="llama"), {}, original)


def test_untie(dense):
  cfg, params, expected = dense
  new_cfg, new = convert.untie(cfg, params)
  np.testing.assert_allclose(logits(new_cfg, new), expected, atol=1e-5)
  assert convert.untie(new_cfg, new)[1].keys() == new.keys()


def test_pad_and_unpad_vocabulary(dense):
  cfg, params, expected = dense
  padded_cfg, padded = convert.pad_vocab(*convert.untie(cfg, params), 96)
  assert padded["lm_head"]["kernel"].shape == (32, 288)
  assert not np.any(padded["embed"]["embedding"][256:])
  np.testing.assert_allclose(logits(padded_cfg, padded), expected, atol=1e-5)
  back_cfg, back = convert.unpad_vocab(padded_cfg, padded)
  assert back_cfg.vocab_multiple == 1
  np.testing.assert_array_equal(back["embed"]["embedding"], params["embed"]["embedding"])


@pytest.mark.parametrize("is_scan", [True, False], ids=["scan", "unrolled"])
def test_upcycling_is_the_identity_at_step_0(dense, is_scan):
  """Equal experts and weights that sum to 1: any router gives the dense model's logits."""
  cfg, params, expected = dense
  if not is_scan:
    cfg, params = convert.unstack_layers(cfg, params)
  moe = MoEConfig(num_experts=4, experts_per_token=2)
  new_cfg, new = convert.upcycle(cfg, params, jax.random.key(3), moe)
  shapes = jax.tree.map(jnp.shape, new)
  abstract = transformer.abstract_params(transformer.Transformer(new_cfg))[0]
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract)
  np.testing.assert_allclose(logits(new_cfg, new), expected, atol=1e-5)
  layer = new["layers"] if is_scan else new["layers_1"]
  router = np.asarray(layer["moe"]["router"]["kernel"])
  assert np.std(router) == pytest.approx(0.1, rel=0.25)


def test_upcycling_an_moe_is_refused():
  cfg = common.config("minicpm_moe_8x2b")
  with pytest.raises(ValueError, match="model.moe"):
    convert.upcycle(cfg, {}, jax.random.key(0), MoEConfig())


def test_stack_and_unstack_are_inverse(dense):
  cfg, params, expected = dense
  flat_cfg, flat = convert.unstack_layers(cfg, params)
  assert flat["layers_1"]["attn"]["q"]["kernel"].shape == (32, 4, 8)
  np.testing.assert_allclose(logits(flat_cfg, flat), expected, atol=1e-5)
  back_cfg, back = convert.stack_layers(flat_cfg, flat)
  assert back_cfg == cfg
  common.assert_trees_close(back, params, atol=0, rtol=0)


def test_mtp_to_eagle_gives_the_logits_of_the_mtp_head():
  cfg = common.config(mtp=MTPConfig(), num_layers=3)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 9))
  hidden_BTD = common.apply(model, params, tokens_BT).hidden

  def mtp_logits(module):
    return module.unembed(module.mtp_hidden(hidden_BTD, tokens_BT))

  expected = jax.jit(lambda p: model.apply({"params": p}, method=mtp_logits))(params)
  draft_cfg, draft_params = convert.mtp_to_eagle(cfg, params)
  e_BTD = 12.0 * params["embed"]["embedding"][tokens_BT[:, 1:]]
  positions = jnp.broadcast_to(jnp.arange(8), (2, 8))

  @jax.jit
  def draft_logits(draft_params):
    cache = draft_lib.init_cache(draft_cfg, 2, 8)
    args = (cache, e_BTD, hidden_BTD[:, :-1], positions, jnp.ones((2, 8), bool))
    hidden, _ = draft_lib.extend(draft_cfg, draft_params, *args)
    head = transformer.head_weight(cfg, params)
    draft = draft_lib.DraftModel(draft_cfg)
    return draft.apply({"params": draft_params}, hidden, head, method="logits")

  np.testing.assert_allclose(draft_logits(draft_params), expected[:, :-1], atol=1e-4)
  with pytest.raises(ValueError, match="model.mtp: found no MTP module"):
    convert.mtp_to_eagle(common.config(), params)


def test_unfolding_wants_folded_weights_of_the_same_shape(dense):
  cfg, params, _ = dense
  with pytest.raises(ValueError, match="llama_cfg.arch: found 'minicpm'"):
    convert.unfold_from_llama(cfg, params, cfg)
  llama_cfg, folded = convert.fold_to_llama(cfg, params)
  other = dataclasses.replace(cfg, vocab_size=cfg.vocab_size - 1)
  with pytest.raises(ValueError, match="llama_cfg.vocab_size: found"):
    convert.unfold_from_llama(llama_cfg, folded, other)
