"""InfLLM v2 against its definition in float64, unit by unit (infllm_v2.md section 20).

Sets are compared by score regret, never by index; outputs with the implementation's own sets.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.nn import sparse_attention, sparse_grid
from pallas_kernels.flash import api as flash
from pallas_kernels.sparse_attention import api as attention_api
from pallas_kernels.sparse_attention import xla as attention_xla
from pallas_kernels.sparse_topk import choice, ref, rule, xla
from tests.nn import sparse_oracle as oracle

T = 203  # 13 blocks of 16, budget 5, the last one ragged
PROPERTY = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@functools.partial(jax.jit, static_argnames=("cfg", "implementation"))
def select(q, k, cfg, segment_ids=None, q_offset=0, implementation="auto"):
  return sparse_attention.select_blocks(
    q, k, cfg, q_offset=q_offset, segment_ids=segment_ids, implementation=implementation
  )


@functools.partial(jax.jit, static_argnames=("cfg", "implementation"))
def attend(q, k, v, cfg, segment_ids=None, q_offset=0, kv_length=None, implementation="auto"):
  return sparse_attention.infllm_attention(
    q,
    k,
    v,
    cfg,
    q_offset=q_offset,
    kv_length=kv_length,
    segment_ids=segment_ids,
    implementation=implementation,
  )


# --- Stage 0 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 8, 11, 12, 31, 32, 47, 48, 49])
def test_compressed_keys_are_means_of_complete_windows(length):
  """Lengths around p, p + s - 1 and the first two coarse windows."""
  _, k, _ = oracle.draw(0, 1, length, 1, 2, 4)
  for level, scale in (("fine", 1), ("coarse", 4)):
    found = sparse_attention.compress(jnp.asarray(k), oracle.small(), level)
    for h in range(2):
      expected = oracle.windows(k[0, :, h], scale * 8, scale * 4)
      assert found.shape[1] == len(expected)
      np.testing.assert_allclose(found[0, :, h], expected, atol=1e-6)


def test_coarse_keys_from_fine_ones():
  """c_j = (f_4j + f_4j+2 + f_4j+4 + f_4j+6) / 4 where a window is two strides (section 4)."""
  _, k, _ = oracle.draw(1, 1, 100, 1, 1, 4)
  fine, coarse = (
    sparse_attention.compress(jnp.asarray(k), oracle.small(), level)[0, :, 0]
    for level in ("fine", "coarse")
  )
  for j in range(len(coarse)):
    np.testing.assert_allclose(coarse[j], fine[4 * j : 4 * j + 8 : 2].mean(axis=0), atol=1e-6)


def test_compressed_keys_of_packed_documents():
  _, k, _ = oracle.draw(2, 1, 96, 1, 1, 4)
  ids = np.repeat([1, 0, 2], [40, 8, 48])[None]
  found = sparse_attention.compress(jnp.asarray(k), oracle.small(), "fine", ids)[0, :, 0]
  first = oracle.windows(k[0, :40, 0], 8, 4)
  second = oracle.windows(k[0, 48:, 0], 8, 4)
  np.testing.assert_allclose(found[: len(first)], first, atol=1e-6)
  np.testing.assert_allclose(found[12 : 12 + len(second)], second, atol=1e-6)
  assert not np.any(found[len(first) : 12])


def test_bfloat16_keys_are_averaged_in_float32():
  _, k, _ = oracle.draw(3, 1, 64, 1, 1, 4)
  found = sparse_attention.compress(jnp.asarray(k, jnp.bfloat16), oracle.small(), "coarse")
  assert found.dtype == jnp.bfloat16
  expected = oracle.windows(k[0, :, 0], 32, 16)
  np.testing.assert_allclose(found[0, :, 0].astype(np.float32), expected, rtol=2**-8, atol=1e-7)


# --- Stage 1, blocks, selection ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["plain", "large_logits"])
@pytest.mark.parametrize("lse", ["exact", "coarse"])
def test_block_scores(lse, scale):
  """Rows around p and 4p, exact rows that sum to the group size, coarse rows of zeros."""
  cfg = oracle.small(lse=lse)
  q, k, _ = oracle.draw(4, 100, 100, 3, 1, 8, scale=scale)
  rules = sparse_grid.rule_of(cfg)
  fine, coarse = (xla.compress(jnp.asarray(k), rules, level)[0, :, 0] for level in (1, 4))
  pos = jnp.arange(100)
  # A plain jit of one chunk; two rows of the block pool are compared with the definition below.
  run = jax.jit(lambda q: xla.chunk_scores(q, fine, coarse, pos, 0 * pos, rules, 7))
  found = np.asarray(run(q[0]))
  for t in (0, 6, 7, 8, 30, 31, 32, 47, 62, 63, 64, 99):
    scores = oracle.kernel_scores(q[0, t], k[0, :, 0], t, cfg)
    expected = np.maximum(oracle.block_scores(scores, 100, cfg), 0)
    np.testing.assert_allclose(found[t], expected, rtol=2e-4 if scale > 1 else 1e-5, atol=1e-30)
    if lse == "exact" and t >= 7:
      assert abs(scores.sum() - 3) < 1e-9
    if lse == "coarse" and t < 31:
      assert not np.any(found[t])


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("length", [64, 67, 79])
def test_pooling_is_the_overlap_rule(ratio, length):
  """p/s = 1, 2, 3; lengths whose last block has one window less, or none."""
  cfg = oracle.small(kernel_size=4 * ratio)
  rules = sparse_grid.rule_of(cfg)
  count = rules.num_windows(length)
  scores = np.random.default_rng(0).random((5, count)).astype(np.float32)
  found = xla.pool(jnp.asarray(scores), rules, rules.num_blocks(length))
  expected = np.stack([oracle.block_scores(row, length, cfg) for row in scores])
  np.testing.assert_array_equal(found, np.maximum(expected, 0).astype(np.float32))


@pytest.mark.parametrize("selection, lse", oracle.MODES)
@pytest.mark.parametrize("implementation", ["xla", "ref"])
def test_selection_by_score_regret(selection, lse, implementation):
  cfg = oracle.small(selection, lse)
  q, k, _ = oracle.draw(5, T, T, 4, 2, 8)
  ids, counts = select(q, k, cfg, implementation=implementation)
  assert ids.shape == (1, 2, T, 5) and ids.dtype == jnp.int32
  oracle.check_select(q[0], k[0], cfg, ids[0], counts[0])


@pytest.mark.parametrize("lse", ["exact", "coarse"])
def test_selection_over_tiles_of_windows(monkeypatch, lse):
  """Tiles of 5 of 49 windows (the last one overlaps), an offset that only the device knows,
  documents, padding; logits that grow along the row and are far above the first tile's."""
  cfg = oracle.small(lse=lse)
  rules, spots = sparse_grid.rule_of(cfg), np.arange(T)
  q, k, _ = oracle.draw(26, T, T, 4, 2, 8)
  k = k * (1 + 0.2 * spots[None, :, None, None]).astype(np.float32)
  fine, coarse = (xla.compress(jnp.asarray(k), rules, level) for level in (1, 4))
  assert fine.shape[1] == 49
  q = jnp.asarray(q[:, 40:])

  def run(start):
    f = jax.jit(lambda offset: xla.select_xla(q, fine, coarse, offset, start, rules, T))
    return f(jnp.full((1,), 40, jnp.int32))

  one = jnp.zeros((1, T - 40), jnp.int32)
  many = jnp.asarray(np.where(spots < 112, 0, np.where(spots < 190, 112, rule.NOWHERE)))[None, 40:]
  whole = [run(one), run(many)]
  monkeypatch.setattr(xla, "TILE", 5)
  tiled = [run(one), run(many)]
  jax.tree.map(np.testing.assert_array_equal, tiled, whole)
  oracle.check_select(q[0], k[0], cfg, *(x[0] for x in tiled[0]), q_offset=40)
  assert np.all(np.asarray(tiled[1][0])[:, :, 150:] == -1)


