"""Shared helpers of the model tests: tiny configs, randomised norms, a plain loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.config import RopeConfig
from minicpm_jax.models import transformer, zoo

ROPES = {
  "none": RopeConfig(),
  "linear": RopeConfig(kind="linear", factor=3.0),
  "dynamic": RopeConfig(kind="dynamic", factor=4.0),
  "longrope": RopeConfig(
    kind="longrope",
    short_factor=(1.0, 1.1, 1.3, 1.7),
    long_factor=(1.0, 2.0, 3.5, 6.0),
    original_max_position=12,
  ),
}


def config(name="minicpm4_0p5b", **overrides):
  """A tiny member whose rope is plain unless `rope` names one of ROPES."""
  overrides["rope"] = ROPES[overrides.get("rope", "none")]
  return zoo.tiny(zoo.ZOO[name](), **overrides)


def build(cfg, seed=0):
  """(model, params): norm scales that are not all 1, kernels wide enough that attention is sharp.

  At muP's initial size attention is nearly uniform and a wrong rotation would hardly show. Drawn by
  numpy: compiling random numbers takes longer than the tests.
  """
  model = transformer.Transformer(cfg)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    std = 0.1 if name.endswith("embedding") else 0.25
    return jnp.asarray(name.endswith("scale") + std * rng.normal(size=leaf.shape), leaf.dtype)

  return model, jax.tree_util.tree_map_with_path(draw, transformer.abstract_params(model)[0])


def tokens(shape, seed=0, vocab_size=256):
  return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)


@functools.cache
def _compiled(cfg, static):
  model = transformer.Transformer(cfg)
  return jax.jit(lambda p, a, kw: model.apply({"params": p}, *a, **kw, **dict(static)))


def apply(model, params, *args, **kwargs):
  """model.apply under one jit for each config, so that tests share compilations."""
  names = ("rope_length", "return_logits")
  static = tuple((name, kwargs.pop(name)) for name in names if name in kwargs)
  return _compiled(model.cfg, static)(params, args, kwargs)


def mean_loss(model, params, tokens_BT, **kwargs):
  """Next-token cross entropy over a whole batch, plus the experts' balance loss."""
  out = model.apply({"params": params}, tokens_BT, **kwargs)
  log_probs = jax.nn.log_softmax(out.logits[:, :-1])
  picked = jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1)
  return -jnp.mean(picked) + 0.01 * out.aux.get("moe_balance_loss", 0.0)


def assert_trees_close(found, expected, atol, rtol=1e-5):
  def one(path, a, b):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=rtol, err_msg=name)

  jax.tree_util.tree_map_with_path(one, found, expected)


def unrolled(cfg):
  return dataclasses.replace(cfg, scan_layers=False)
