"""A whole attention layer from the tensors of a Hugging Face folder, in float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from minicpm_jax import ckpt
from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import convert, transformer
from minicpm_jax.nn import sparse_attention
from tests.models import common
from tests.nn import sparse_oracle as oracle

TOTAL = 93  # six blocks of 16, of which a query reads four
SMALL = SparseAttentionConfig(
  kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, dense_len=-1
)


def rotate(x_TNH, theta):
  """RoPE by halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
  half = x_TNH.shape[-1] // 2
  angles = np.outer(np.arange(len(x_TNH)), theta ** (-np.arange(half) / half))[:, None]
  first, second = x_TNH[..., :half], x_TNH[..., half:]
  cos, sin = np.cos(angles), np.sin(angles)
  return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
  """(config, params, tokens, q, k, v, o weight) of layer 0 by HF names, projections in float64."""
  cfg = common.config("minicpm4_8b", max_position=128, num_layers=1, sparse=SMALL)
  model, params = common.build(cfg)
  folder = tmp_path_factory.mktemp("hf")
  ckpt.save_hf(folder, model, params)
  (path,) = folder.glob("*.safetensors")
  tensors = {name: x.astype(np.float64) for name, x in safetensors.load_file(path).items()}
  tokens_BT = common.tokens((1, TOTAL))
  x_TD = cfg.scale_emb * tensors["model.embed_tokens.weight"][np.asarray(tokens_BT[0])]
  norm = tensors["model.layers.0.input_layernorm.weight"]
  x_TD = norm * x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True) + cfg.norm_eps)

  def heads(name, count):
    weight = tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
    return (x_TD @ weight.T).reshape(TOTAL, count, cfg.head_dim)

  q = rotate(heads("q", cfg.num_heads), cfg.rope.theta)
  k = rotate(heads("k", cfg.num_kv_heads), cfg.rope.theta)
  v = heads("v", cfg.num_kv_heads)
  return cfg, params, tokens_BT, q, k, v, tensors["model.layers.0.self_attn.o_proj.weight"]


@pytest.mark.parametrize("selection, lse", oracle.MODES)
@pytest.mark.parametrize("offset", [0, 47, 80])
def test_layer_is_the_definition_on_released_weights(layer, selection, lse, offset):
  """The queries from `offset` on; before them a cache is filled. Sets by score regret."""
  cfg, params, tokens_BT, q, k, v, o_weight = layer
  sparse = dataclasses.replace(SMALL, selection=selection, lse=lse)
  cfg = dataclasses.replace(cfg, sparse=sparse)
  given = jnp.asarray(q[None], jnp.float32), jnp.asarray(k[None], jnp.float32)
  ids, counts = sparse_attention.select_blocks(*given, sparse)
  oracle.check_select(q, k, sparse, ids[0], counts[0], rows=range(offset, TOTAL, 5))
  attended = oracle.attend_with(q[offset:], k, v, sparse, ids[0, :, offset:], q_offset=offset)
  expected = attended.reshape(TOTAL - offset, -1) @ o_weight.T

  found = branch(cfg, params, tokens_BT, offset)
  np.testing.assert_allclose(np.reshape(found, expected.shape), expected, atol=1e-4)


def branch(cfg, params, tokens_BT, offset=0):
  """What the attention of layer 0 gives for the tokens from `offset` on."""
  cfg, params = convert.unstack_layers(cfg, params)
  model = transformer.Transformer(cfg)

  @jax.jit
  def run(params, tokens, cache):
    out, caught = model.apply(
      {"params": params},
      tokens,
      cache=cache,
      capture_intermediates=lambda module, _: module.name == "attn",
      mutable=["intermediates"],
    )
    return caught["intermediates"]["layers_0"]["attn"]["__call__"][0][0], out.cache

  cache = None
  if offset:
    _, cache = run(params, tokens_BT[:, :offset], cache_lib.init(cfg, 1, 96))
  return run(params, tokens_BT[:, offset:], cache)[0]


def test_layer_in_bfloat16(layer, monkeypatch):
  """Against float64 with the lists that the bf16 layer chose, valid to 2% of the scores."""
  cfg, params, tokens_BT, q, k, v, o_weight = layer
  lists = []
  select = sparse_attention.select_from_keys

  def watch(*args):
    ids, counts = select(*args)
    jax.debug.callback(lambda *x: lists.append([np.asarray(a)[0] for a in x]), ids, counts)
    return ids, counts

  monkeypatch.setattr(sparse_attention, "select_from_keys", watch)
  found = branch(dataclasses.replace(cfg, dtype="bf16"), params, tokens_BT)
  jax.effects_barrier()
  ((ids, counts),) = lists
  assert found.dtype == jnp.bfloat16
  oracle.check_select(q, k, SMALL, ids, counts, rows=range(0, TOTAL, 5), rtol=2e-2)
  attended = oracle.attend_with(q, k, v, SMALL, ids)
  expected = attended.reshape(TOTAL, -1) @ o_weight.T
  found = np.asarray(found, np.float64).reshape(expected.shape)
  np.testing.assert_allclose(found, expected, atol=3e-2 * max(1.0, np.abs(expected).max()))