@pytest.mark.parametrize("choose", [ref.choose, choice.choose], ids=["ref", "bits"])
@PROPERTY
@hypothesis.given(data=st.data())
def test_choice_is_the_set_of_the_rule(choose, data):
  """On given scores with many ties: exactly the blocks that the rule takes, lower ones first."""
  selection = data.draw(st.sampled_from(["joint", "split"]))
  init = data.draw(st.integers(0, 2))
  cfg = oracle.small(
    selection,
    init_blocks=init,
    topk=data.draw(st.integers(init + 1, 5)),
    window_size=16 * data.draw(st.integers(0, 3)),
  )
  M = 12
  scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=M, max_size=M))
  cur = np.arange(-1, M)
  many = np.broadcast_to(np.asarray(scores, np.float32), (M + 1, M))
  first = jnp.zeros(M + 1, jnp.int32)
  ids, counts = choose(jnp.asarray(many), jnp.asarray(cur), sparse_grid.rule_of(cfg), first)
  assert counts[0] == 0 and np.all(ids[0] == -1)
  for row, count, c in zip(np.asarray(ids)[1:], np.asarray(counts)[1:], cur[1:], strict=True):
    assert set(row[:count].tolist()) == oracle.choose(scores, c, cfg)
    assert row[:count].tolist() == sorted(row[:count].tolist()) and np.all(row[count:] == -1)


