"""The forward pass against its equations, and its forms against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.models import convert, transformer
from tests.models import common


def rms(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def equations(cfg, params, tokens_T):
  """models.md section 3 for one row, one head at a time, float64."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  T, H, group = len(tokens_T), cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
  r = cfg.scale_depth / np.sqrt(cfg.num_layers)
  angles = np.arange(T)[:, None] * cfg.rope.theta ** (-2 * np.arange(H // 2) / H)
  cos, sin = np.cos(angles), np.sin(angles)

  def turn(x):
    a, b = x[:, : H // 2], x[:, H // 2 :]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=1)

  h = p["embed"]["embedding"][tokens_T] * cfg.scale_emb
  for i in range(cfg.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
    x, attn = rms(h, layer["attn_norm"]["scale"], cfg.norm_eps), layer["attn"]
    branch = np.zeros_like(h)
    for n in range(cfg.num_heads):
      q = turn(x @ attn["q"]["kernel"][:, n])
      k = turn(x @ attn["k"]["kernel"][:, n // group])
      v = x @ attn["v"]["kernel"][:, n // group]
      scores = np.where(np.tril(np.ones((T, T))) > 0, q @ k.T / np.sqrt(H), -np.inf)
      probs = np.exp(scores - scores.max(axis=1, keepdims=True))
      branch += probs / probs.sum(axis=1, keepdims=True) @ v @ attn["o"]["kernel"][n]
    h = h + r * branch
    x, mlp = rms(h, layer["mlp_norm"]["scale"], cfg.norm_eps), layer["mlp"]
    gate = x @ mlp["gate"]["kernel"]
    if cfg.act == "silu":
      gate = gate / (1 + np.exp(-gate))
    else:
      gate = np.where(gate > cfg.act_threshold, gate, 0)
    h = h + r * (gate * (x @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
  h = rms(h, p["final_norm"]["scale"], cfg.norm_eps)
  head = p["embed"]["embedding"].T if cfg.tie_embeddings else p["lm_head"]["kernel"]
  return h, (h / (cfg.model_dim / cfg.dim_model_base)) @ head


@pytest.fixture(scope="module")
def dense():
  cfg = common.config()
  return (cfg, *common.build(cfg))


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["minicpm4_0p5b", "minicpm4_8b", "minicpm_s_1b"])
def test_forward_equals_the_equations(name):
  """Tied, untied, FATReLU; GQA; every multiplier in its place."""
  cfg = common.config(name)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  out = common.apply(model, params, tokens_BT)
  assert out.logits.dtype == jnp.float32
  for b in range(2):
    hidden, logits = equations(cfg, params, np.asarray(tokens_BT[b]))
    np.testing.assert_allclose(out.hidden[b], hidden, atol=1e-4)
    np.testing.assert_allclose(out.logits[b], logits, atol=2e-5)


def test_vocabulary_padding_changes_no_logit(dense):
  cfg, model, params = dense
  tokens_BT = common.tokens((2, 24))
  padded_cfg, padded = convert.pad_vocab(cfg, params, 100)
  assert padded["embed"]["embedding"].shape == (300, 32)
  found = common.apply(transformer.Transformer(padded_cfg), padded, tokens_BT).logits
  np.testing.assert_allclose(found, common.apply(model, params, tokens_BT).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["minicpm4_0p5b", "minicpm3_4b", "minicpm_moe_8x2b"])
def test_packed_equals_separate(name):
  """Three documents in a row with padding at its end, against one row each."""
  cfg = common.config(name)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((1, 24))
  lengths = (9, 1, 10)
  ids = np.repeat([1, 2, 3, 0], [*lengths, 4])[None]
  packed = common.apply(model, params, tokens_BT, segment_ids_BT=jnp.asarray(ids)).logits
  assert np.all(np.isfinite(packed))
  start = 0
  for length in lengths:
    row = jnp.zeros((1, 24), jnp.int32).at[:, :length].set(tokens_BT[:, start : start + length])
    alone = common.apply(model, params, row).logits[0, :length]
    np.testing.assert_allclose(packed[0, start : start + length], alone, atol=1e-5)
    start += length


def test_no_tokens_are_refused(dense):
  _, model, params = dense
  with pytest.raises(ValueError, match=r"tokens_BT: found shape \(1, 0\)"):
    model.apply({"params": params}, jnp.zeros((1, 0), jnp.int32))


def test_left_padding_changes_nothing(dense):
  _, model, params = dense
  tokens_BT = common.tokens((2, 24))
  expected = common.apply(model, params, tokens_BT).logits
  padded = jnp.pad(tokens_BT, ((0, 0), (5, 0)), constant_values=7)
  ids = jnp.pad(jnp.ones_like(tokens_BT), ((0, 0), (5, 0)))
  found = common.apply(model, params, padded, segment_ids_BT=ids).logits
  np.testing.assert_allclose(found[:, 5:], expected, atol=1e-5)
  assert np.all(np.isfinite(found))


def test_positions_are_relative_in_plain_rope(dense):
  _, model, params = dense
  tokens_BT = common.tokens((2, 24))
  positions = jnp.broadcast_to(jnp.arange(24) + 17, (2, 24))
  found = common.apply(model, params, tokens_BT, positions).logits
  np.testing.assert_allclose(found, common.apply(model, params, tokens_BT).logits, atol=1e-4)
  stretched = common.apply(model, params, tokens_BT, positions * 2).logits
  assert not np.allclose(found, stretched, atol=1e-2)


def test_bf16_stays_near_float32(dense):
  """Compute in bf16, parameters, softmax and logits in float32."""
  cfg, model, params = dense
  tokens_BT = common.tokens((2, 24))
  expected = common.apply(model, params, tokens_BT).logits
  low = transformer.Transformer(dataclasses.replace(cfg, dtype="bf16"))
  out = common.apply(low, params, tokens_BT)
  assert out.logits.dtype == jnp.float32 and out.hidden.dtype == jnp.bfloat16
  assert np.mean(np.abs(out.logits - expected)) < 0.05 * np.std(expected)


def test_logits_can_be_left_out(dense):
  cfg, model, params = dense
  tokens_BT = common.tokens((2, 24))
  out = common.apply(model, params, tokens_BT, return_logits=False)
  assert out.logits is None and out.aux == {}
  full = common.apply(model, params, tokens_BT)
  head = transformer.head_weight(cfg, params)
  np.testing.assert_allclose(out.hidden / cfg.logit_divisor @ head, full.logits, atol=1e-5)


def gradients(cfg, params, tokens_BT):
  model = transformer.Transformer(cfg)
  loss = jax.jit(jax.value_and_grad(lambda p: common.mean_loss(model, p, tokens_BT)))
  return loss(params)


@pytest.mark.parametrize("name", ["minicpm4_0p5b", "minicpm_moe_8x2b"])
def test_scan_equals_unrolled_and_remat_equals_none(name):
  """Loss and gradients of the same weights: stacked, per layer under full remat, unrolled scan."""
  cfg = common.config(name)
  _, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  loss, grads = gradients(cfg, params, tokens_BT)
  assert min(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads)) > 0
  flat_cfg, flat = convert.unstack_layers(dataclasses.replace(cfg, remat="full"), params)
  found_loss, found = gradients(flat_cfg, flat, tokens_BT)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
  common.assert_trees_close(convert.stack_layers(flat_cfg, found)[1], grads, atol=1e-6)
  if cfg.moe is None:
    straight = dataclasses.replace(cfg, scan_unroll=64, remat="full")  # more than there are layers
    found_loss, found = gradients(straight, params, tokens_BT)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    common.assert_trees_close(found, grads, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "dots", "offload"])
def test_every_remat_policy_equals_none(policy):
  cfg = common.config()
  _, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  loss, grads = gradients(cfg, params, tokens_BT)
  found_loss, found = gradients(dataclasses.replace(cfg, remat=policy), params, tokens_BT)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
  common.assert_trees_close(found, grads, atol=1e-6)


def test_balance_loss_is_summed_over_layers():
  """Each layer's loss is at least near 1 and the unrolled form sums the same numbers."""
  cfg = common.config("minicpm_moe_8x2b")
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  found = common.apply(model, params, tokens_BT).aux["moe_balance_loss"]
  flat_cfg, flat = convert.unstack_layers(cfg, params)
  other = common.apply(transformer.Transformer(flat_cfg), flat, tokens_BT)
  np.testing.assert_allclose(found, other.aux["moe_balance_loss"], rtol=1e-5)
  assert 0.9 * cfg.num_layers < float(found) < cfg.moe.num_experts * cfg.num_layers


def test_sparse_config_runs_dense_below_its_length(dense):
  cfg, model, params = dense
  sparse = dataclasses.replace(SparseAttentionConfig(), dense_len=25)
  other = transformer.Transformer(dataclasses.replace(cfg, sparse=sparse))
  tokens_BT = common.tokens((2, 24))
  expected = common.apply(model, params, tokens_BT).logits
  np.testing.assert_array_equal(common.apply(other, params, tokens_BT).logits, expected)
  assert transformer.abstract_params(other)[0].keys() == params.keys()
