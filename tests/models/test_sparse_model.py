"""Sparse attention inside the model: decoding, packing, remat, meshes (infllm_v2.md 8, 11 to 13)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import MeshConfig, SparseAttentionConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import convert, transformer
from minicpm_jax.nn import sparse_attention
from tests.models import common

SMALL = SparseAttentionConfig(
  kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=2, dense_len=-1
)


def build(name="minicpm4_0p5b", *, seed=0, scan_layers=True, remat="none", **sparse):
  cfg = common.config(
    name, max_position=256, sparse=dataclasses.replace(SMALL, **sparse), scan_layers=scan_layers
  )
  cfg = dataclasses.replace(cfg, remat=remat, init_std=0.4)  # sharp attention: blocks matter
  return common.build(cfg, seed)


def dense_of(model):
  return model.clone(cfg=dataclasses.replace(model.cfg, sparse=None))


def run_cached(model, params, tokens_BT, cuts, capacity, segment_ids_BT=None):
  """Logits of every position when the tokens are fed in pieces."""

  @jax.jit
  def step(cache, tokens, ids):
    out = model.apply({"params": params}, tokens, segment_ids_BT=ids, cache=cache)
    return out.logits, out.cache

  cache, found = cache_lib.init(model.cfg, tokens_BT.shape[0], capacity), []
  for start, end in zip(cuts, cuts[1:], strict=False):
    ids = None if segment_ids_BT is None else segment_ids_BT[:, start:end]
    logits, cache = step(cache, tokens_BT[:, start:end], ids)
    found.append(logits)
  return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize("lse, selection", [("coarse", "joint"), ("exact", "split")])
@pytest.mark.parametrize("is_scan", [True, False], ids=["scan", "unrolled"])
def test_decode_equals_prefill(lse, selection, is_scan):
  """Row by row from 97 tokens on, beyond windows that complete at multiples of 4 and of 16."""
  model, params = build(lse=lse, selection=selection)
  tokens_BT = common.tokens((2, 132))
  expected = common.apply(model, params, tokens_BT).logits
  full = common.apply(dense_of(model), params, tokens_BT).logits
  assert np.max(np.abs(expected[:, 64:] - full[:, 64:])) > 1e-2  # the selection leaves out much
  if not is_scan:
    cfg, params = convert.unstack_layers(model.cfg, params)
    model = transformer.Transformer(cfg)
  found, _ = run_cached(model, params, tokens_BT, [0, *range(97, 133)], capacity=140)
  np.testing.assert_allclose(found, expected, atol=1e-4)