@pytest.mark.parametrize("selection", ["joint", "split"])
def test_choice_by_bits_is_that_by_sorting(selection):
  """Rows of 70 blocks (three words), ties, tiny and large scores, documents that begin anywhere."""
  rng = np.random.default_rng(31)
  scores = rng.choice([0.0, 1e-38, 0.3, 0.3000001, 7.0, 3e38], size=(200, 70)).astype(np.float32)
  cur, first = rng.integers(-1, 70, 200), rng.integers(0, 40, 200)
  rules = sparse_grid.rule_of(oracle.small(selection, topk=20, init_blocks=2))
  args = (jnp.asarray(scores), jnp.asarray(cur), rules, jnp.asarray(first))
  for a, b in zip(choice.choose(*args), ref.choose(*args), strict=True):
    np.testing.assert_array_equal(a, b)


def test_equal_keys_take_the_lowest_blocks():
  q, k, _ = oracle.draw(6, T, T, 4, 2, 8)
  k = np.broadcast_to(k[:, :1], k.shape)
  ids, _ = select(q, np.ascontiguousarray(k), oracle.small())
  assert ids[0, 0, -1].tolist() == [0, 1, 10, 11, 12]
  ids, _ = select(q, np.ascontiguousarray(k), oracle.small("split"))
  assert ids[0, 0, -1].tolist() == [0, 1, 2, 11, 12]


@PROPERTY
@hypothesis.given(
  st.integers(0, 2**31 - 1), st.sampled_from(oracle.MODES), st.sampled_from([0.5, 2.0, 8.0])
)
def test_scaling_scores_leaves_the_choice(seed, mode, factor):
  scores = np.random.default_rng(seed).random((9, 12)).astype(np.float32)
  rules, cur = sparse_grid.rule_of(oracle.small(*mode)), jnp.arange(3, 12)
  same = [ref.choose(jnp.asarray(s), cur, rules)[0] for s in (scores, factor * scores)]
  np.testing.assert_array_equal(*same)


# --- Stage 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "heads, width, mode",
  [
    ((1, 1), 8, ("joint", "coarse")),
    ((1, 1), 8, ("split", "exact")),
    ((4, 2), 8, ("joint", "exact")),
    ((4, 2), 8, ("split", "coarse")),
    ((16, 1), 8, ("joint", "exact")),
    ((32, 2), 128, ("joint", "coarse")),
    ((32, 2), 128, ("split", "exact")),
    ((32, 1), 8, ("joint", "coarse")),
    ((32, 1), 8, ("split", "exact")),
  ],
  ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_attention_over_the_selected_blocks(heads, width, mode):
  """Groups of 1, 2, 16, 32; 32 heads of width 128 on 2 key heads are MiniCPM4.1-8B's.

  Queries 40 times as large: no bound on their scores is near, so the maxima are computed.
  """
  N, K = heads
  cfg = oracle.small(*mode)
  q, k, v = oracle.draw(7, T, T, N, K, width)
  for scale, atol in ((1, 2e-5), (40, 2e-4)):
    ids, counts = select(scale * q, k, cfg)
    rows = range(T - 20, T, 1 if N < 32 else 6)
    oracle.check_select(scale * q[0], k[0], cfg, ids[0], counts[0], rows=rows)
    expected = oracle.attend_with(scale * q[0], k[0], v[0], cfg, ids[0])
    np.testing.assert_allclose(attend(scale * q, k, v, cfg)[0], expected, atol=atol)


