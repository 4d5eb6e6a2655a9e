"""A tokenizer of bytes for the decoding tests: ids 0-255 are bytes, then four special tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import generate
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer


class ByteTokenizer(tokenizer.TraitsMixin):
  """The whole tokenizer protocol over bytes."""

  special_tokens = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
  vocab_size = 260

  def __init__(self, *, chat_template=None, strips_first_space=False):
    self.traits = tokenizer.Traits(
      bos_id=256, eos_id=257, stop_ids=(257, 259), add_bos=True, chat_template=chat_template
    )
    self.strips_first_space = strips_first_space

  def encode(self, text, *, add_bos=False):
    ids = [256] if add_bos else []
    while text:
      name = next((name for name in self.special_tokens if text.startswith(name)), None)
      ids += [self.special_tokens[name]] if name else list(text[0].encode())
      text = text[len(name or "x") :]
    return ids

  def piece_bytes(self, token_id):
    names = {i: name for name, i in self.special_tokens.items()}
    return names[token_id].encode() if token_id in names else bytes([token_id])

  def save(self, folder):
    raise NotImplementedError


@pytest.fixture
def byte_tokenizer():
  """The class; call it for a tokenizer."""
  return ByteTokenizer


@pytest.fixture(scope="session")
def tiny_engine_parts():
  """(model, params) of one small random layer over bytes."""
  cfg = config.ModelConfig(
    vocab_size=260,
    model_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=1024,
    stop_ids=(257,),
  )
  model = transformer.Transformer(cfg)
  shapes, _ = transformer.abstract_params(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2 + (x.ndim == 1), x.dtype), shapes
  )
  return generate.for_decoding(model, params)
