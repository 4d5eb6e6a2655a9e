"""Cached decoding against the full forward, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import convert, transformer
from tests.models import common


def decode(model, params, tokens_BT, prompt, capacity, rope_length=None, segment_ids_BT=None):
  """Prefill of `prompt` tokens, then one at a time; logits of every position."""

  @jax.jit
  def step(cache, tokens, ids):
    out = model.apply(
      {"params": params}, tokens, segment_ids_BT=ids, cache=cache, rope_length=rope_length
    )
    return out.logits, out.cache

  cache = cache_lib.init(model.cfg, tokens_BT.shape[0], capacity)
  found = []
  cuts = [0, *range(prompt, tokens_BT.shape[1] + 1)]
  for start, end in zip(cuts, cuts[1:], strict=False):
    ids = None if segment_ids_BT is None else segment_ids_BT[:, start:end]
    logits, cache = step(cache, tokens_BT[:, start:end], ids)
    found.append(logits)
  assert int(cache.length) == tokens_BT.shape[1]
  return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize("kind", common.ROPES)
def test_cached_decode_equals_the_full_forward(kind):
  """Beyond the original window; the cache's length bucket is that of the full forward."""
  cfg = common.config(rope=kind, max_position=12)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 16))
  expected = common.apply(model, params, tokens_BT).logits
  found, _ = decode(model, params, tokens_BT, 12, capacity=16)
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["minicpm3_4b", "minicpm_moe_8x2b"])
@pytest.mark.parametrize("is_scan", [True, False], ids=["scan", "unrolled"])
def test_every_block_decodes(name, is_scan):
  """Latent cache and experts, stacked and per layer, with room to spare in the cache."""
  cfg = common.config(name)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 16))
  expected = common.apply(model, params, tokens_BT).logits
  if not is_scan:
    cfg, params = convert.unstack_layers(cfg, params)
    model = transformer.Transformer(cfg)
  found, cache = decode(model, params, tokens_BT, 12, capacity=20)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  k = cache.k if is_scan else cache.k[0]
  if name == "minicpm3_4b":
    assert k.shape[-2:] == (1, cfg.mla.kv_lora_rank + cfg.mla.qk_rope_head_dim)


@pytest.mark.smoke
def test_left_padded_prompts_of_unequal_length():
  cfg = common.config(scan_layers=False)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 16))
  pads = (0, 5)
  ids = jnp.stack([jnp.where(jnp.arange(16) < p, 0, 1) for p in pads])
  found, _ = decode(model, params, tokens_BT, 12, capacity=20, segment_ids_BT=ids)
  assert np.all(np.isfinite(found))
  for row, pad in enumerate(pads):
    shifted = jnp.roll(tokens_BT, -pad, axis=1)
    expected = common.apply(model, params, shifted).logits[row, : 16 - pad]
    np.testing.assert_allclose(found[row, pad:], expected, atol=1e-4)


def test_rope_length_fixes_the_bucket():
  """Dynamic NTK with a cache larger than the target length: `rope_length` decides."""
  cfg = common.config(rope="dynamic", max_position=12)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 16))
  expected = common.apply(model, params, tokens_BT).logits
  found, _ = decode(model, params, tokens_BT, 12, capacity=40, rope_length=16)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  other, _ = decode(model, params, tokens_BT, 12, capacity=40)
  assert not np.allclose(other, expected, atol=1e-3)


def test_rejected_tokens_leave_no_trace():
  """Going back to an earlier length and decoding again equals never having gone ahead."""
  cfg = common.config()
  model, params = common.build(cfg)
  tokens_BT, wrong = common.tokens((2, 16)), common.tokens((2, 16), seed=9)
  expected = common.apply(model, params, tokens_BT).logits
  run = jax.jit(lambda t, cache: model.apply({"params": params}, t, cache=cache))
  out = run(tokens_BT[:, :12], cache_lib.init(cfg, 2, 20))
  ahead = run(wrong[:, :4], out.cache)
  found = run(tokens_BT[:, 12:], ahead.cache.replace(length=out.cache.length))
  np.testing.assert_allclose(found.logits, expected[:, 12:], atol=1e-4)


@pytest.mark.parametrize("is_scan", [True, False], ids=["scan", "unrolled"])
def test_a_donated_cache_is_written_in_place(is_scan):
  cfg = common.config(scan_layers=is_scan)
  model, params = common.build(cfg)
  run = jax.jit(lambda p, t, cache: model.apply({"params": p}, t, cache=cache), donate_argnums=2)
  cache = cache_lib.init(cfg, 2, 20)
  where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((cache.k, cache.v))]
  out = run(params, common.tokens((2, 1)), cache)
  found = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((out.cache.k, out.cache.v))]
  assert sorted(found) == sorted(where)


def test_more_tokens_than_slots_are_refused():
  cfg = common.config()
  model, params = common.build(cfg)
  with pytest.raises(ValueError, match="found 5 tokens, expected at most the cache's 4 slots"):
    model.apply({"params": params}, common.tokens((1, 5)), cache=cache_lib.init(cfg, 1, 4))
  for more in ({}, {"per_row": True}):  # outside jit the length held is known too
    cache = cache_lib.init(cfg, 1, 4, **more)
    cache = cache.replace(length=cache.length + 3)
    with pytest.raises(ValueError, match="found 2 tokens behind 3, expected .* 4 slots"):
      model.apply({"params": params}, common.tokens((1, 2)), cache=cache)


def test_a_jitted_forward_may_close_over_its_cache():
  """Then the length is known while it is traced, and so is whether the tokens fit behind it."""
  cfg = common.config()
  model, params = common.build(cfg)
  tokens, empty = common.tokens((1, 4)), cache_lib.init(cfg, 1, 4)
  forward = lambda t, cache: model.apply({"params": params}, t, cache=cache)  # noqa: E731
  found = jax.jit(lambda t: forward(t, empty).logits)(tokens)
  full = forward(tokens, empty)
  np.testing.assert_allclose(found, full.logits, atol=1e-5)
  with pytest.raises(ValueError, match="found 1 tokens behind 4, expected .* 4 slots"):
    jax.jit(lambda t: forward(t, full.cache).logits)(tokens[:, :1])


@pytest.mark.parametrize("sizes, name", [((0, 8), "batch_size"), ((2, 0), "capacity")])
def test_a_cache_of_nothing_is_refused(sizes, name):
  with pytest.raises(ValueError, match=f"cache {name}: found 0, expected at least 1"):
    cache_lib.init(common.config(), *sizes)
