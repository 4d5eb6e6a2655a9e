"""Sparse attention in the model: decoding, packing, remat, meshes (infllm_v2.md 8, 11 to 13)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import MeshConfig, SparseAttentionConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import convert, transformer
from tests.models import common

# Of up to 12 blocks a query takes 5: the first, the last two, and two by score.
SMALL = SparseAttentionConfig(
  kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=4, dense_len=-1
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


def test_decode_with_scores_before_rope():
  model, params = build(use_nope=True, lse="coarse")
  tokens_BT = common.tokens((1, 110))
  expected = common.apply(model, params, tokens_BT).logits
  with_rope = model.clone(
    cfg=dataclasses.replace(model.cfg, sparse=dataclasses.replace(model.cfg.sparse, use_nope=False))
  )
  assert np.max(np.abs(common.apply(with_rope, params, tokens_BT).logits - expected)) > 1e-3
  found, cache = run_cached(model, params, tokens_BT, [0, *range(97, 111)], capacity=112)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert cache.k_nope.shape == cache.k.shape


def test_left_padded_prompts_and_chunked_prefill():
  """Rows that begin at slots 0 and 21 (off every grid), fed in pieces of 40, 40, 17, 1, 1, ...

  The pads are longer than the first windows, and row 1 begins inside the first piece.
  """
  model, params = build(lse="coarse")
  tokens_BT, pads = common.tokens((2, 104)), (0, 21)
  ids = jnp.stack([jnp.where(jnp.arange(104) < pad, 0, 1) for pad in pads])
  cuts = [0, 40, 80, *range(97, 105)]
  found, _ = run_cached(model, params, tokens_BT, cuts, capacity=112, segment_ids_BT=ids)
  for row, pad in enumerate(pads):
    alone = common.apply(model, params, tokens_BT[row : row + 1, pad:]).logits
    np.testing.assert_allclose(found[row, pad:], alone[0], atol=1e-4)


def test_crossing_dense_len_while_decoding():
  """Dense rows below, sparse ones from the step on where a row's length reaches dense_len."""
  model, params = build(dense_len=100)
  tokens_BT, pads = common.tokens((2, 106)), (0, 5)
  ids = jnp.stack([jnp.where(jnp.arange(106) < pad, 0, 1) for pad in pads])
  full = common.apply(dense_of(model), params, tokens_BT, segment_ids_BT=ids).logits

  def step(model):
    def run(cache, tokens, ids):
      out = model.apply({"params": params}, tokens, segment_ids_BT=ids, cache=cache)
      return out.logits, out.cache

    return jax.jit(run)

  mixed, sparse = step(model), step(build(dense_len=-1)[0])
  logits, cache = mixed(cache_lib.init(model.cfg, 2, 120), tokens_BT[:, :97], ids[:, :97])
  np.testing.assert_allclose(logits[0], full[0, :97], atol=1e-4)
  for slot in range(97, 106):
    token = (tokens_BT[:, slot : slot + 1], ids[:, slot : slot + 1])
    is_sparse = [slot + 1 - pad >= 100 for pad in pads]
    expected = sparse(cache, *token)[0]  # a sparse step on the same past
    logits, cache = mixed(cache, *token)
    for row in range(2):
      if is_sparse[row]:
        np.testing.assert_allclose(logits[row], expected[row], atol=1e-4)
      elif not any(is_sparse):
        np.testing.assert_allclose(logits[row, 0], full[row, slot], atol=1e-4)
      first = slot + 1 - pads[row] == 100
      assert not first or np.max(np.abs(logits[row, 0] - full[row, slot])) > 1e-3
    if is_sparse == [True, False]:  # row 1 is dense beside a sparse row 0
      np.testing.assert_allclose(logits[1, 0], full[1, slot], atol=1e-4)


