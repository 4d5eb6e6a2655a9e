"""The extra head against its equation, with the main model's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import MTPConfig
from minicpm_jax.models import transformer
from tests.models import common
from tests.models.test_transformer import rms


@pytest.mark.parametrize("has_scale", [True, False])
def test_mtp_equals_its_equation(has_scale):
  """block(proj[norm h_i ; norm emb(x_{i+1})]): the block is run as a one-layer main model."""
  mtp = MTPConfig(scale_depth_over_sqrt_layers=has_scale)
  cfg = common.config(mtp=mtp)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  out = common.apply(model, params, tokens_BT)

  p = params["mtp"]
  embedded = 12.0 * params["embed"]["embedding"][tokens_BT[:, 1:]]
  h = rms(np.asarray(out.hidden[:, :-1]), np.asarray(p["hidden_norm"]["scale"]), cfg.norm_eps)
  e = rms(np.asarray(embedded), np.asarray(p["embed_norm"]["scale"]), cfg.norm_eps)
  x = np.concatenate((h, e), axis=-1) @ np.asarray(p["proj"]["kernel"])

  # A one-layer model whose embedding table is x itself, read by position, and no final norm.
  residual = 1.4 / np.sqrt(cfg.num_layers + 1) if has_scale else 1.0
  one = common.config(
    num_layers=1, scale_emb=1.0, scale_depth=residual, vocab_size=46, scan_layers=False
  )
  stack = {
    "embed": {"embedding": jnp.asarray(x.reshape(46, 32), jnp.float32)},
    "layers_0": p["layer"],
    "final_norm": {"scale": jnp.ones(32)},
  }
  rows = jnp.arange(46).reshape(2, 23)
  expected = common.apply(transformer.Transformer(one), stack, rows).hidden

  run = jax.jit(lambda p, *args: model.apply({"params": p}, *args, method="mtp_hidden"))
  found = run(params, out.hidden, tokens_BT)
  assert found.shape == out.hidden.shape
  np.testing.assert_allclose(rms(found[:, :-1], 1.0, one.norm_eps), expected, atol=1e-4)


def test_gradients_reach_the_main_model_and_the_module():
  cfg = common.config(mtp=MTPConfig())
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))

  def loss(params):
    def both(module):
      out = module(tokens_BT, return_logits=False)
      return module.unembed(module.mtp_hidden(out.hidden, tokens_BT))

    logits = model.apply({"params": params}, method=both)
    return jnp.mean(jax.nn.logsumexp(logits[:, :-2], axis=-1) - logits[:, :-2, 0])

  grads = jax.jit(jax.grad(loss))(params)
  smallest = jax.tree.map(lambda g: float(jnp.max(jnp.abs(g))), grads)
  assert min(jax.tree.leaves(smallest)) > 0