def test_the_reference_of_the_softmax_is_computed_where_no_bound_is_near(monkeypatch):
  """Both branches of `_reference` are taken, and by the queries that need them."""
  seen = []
  exact = attention_xla._pairs_top

  def watch(*args):
    jax.debug.callback(lambda: seen.append(1))
    return exact(*args)

  monkeypatch.setattr(attention_xla, "_pairs_top", watch)
  q, k, v = map(jnp.asarray, oracle.draw(30, 48, 48, 1, 1, 8))
  run = jax.jit(lambda q: sparse_attention.infllm_attention(q, k, v, oracle.small(topk=2)))
  run(q).block_until_ready()
  jax.effects_barrier()
  assert not seen
  run(40 * q).block_until_ready()
  jax.effects_barrier()
  assert seen


def test_values_of_a_shorter_type_than_the_keys():
  q, k, v = (jnp.asarray(x) for x in oracle.draw(23, T, T, 4, 2, 8))
  run = lambda v: attend(8 * q, k, v, oracle.small())  # noqa: E731
  v = v.astype(jnp.float16)
  np.testing.assert_allclose(run(v), run(v.astype(jnp.float32)), atol=5e-3)


def test_a_budget_of_local_blocks_only():
  """No initial block and one place beside the window: lists without any other block."""
  cfg = oracle.small(init_blocks=0, topk=1)
  q, k, v = oracle.draw(29, T, T, 4, 2, 8)
  expected = oracle.attend_with(q[0], k[0], v[0], cfg, select(q, k, cfg)[0][0])
  np.testing.assert_allclose(attend(q, k, v, cfg)[0], expected, atol=2e-5)


@pytest.mark.parametrize("width", [24, 80])
def test_any_head_width_and_length(width):
  cfg = oracle.small("split")
  q, k, v = oracle.draw(8, 117, 117, 2, 1, width)
  ids, _ = select(q, k, cfg)
  expected = oracle.attend_with(q[0], k[0], v[0], cfg, ids[0])
  np.testing.assert_allclose(attend(q, k, v, cfg)[0], expected, atol=2e-5)


def test_full_coverage_is_dense():
  """Fewer blocks than the budget: nothing is left out (section 7)."""
  cfg = oracle.small(topk=12)
  q, k, v = oracle.draw(9, T, T, 4, 2, 8)
  expected = flash.flash_attention(*map(jnp.asarray, (q, k, v)), implementation="ref")
  np.testing.assert_allclose(attend(q, k, v, cfg), expected, atol=2e-6)