def test_padding_of_a_step_is_not_in_the_length_that_decides():
  """Behind 80 tokens (all seen by both) 43 slots; 5 of one row count, 35 of the other: 85, 115."""
  model, params = build(dense_len=110)
  tokens_BT = common.tokens((2, 123))
  cache = cache_lib.init(model.cfg, 2, 123, per_row=True)
  cache = common.apply(model, params, tokens_BT[:, :80], cache=cache, step=cache_lib.Step()).cache
  step = cache_lib.Step(num_new_B=jnp.asarray([5, 35]))
  found = common.apply(model, params, tokens_BT[:, 80:], cache=cache, step=step)
  dense = common.apply(dense_of(model), params, tokens_BT).logits
  sparse = common.apply(build(dense_len=-1)[0], params, tokens_BT).logits
  assert np.max(np.abs(dense[0, 80:85] - sparse[0, 80:85])) > 1e-3
  np.testing.assert_allclose(found.logits[0, :5], dense[0, 80:85], atol=1e-4)
  np.testing.assert_allclose(found.logits[1, :35], sparse[1, 80:115], atol=1e-4)
  np.testing.assert_array_equal(found.cache.length, [85, 115])


def test_rejected_tokens_leave_no_trace():
  """Back by 9 tokens over a window border and on with others."""
  model, params = build(lse="coarse")
  tokens_BT, wrong = common.tokens((1, 120)), common.tokens((1, 9), seed=9)
  expected = common.apply(model, params, tokens_BT).logits
  run = jax.jit(lambda t, cache: model.apply({"params": params}, t, cache=cache))
  out = run(tokens_BT[:, :100], cache_lib.init(model.cfg, 1, 128))
  ahead = run(wrong, out.cache)
  cache = ahead.cache.replace(length=out.cache.length)
  for t in range(100, 120):
    found = run(tokens_BT[:, t : t + 1], cache)
    np.testing.assert_allclose(found.logits[:, 0], expected[:, t], atol=1e-4)
    cache = found.cache


