"""Prefix tokens on a model with planted outliers: found, equal to the long forward, and of use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.deploy import blocks, prefix, quantize
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import convert
from minicpm_jax.quant import gptq
from minicpm_jax.quant import prefix as prefix_lib
from tests.models import common

BOS, COMMA, SIZE = 1, 7, 60.0


def planted(**changes):
  """Channel 0 of the stream is BOS's (and a comma's) alone, and the MLPs answer it."""
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=2, **changes))
  model = model.clone(cfg=dataclasses.replace(model.cfg, bos_id=BOS))
  table = np.array(params["embed"]["embedding"])
  table[:, 0] = 0
  table[[BOS, COMMA]] = 0
  table[[BOS, COMMA], 0] = 1
  layers = jax.tree.map(np.array, params["layers"])
  layers["attn"]["o"]["kernel"][..., 0] = 0  # nothing else writes to it
  layers["mlp"]["down"]["kernel"][..., 0] = 0
  layers["mlp"]["down"]["kernel"] *= 0.01
  for name in ("gate", "up"):
    layers["mlp"][name]["kernel"][:, 0, 0] = SIZE / 4  # one channel takes it
  layers["mlp"]["down"]["kernel"][:, 0] = 0.05
  return model, {
    **params,
    "embed": {"embedding": jnp.asarray(table)},
    "layers": jax.tree.map(jnp.asarray, layers),
  }


def text(rows=8, length=24, commas=True):
  rng = np.random.default_rng(0)
  tokens = rng.integers(8, 256, (rows, length)).astype(np.int32)
  tokens[:, 0] = BOS
  if commas:
    tokens[:, 5] = COMMA
  return [(tokens, np.ones_like(tokens))]


def test_found():
  model, params = planted()
  sizes = prefix.input_sizes(model, params, text()[0])
  ratio = sizes[0]["mlp/down"] / np.median(sizes[0]["mlp/down"], axis=1, keepdims=True)
  assert ratio[:, [0, 5]].min() > 64 > np.delete(ratio, [0, 5], axis=1).max()
  assert prefix.find(model, params, text()) == (COMMA, BOS)
  assert prefix.find(model, params, text(commas=False)) == (BOS,)
  plain, plain_params = common.build(common.config("minicpm4_0p5b", num_layers=2))
  assert prefix.find(plain, plain_params, text(), bos_id=BOS) == ()


@pytest.mark.parametrize("kind, scan", [("minicpm4_0p5b", True), ("minicpm3_4b", False)])
def test_behind_the_stored_keys_is_behind_the_tokens(kind, scan):
  """Grouped-query and latent attention; scalar-length and per-row caches; blocks one by one."""
  model, params = common.build(common.config(kind, num_layers=2))
  if not scan:
    cfg, params = convert.unstack_layers(model.cfg, params)
    model = model.clone(cfg=cfg)
  tokens = np.asarray(common.tokens((2, 10), seed=3))
  before = prefix.key_values(model, params, (COMMA, BOS))
  whole = np.concatenate([np.tile([[COMMA, BOS]], (2, 1)), tokens], axis=1)
  wanted = common.apply(model, params, whole).logits[:, 2:]
  batch = (tokens, np.ones_like(tokens))
  np.testing.assert_allclose(prefix.forward(model, params, batch, before=before), wanted, atol=1e-4)
  cache = cache_lib.with_prefix(model.cfg, before, 2, 12)
  np.testing.assert_allclose(
    common.apply(model, params, tokens, cache=cache).logits, wanted, atol=1e-4
  )
  cache = cache_lib.with_prefix(model.cfg, before, 2, 16, per_row=True)
  found = common.apply(model, params, tokens, cache=cache)
  np.testing.assert_allclose(found.logits, wanted, atol=1e-4)
  np.testing.assert_array_equal(found.cache.length, [12, 12])


def test_static_8_bit_activations_need_the_prefix():
  """The outliers take the static range; behind the prefix they are not there, and a token's own
  scale never needed it."""
  model, params = planted()
  (batch,) = text(commas=False)
  later = (batch[0][:, 1:], batch[1][:, 1:])
  before = prefix.key_values(model, params, (BOS,))
  wanted = np.asarray(common.apply(model, params, batch[0]).logits[:, 1:])

  def error(found):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

  scales = prefix.activation_scales(model, params, [batch])
  behind = prefix.activation_scales(model, params, [later], before)
  assert scales[0]["mlp/down"] > 64 * behind[0]["mlp/down"]
  without = error(prefix.forward(model, params, batch, act=scales)[:, 1:])
  static = error(prefix.forward(model, params, later, before=before, act=behind))
  by_token = error(prefix.forward(model, params, batch, act="token")[:, 1:])
  assert static < 0.5 * without and static < 0.05 and by_token < 0.05, (static, without, by_token)
  assert error(prefix.forward(model, params, later, before=before)) < 1e-5


def test_statistics_behind_a_prefix():
  """Hessians are those of the text behind the tokens: of a long row without its first columns."""
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
  tokens = np.asarray(common.tokens((2, 16), seed=1))
  whole = np.concatenate([np.tile([[COMMA, BOS]], (2, 1)), tokens], axis=1).astype(np.int32)
  before = prefix.key_values(model, params, (COMMA, BOS))
  layer, found = blocks.layer_params(model.cfg, params, 0), []
  for rows, at in ((tokens, before), (whole, None)):
    # P- leaves out 3 positions: of the first rows 1 token, the prefix has the others.
    cfg = quantize.QuantizeConfig(method="p-gptq", skip=3)
    work = quantize._Work(model.cfg, cfg, [(rows, np.ones_like(rows))], at)
    hidden = [np.asarray(blocks.embed(model, params, rows))]
    kv = blocks.layer_prefix(model.cfg, at, 0)
    found.append([work.hessian(name, layer, hidden, kv) for name in ("attn/o", "mlp/down")])
  for a, b in zip(*found, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(b)))
  cfg = quantize.QuantizeConfig(method="gptq", solver=gptq.GPTQConfig(group_size=16))
  with pytest.raises(ValueError, match="several documents in a row"):
    quantize.quantize_model(model, params, [(tokens, np.full_like(tokens, 2))], cfg, before=before)


def test_refusals():
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=2))
  with pytest.raises(ValueError, match="bos_id: found None"):
    model_no_bos = model.clone(cfg=dataclasses.replace(model.cfg, bos_id=None))
    prefix.find(model_no_bos, params, text())
  with pytest.raises(ValueError, match="batches: found none"):
    prefix.find(model, params, [], bos_id=1)
  with pytest.raises(ValueError, match=r"tokens: found \[999\], expected ids below 256"):
    prefix.key_values(model, params, (999,))
  with pytest.raises(ValueError, match="tokens: found none"):
    prefix.key_values(model, params, ())
  x = np.zeros((3, 1, 2, 8), np.float32)
  with pytest.raises(ValueError, match="prefix.k: found shape"):
    cache_lib.with_prefix(model.cfg, prefix_lib.Prefix(x, x, (1,)), 1, 4)
  before = prefix.key_values(model, params, (1, 2))
  with pytest.raises(ValueError, match="capacity: found 1 slots"):
    cache_lib.with_prefix(model.cfg, before, 1, 1)
  with pytest.raises(ValueError, match="act: found no scale for attn/q"):
    prefix.forward(model, params, text()[0], act=[{}, {}])
  with pytest.raises(ValueError, match="act: found scales of 1 layers, expected 2"):
    prefix.forward(model, params, text()[0], act=[{}])
