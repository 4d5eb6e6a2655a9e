"""A small random model whose logits are far from flat, and its logits by full forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.models import transformer

VOCAB = 61
SPARSE = config.SparseAttentionConfig(
  kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=24, lse="coarse"
)


def almost_bigram():
  """`make` with small branches, so that a simple draft is often right."""
  model, params = make(tie_embeddings=False, mtp=config.MTPConfig())
  small = lambda path, x: 0.1 * x if path.endswith(("o/kernel", "down/kernel")) else x  # noqa: E731
  return model, trees.map_with_path(small, params)


@functools.cache
def make(**fields):
  """(model, params): two unrolled layers unless told otherwise; equal fields give equal params."""
  base = dict(
    vocab_size=VOCAB,
    model_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
    scan_layers=False,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=8,
  )
  model = transformer.Transformer(config.ModelConfig(**(base | fields)))
  shapes, _ = transformer.abstract_params(model)
  rng = np.random.default_rng(7)

  def fill(leaf):
    return jnp.asarray(rng.normal(size=leaf.shape) * 0.3 + (leaf.ndim == 1), leaf.dtype)

  return model, jax.tree.map(fill, shapes)


@functools.cache
def _forward(model, width):
  return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)


def full_logits(model, params, tokens, width=64):
  """float64 logits [T, V] of one sequence without any cache, at one width (the tail is idle)."""
  tokens_1T = np.zeros((1, width), np.int32)
  tokens_1T[0, : len(tokens)] = tokens
  logits = _forward(model, width)(params, jnp.asarray(tokens_1T))
  return np.asarray(logits[0, : len(tokens)], np.float64)


def replace(model, **fields):
  return transformer.Transformer(dataclasses.replace(model.cfg, **fields))