def test_windows_are_emitted_when_they_complete():
  """Fine ones at L % 4 == 0 from 8 on, coarse ones at L % 16 == 0 from 32 on (section 13)."""
  model, params = build()
  tokens_BT = common.tokens((1, 70))
  _, whole = run_cached(model, params, tokens_BT, [0, 70], capacity=80)
  run = jax.jit(lambda t, cache: model.apply({"params": params}, t, cache=cache).cache)
  cache = run(tokens_BT[:, :29], cache_lib.init(model.cfg, 1, 80))
  for length in range(30, 71):
    cache = run(tokens_BT[:, length - 1 : length], cache)
    for name, size, stride in (("fine", 8, 4), ("coarse", 32, 16)):
      count = max(0, (length - size) // stride + 1)
      found, expected = (np.asarray(getattr(c, name))[:, :, :count] for c in (cache, whole))
      np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{name} at {length}")


def test_capacity_below_dense_len_keeps_no_compressed_keys():
  model, _ = build(dense_len=64)
  assert cache_lib.init(model.cfg, 1, 63).fine is None
  cache = cache_lib.init(model.cfg, 1, 64)
  assert cache.fine.shape == (2, 1, 18, 2, 8) and cache.coarse.shape == (2, 1, 6, 2, 8)


# --- Training ------------------------------------------------------------------------------------

LENGTHS, TOTAL = (112, 37, 27), 192  # documents of a packed row, each at a multiple of 16


def packed():
  ids = np.zeros((4, TOTAL), np.int32)
  starts = (0, 112, 160)
  for i, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
    ids[:, start : start + length] = i + 1
  return ids, starts


def gradients(model):
  ids, _ = packed()

  def loss(params, tokens_BT):
    hidden = model.apply({"params": params}, tokens_BT, segment_ids_BT=ids).hidden
    return jnp.sum(jnp.sin(hidden) * (ids != 0)[:, :, None])

  return jax.jit(jax.value_and_grad(loss))


def test_packed_documents_equal_separate_ones():
  """Per document: 112 tokens are sparse, the others below dense_len 100 are dense."""
  model, params = build(dense_len=100)
  ids, starts = packed()
  tokens_BT = common.tokens((4, TOTAL))
  found = common.apply(model, params, tokens_BT, segment_ids_BT=ids).logits
  for start, length in zip(starts, LENGTHS, strict=True):
    alone = common.apply(model, params, tokens_BT[:1, start : start + length]).logits
    np.testing.assert_allclose(found[0, start : start + length], alone[0], atol=1e-4)


@pytest.fixture(scope="module")
def reference():
  model, params = build("minicpm4_8b", lse="coarse")
  tokens_BT = common.tokens((4, TOTAL))
  return model, params, tokens_BT, *gradients(model)(params, tokens_BT)


def place(model, params, mesh):
  shapes, specs = transformer.abstract_params(model)
  return jax.device_put(params, mesh_lib.tree_shardings(mesh, specs, shapes))


@pytest.mark.parametrize(
  "sizes", [{"tp": 2, "fsdp": 2, "dp": 1}, {"cp": 2, "dp": 2}], ids=["tp-fsdp", "cp-dp"]
)
def test_sharded_equals_unsharded(reference, sizes):
  model, params, tokens_BT, loss, grads = reference
  mesh = mesh_lib.make_mesh(MeshConfig(**sizes), jax.devices()[:4])
  with jax.set_mesh(mesh):
    tokens_BT = jax.device_put(tokens_BT, mesh_lib.batch_sharding(mesh))
    found_loss, found = gradients(model)(place(model, params, mesh), tokens_BT)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
  largest = max(np.max(np.abs(g)) for g in jax.tree.leaves(grads))
  common.assert_trees_close(jax.device_get(found), grads, atol=1e-5 * largest)


def test_a_mesh_that_splits_a_group_is_refused(reference):
  model, params, tokens_BT, *_ = reference
  mesh = mesh_lib.make_mesh(MeshConfig(tp=4, dp=1), jax.devices()[:4])
  with jax.set_mesh(mesh), pytest.raises(mesh_lib.ShardingError, match="num_kv_heads 2.*group"):
    model.apply({"params": params}, tokens_BT)


def test_sharded_decoding(reference):
  model, params, tokens_BT, *_ = reference
  expected = common.apply(model, params, tokens_BT).logits
  mesh = mesh_lib.make_mesh(MeshConfig(tp=2, dp=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    found, _ = run_cached(
      model, place(model, params, mesh), tokens_BT, [0, *range(188, 193)], capacity=TOTAL
    )
  np.testing.assert_allclose(found, expected, atol=1e-4)


def num_rankings(model, params, tokens_BT):
  """Times that blocks are ranked in a forward and backward pass, by the traced program.

  A ranking is a top-k, or the bisection over the bits of the scores (`sparse_topk.choice`).
  """
  program = str(jax.make_jaxpr(gradients(model))(params, tokens_BT))
  return program.count("top_k[") + program.count("bitcast_convert_type[new_dtype=int32")


def test_remat_keeps_the_selection(reference):
  """The backward pass ranks no block again, and the gradients are those without remat."""
  model, params, tokens_BT, loss, grads = reference
  with_remat = {
    policy: model.clone(cfg=dataclasses.replace(model.cfg, remat=policy))
    for policy in ("full", "dots", "offload")
  }
  found_loss, found = gradients(with_remat["full"])(params, tokens_BT)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
  largest = max(np.max(np.abs(g)) for g in jax.tree.leaves(grads))
  common.assert_trees_close(found, grads, atol=1e-5 * largest)
  for policy, other in with_remat.items():
    assert num_rankings(other, params, tokens_BT) == 1, policy


def test_mesh_and_remat_together_keep_the_selection(reference):
  model, params, tokens_BT, *_ = reference
  other = model.clone(cfg=dataclasses.replace(model.cfg, remat="full"))
  mesh = mesh_lib.make_mesh(MeshConfig(cp=2, dp=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    assert num_rankings(other, params, tokens_BT) == 1