def test_bfloat16_error_is_that_of_plain_attention():
  cfg = oracle.small()
  q, k, v = oracle.draw(10, T, T, 4, 2, 16)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  ids, _ = select(*low[:2], cfg)
  expected = oracle.attend_with(q[0], k[0], v[0], cfg, ids[0])
  found = attend(*low, cfg)[0]
  assert found.dtype == jnp.bfloat16
  mask = np.zeros((1, 2, T, T), bool)
  for h in range(2):
    for t in range(T):
      mask[0, h, t] = np.isin(np.arange(T) // 16, np.asarray(ids[0, h, t])) & (np.arange(T) <= t)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", low[0].reshape(1, T, 2, 2, 16), low[1]) / 4
  probs = jax.nn.softmax(jnp.where(mask[:, :, None], scores.astype(jnp.float32), -jnp.inf))
  plain = jnp.einsum("BKGTS,BSKH->BTKGH", probs.astype(jnp.bfloat16), low[2]).reshape(T, 4, 16)
  error, bound = (np.max(np.abs(np.asarray(x, np.float64) - expected)) for x in (found, plain))
  assert error <= 2 * bound + 1e-3


@functools.partial(jax.jit, static_argnames="implementation")
def attend_lists(q, k, v, ids, implementation="xla"):
  return attention_api.attend_blocks(q, k, v, ids, block_size=16, implementation=implementation)


@PROPERTY
@hypothesis.given(st.integers(0, 2**31 - 1))
def test_order_of_the_list_changes_nothing(seed):
  q, k, v = oracle.draw(seed % 1000, 96, 96, 2, 1, 8)
  ids = oracle.small_lists(seed, 96, 6, 4)
  other = np.random.default_rng(seed).permuted(ids, axis=-1)
  for a, b in zip(attend_lists(q, k, v, ids), attend_lists(q, k, v, other), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_lists_count_blocks_from_slot_0_also_beside_document_starts():
  """`start_BT` hides slots and shifts no block."""
  q, k, v = oracle.draw(12, 96, 96, 2, 1, 8)
  ids = oracle.small_lists(4, 96, 6, 4)
  ids = np.where(ids > 1, ids, -1)
  start = jnp.full((1, 96), 32, jnp.int32)
  for implementation in ("xla", "gather", "ref"):
    more = dict(block_size=16, start_BT=start, implementation=implementation)
    out, lse = attention_api.attend_blocks(q, k, v, ids, **more)
    plain, plain_lse = attend_lists(q, k, v, ids)
    np.testing.assert_allclose(out[:, 32:], plain[:, 32:], atol=2e-5)
    np.testing.assert_allclose(lse[:, 32:], plain_lse[:, 32:], atol=2e-5)


def test_lse_merges_partitions():
  """Two halves of a list, merged by log-sum-exp, are the whole list; nothing gives -inf and 0."""
  q, k, v = oracle.draw(11, 96, 96, 2, 1, 8)
  ids = oracle.small_lists(3, 96, 6, 4)
  parts = [np.where(np.arange(4) % 2 == i, ids, -1) for i in (0, 1)]
  (out, lse), *pairs = (attend_lists(q, k, v, x) for x in (ids, *parts))
  weights = [np.exp(np.asarray(x) - np.asarray(lse))[..., None] for _, x in pairs]
  merged = sum(w * np.asarray(o) for w, (o, _) in zip(weights, pairs, strict=True))
  np.testing.assert_allclose(merged, out, atol=1e-5)
  empty, nothing = attend_lists(q, k, v, np.full_like(ids, -1))
  assert not np.any(empty) and np.all(nothing == -np.inf)


@pytest.mark.parametrize("implementation", ["xla", "gather", "ref"])
def test_lists_without_promise_follow_the_definition(implementation):
  """The pair form without a band: causality by token inside the current block."""
  q, k, v = oracle.draw(12, 96, 96, 2, 1, 8)
  ids = oracle.small_lists(4, 96, 6, 4)
  out, _ = attend_lists(q, k, v, ids, implementation)
  expected = oracle.attend_with(q[0], k[0], v[0], oracle.small(), ids[0])
  np.testing.assert_allclose(out[0], expected, atol=2e-5)


@pytest.mark.parametrize("num_local", [0, 3])
def test_chunks_and_tiles_agree(num_local):
  """Small chunks, tiles of a few pairs and keys change nothing but rounding."""
  q, k, v = oracle.draw(18, 150, 160, 2, 1, 8)
  rules = sparse_grid.rule_of(oracle.small())
  fine = xla.compress(jnp.asarray(k), rules)
  start = jnp.zeros((1, 150), jnp.int32)
  ids, _ = xla.select_xla(jnp.asarray(q), fine, fine, 10, start, rules, 160)
  tiny = attention_xla.XlaConfig(chunk=16, tile=4, band_queries=8, band_keys=24)

  def run(config):
    def f(q, k, v):
      more = dict(block_size=16, q_offset=10, config=config, implementation="xla")
      more["num_local"] = num_local
      return attention_api.attend_blocks(q, k, v, ids, **more)[0]

    return jax.jit(lambda *x: (f(*x), jax.grad(lambda *y: jnp.sum(jnp.sin(f(*y))), (0, 1, 2))(*x)))

  args = tuple(map(jnp.asarray, (q, k, v)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run(tiny)(*args), run(None)(*args)
  )
  assert rule.Rule().num_selected == 96


def test_values_far_above_one_are_averaged_where_a_query_scores_its_own_key_lowest():
  """All keys but the query's own score 120 above it: the largest reference that is not exact."""
  T, S, H, block = 32, 4096, 8, 64
  k, v = np.zeros((1, S, 1, H), np.float32), np.full((1, S, 1, H), 1e4, np.float32)
  k[0, :-T, 0, 0], k[0, -T:, 0, 0] = 10.0, -2.0
  q = np.zeros((1, T, 2, H), np.float32)
  q[..., 0] = 10 * H**0.5  # scores 100 and -20
  ids = np.broadcast_to(np.arange(S // block, dtype=np.int32), (1, 1, T, S // block))
  for num_local in (0, 3):
    more = dict(num_local=num_local, q_offset=S - T, implementation="xla")
    out, lse = attention_api.attend_blocks(*map(jnp.asarray, (q, k, v, ids)), **more)
    np.testing.assert_allclose(out, 1e4, rtol=1e-4)
    np.testing.assert_allclose(lse, 100 + np.log(S - T), rtol=1e-5)


# --- Offsets, chunks, causality ------------------------------------------------------------------


@pytest.mark.parametrize("selection, lse", [("joint", "coarse"), ("split", "exact")])
@pytest.mark.parametrize("chunk", [15, 48])
def test_chunked_prefill_equals_one_pass(selection, lse, chunk):
  """Every chunk sees the keys so far and no more; starts of any residue."""
  cfg = oracle.small(selection, lse)
  length = 143  # = 15 mod 16 (and mod 64): the rows that a published formula gets wrong
  q, k, v = oracle.draw(19, length, length, 2, 1, 8)
  whole, (ids, _) = attend(q, k, v, cfg), select(q, k, cfg)
  starts = range(0, length, chunk) if chunk > 15 else (0, 1, 15, 16, 31, 60, 128)
  capacity = np.zeros((1, 160, 1, 8), np.float32)
  for start in starts:
    end = min(length, start + chunk)
    k_part, v_part = capacity.copy(), capacity.copy()
    k_part[:, :end], v_part[:, :end] = k[:, :end], v[:, :end]
    k_part[:, end:] = v_part[:, end:] = 1e4  # unused rows
    part = q[:, start:end]
    found_ids, _ = select(part, k_part, cfg, None, start)
    np.testing.assert_array_equal(found_ids, ids[:, :, start:end])
    found = attend(part, k_part, v_part, cfg, None, start, end)
    np.testing.assert_allclose(found, whole[:, start:end], atol=2e-6)


@PROPERTY
@hypothesis.given(st.integers(0, T - 1), st.sampled_from([oracle.MODES[1], oracle.MODES[2]]))
def test_later_keys_never_matter(pos, mode):
  cfg = oracle.small(*mode)
  q, k, v = oracle.draw(20, T, T, 4, 2, 8)
  before = np.asarray(attend(q, k, v, cfg))[:, : pos + 1]
  k, v = k.copy(), v.copy()
  k[:, pos + 1 :], v[:, pos + 1 :] = 7.0, -3.0
  np.testing.assert_allclose(np.asarray(attend(q, k, v, cfg))[:, : pos + 1], before, atol=1e-6)


# --- Packing and the switch ----------------------------------------------------------------------


def test_packed_documents_are_separate_ones():
  """Aligned starts against the definition of each; padding rows are 0 and get no gradient."""
  cfg = oracle.small(lse="coarse")
  lengths, starts = (90, 21, 43), (0, 112, 160)
  q, k, v = oracle.draw(21, T, T, 4, 2, 8)
  dout = oracle.draw(28, T, T, 4, 2, 8)[0]
  ids = np.zeros((1, T), np.int32)
  for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
    ids[0, start : start + length] = i + 1

  @jax.jit
  def both(q, k, v):
    out, pull = jax.vjp(lambda *x: attend(*x, cfg, ids), q, k, v)
    return out, pull(jnp.asarray(dout))

  out, grads = jax.tree.map(np.asarray, both(q, k, v))
  lists, counts = map(np.asarray, select(q, k, cfg, ids))
  for start, length in zip(starts, lengths, strict=True):
    one = slice(start, start + length)
    own = [x[0, one] for x in (q, k, v)]
    oracle.check_select(*own[:2], cfg, lists[0, :, one], counts[0, :, one])
    np.testing.assert_allclose(
      out[0, one], oracle.attend_with(*own, cfg, lists[0, :, one]), atol=2e-5
    )
    expected = oracle.gradients(*own, dout[0, one], cfg, lists[0, :, one])
    for a, b in zip(grads, expected, strict=True):
      np.testing.assert_allclose(a[0, one], b, atol=1e-4)
  for array in (out, *grads):
    assert not np.any(array[ids == 0])


def test_unaligned_documents():
  """ "auto" sees them and takes the reference; "xla" refuses; under jit the answer is NaN."""
  cfg = oracle.small()
  q, k, v = oracle.draw(22, T, T, 4, 2, 8)
  ids = np.repeat([1, 2], [67, T - 67])[None]
  arrays = [jnp.asarray(x) for x in (q, k, v)]
  out = sparse_attention.infllm_attention(*arrays, cfg, segment_ids=ids)
  lists = sparse_attention.select_blocks(*arrays[:2], cfg, segment_ids=ids)
  lists, counts = map(np.asarray, lists)
  for one in (slice(0, 67), slice(67, T)):
    own = [x[0, one] for x in (q, k, v)]
    oracle.check_select(*own[:2], cfg, lists[0, :, one], counts[0, :, one])
    np.testing.assert_allclose(
      out[0, one], oracle.attend_with(*own, cfg, lists[0, :, one]), atol=2e-5
    )
  with pytest.raises(NotImplementedError, match="data.align"):
    sparse_attention.infllm_attention(*arrays, cfg, segment_ids=ids, implementation="xla")
  blind = np.asarray(attend(q, k, v, cfg, ids))
  assert np.all(np.isfinite(blind[:, :67])) and np.all(np.isnan(blind[:, 67:]))


@pytest.mark.parametrize("B, num", [(1, 0), (0, 4)])
def test_no_queries_and_no_rows_give_nothing(B, num):
  q, k = jnp.zeros((B, num, 4, 8)), jnp.zeros((B, T, 2, 8))
  ids, counts = select(q, k, oracle.small(), q_offset=T - num)
  assert ids.shape[:3] == counts.shape == (B, 2, num)
  for cfg in (oracle.small(), oracle.small(dense_len=2 * T)):
    grad = jax.grad(lambda q, cfg=cfg: jnp.sum(attend(q, k, k, cfg, q_offset=T - num)))(q)
    assert grad.shape == q.shape


def test_the_switch_at_dense_len():
  q, k, v = oracle.draw(23, T, T, 4, 2, 8)
  dense = jax.jit(flash.flash_attention)(q, k, v)
  sparse = attend(q, k, v, oracle.small())
  np.testing.assert_array_equal(attend(q, k, v, oracle.small(dense_len=T + 1)), dense)
  np.testing.assert_array_equal(attend(q, k, v, oracle.small(dense_len=T)), sparse)
  assert np.max(np.abs(dense - sparse)) > 1e-2


def test_the_switch_is_per_sequence():
  """kv_length 95 and 203 of two rows, then packed documents of 112 and 91, around dense_len 100."""
  cfg, always = oracle.small(dense_len=100), oracle.small()
  q, k, v = oracle.draw(24, T, T, 4, 2, 8)
  dense, sparse = jax.jit(flash.flash_attention)(q, k, v), attend(q, k, v, always)
  twice = [np.concatenate((x, x)) for x in (q, k, v)]
  found = attend(*twice, cfg, None, 0, np.array([95, T]))
  np.testing.assert_allclose(found[0, :95], dense[0, :95], atol=2e-6)
  np.testing.assert_allclose(found[1], sparse[0], atol=2e-6)
  assert not np.any(found[0, 95:])
  ids = np.repeat([1, 2], [112, 91])[None]
  run = jax.jit(
    lambda *x: [
      sparse_attention.infllm_attention(*x, cfg, segment_ids=ids, switch=switch)
      for switch in ("sequence", "batch")
    ]
  )
  each, batch = run(q, k, v)
  apart = attend(q, k, v, always, ids)  # every document sparse
  np.testing.assert_allclose(batch, apart, atol=2e-6)
  np.testing.assert_allclose(each[:, :112], apart[:, :112], atol=2e-6)
  second = [x[:, 112:] for x in (q, k, v)]
  np.testing.assert_allclose(each[:, 112:], jax.jit(flash.flash_attention)(*second), atol=2e-6)
  assert np.max(np.abs(each - apart)) > 1e-2


def test_scores_before_rope():
  cfg = oracle.small(use_nope=True)
  q, k, v = oracle.draw(25, T, T, 2, 1, 8)
  other = oracle.draw(26, T, T, 2, 1, 8)[:2]
  with pytest.raises(ValueError, match="before RoPE"):
    sparse_attention.infllm_attention(*map(jnp.asarray, (q, k, v)), cfg)
  run = jax.jit(lambda *x: sparse_attention.infllm_attention(*x[:3], cfg, nope=x[3:]))
  ids, _ = select(*other, cfg)
  expected = oracle.attend_with(q[0], k[0], v[0], cfg, ids[0])
  np.testing.assert_allclose(run(q, k, v, *other)[0], expected, atol=2e-5)


# --- The released sizes --------------------------------------------------------------------------


def test_released_geometry():
  """32 / 16 / 64 with a small budget: 1300 tokens, the last rows against the definition."""
  cfg = SparseAttentionConfig(window_size=256, topk=4, dense_len=-1, lse="coarse")
  q, k, v = oracle.draw(27, 1300, 1300, 2, 1, 16)
  ids, counts = select(q, k, cfg)
  oracle.check_select(q[0], k[0], cfg, ids[0], counts[0], rows=(31, 126, 127, 700, 1023, 1299))
  last = np.asarray(ids)[0, :, -1:]
  expected = oracle.attend_with(q[0, -1:], k[0], v[0], cfg, last, q_offset=1299)
  np.testing.assert_allclose(attend(q, k, v, cfg)[0, -1:], expected, atol=2e-5)


def test_memory_of_a_32k_prefill():
  """One layer, 32 heads, 2 key heads, width 128: below 3 GiB of temporaries (compiled, not run)."""
  shapes = [jax.ShapeDtypeStruct((1, 32768, n, 128), jnp.float32) for n in (32, 2, 2)]
  cfg = SparseAttentionConfig(lse="coarse")
  compiled = jax.jit(lambda *x: sparse_attention.infllm_attention(*x, cfg)).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2**30


def attend_up_to(q, kv_length):
  return sparse_attention.infllm_attention(q, q, q, oracle.small(), kv_length=kv_length)


def nope_of(q, nope):
  """As of callers without the type-checking hook."""
  sparse_attention._check_nope(nope, q, q)


def check_shapes(q, *args):
  """What callers without the type-checking hook of the tests are told."""
  sparse_attention._check_shapes(q, *args)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda q: sparse_attention.select_blocks(q[:, :, :3], q[:, :, :2], oracle.small()), "3 heads"),
    (lambda q: sparse_attention.select_blocks(q, q, oracle.small(), q_offset=1), "q_offset"),
    (lambda q: attend_up_to(q, 21), "kv_length: found 21, expected 0..20"),
    (lambda q: nope_of(q, None), "nope: found shapes None"),
    (lambda q: nope_of(q, (q[:, :3], q)), r"nope: found shapes \(\(1, 3, 4, 8\), "),
    (lambda q: check_shapes(q, q[..., :4], 0, None), r"k: found shape \(1, 20, 4, 4\)"),
    (lambda q: check_shapes(q, q, 0, None, q[:, :, :2]), r"v: found shape \(1, 20, 2, 8\)"),
    (lambda q: check_shapes(q, q, 0, np.ones((1, 9))), r"segment_ids: found shape \(1, 9\)"),
    (lambda q: check_shapes(q, q, 0, np.ones((1, 20))), "segment_ids: found float"),
    (lambda q: check_shapes(q, q[0], 0, None), r"k: found shape \(20, 4, 8\), expected \[batch"),
    (lambda q: check_shapes(q, q[:, :, :0], 0, None), "k: found 0 heads of width 8"),
    (lambda q: check_shapes(q, q[:, :9], 0, None), "k: found 9 keys, expected at least as many"),
    (lambda q: check_shapes(q, q, 0.5, None), "q_offset: found 0.5, expected an integer"),
    (lambda q: check_shapes(q, q, np.zeros(2, int), None), "q_offset: found .*or 1: one a row"),
    (lambda q: sparse_attention._check_names("auto", "row"), "switch: found 'row'"),
    (lambda q: oracle.small(topk=1), "topk"),
    (lambda q: oracle.small("split", topk=0), "topk"),
    (lambda q: oracle.small(kernel_size=10), "kernel_size: found 10, expected a multiple"),
    (lambda q: oracle.small(block_size=18), "block_size: found 18, expected a multiple"),
    (lambda q: oracle.small(kernel_stride=0), "kernel_stride: found 0"),
    (lambda q: dataclasses.replace(oracle.small(), window_size=40), "window_size"),
    (lambda q: SparseAttentionConfig.from_hf({"blocks": 3}), "blocks"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.zeros((1, 20, 4, 8)))


def test_unknown_backends_are_refused_where_dense_attention_runs_too():
  with pytest.raises(NotImplementedError, match="implementation: found 'cuda', expected one of"):
    sparse_attention._check_names("cuda", "sequence")
