"""Values of the Triton kernels. Run by test_triton.py in a process with TRITON_INTERPRET=1."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import mosaic_gpu, tiles
from pallas_kernels.sparse_attention import triton as attention
from pallas_kernels.sparse_decode import triton as decoding
from pallas_kernels.sparse_topk import few
from pallas_kernels.sparse_topk import ref as topk_ref
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.sparse_topk import triton as topk
from pallas_kernels.sparse_topk import xla as topk_xla
from tests.pallas_kernels import sparse_suite as suite

pytestmark = pytest.mark.usefixtures("on_the_host")


@pytest.mark.parametrize("selection, lse", [("joint", "exact"), ("split", "coarse")])
def test_select(selection, lse):
  config = topk.TritonConfig(block_q=4, block_c=8)
  suite.check_select(
    lambda *a: topk.select_triton(*a, config=config), suite.small_rule(selection, lse)
  )


@pytest.mark.parametrize("selection, lse", [("joint", "coarse"), ("split", "exact")])
def test_select_packed(selection, lse):
  config = topk.TritonConfig(block_q=2, block_c=4, max_score_bytes=4 * 2 * 8 * 24)
  suite.check_select_packed(
    lambda *a: topk.select_triton(*a, config=config), suite.small_rule(selection, lse)
  )


@pytest.mark.parametrize(
  "selection, lse, num_queries, offset",
  [("joint", "exact", 1, 95), ("split", "coarse", 5, 701), ("joint", "exact", 16, 75)],
)
def test_select_few(selection, lse, num_queries, offset):
  """Of one row by programs that share the keys: two tiles of them at 701."""
  rule = suite.small_rule(selection, lse)
  suite.check_select(few.select, rule, num_queries=num_queries, offset=offset)
  if num_queries == 1:
    suite.check_select_packed(few.select, rule, T=12)


@pytest.mark.parametrize("lse, num_nodes, most", [("exact", 5, 16), ("coarse", 6, 4)])
def test_select_nodes(lse, num_nodes, most, monkeypatch):
  """The ids of the XLA form, whole and in runs of 4: two tiles of common keys, two own windows."""
  monkeypatch.setattr(few, "is_served", lambda q, K: q.shape[1] <= most)
  rule = dataclasses.replace(suite.small_rule("split", lse), topk=4)  # three free choices
  args, nodes = suite.tree_inputs(rule, num_nodes)
  found = few.select_nodes(*args, nodes)
  for x, y in zip(found, topk_xla.select_xla(*args, nodes=nodes), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("selection", ["joint", "split"])
def test_select_from_given_scores(selection):
  """The ids of a top-k of the reference: many ties, zeros, all equal, 60 powers of ten, 3e38;
  rows of 16 to 128 blocks (three widths of the kernel), documents, padding."""
  rule = rules.Rule(
    kernel_size=8, kernel_stride=4, block_size=16, local_blocks=2, topk=6, selection=selection
  )
  rng = np.random.default_rng(7)
  B, T, K, slots = 3, 9, 1, 16 * 100
  q, fine = jnp.zeros((B, T, K, 8)), jnp.zeros((B, rule.num_windows(slots), K, 8))
  offset = np.array([0, 600, slots - T], np.int32)
  pos = offset[:, None] + np.arange(T, dtype=np.int32)[None, :]
  start = np.zeros((B, T), np.int32)
  start[1], start[2, 3:5], start[2, 5] = 48, 160, rules.NOWHERE
  config = topk.TritonConfig(block_q=4, block_c=4)
  rows, _, choose = topk.runs(
    q, fine, fine, jnp.asarray(offset), jnp.asarray(start), rule, slots, config
  )
  M = rule.num_blocks(slots)
  kinds = [
    rng.integers(0, 5, (B, M)) / 4,
    rng.random((B, M)),
    10.0 ** rng.integers(-37, 23, (B, M)),
    np.where(rng.random((B, M)) < 0.1, 3e38, rng.random((B, M))),
    np.full((B, M), rng.random()),
    np.where(rng.random((B, M)) < 0.95, 0.0, rng.random((B, M))),
  ]
  scores = np.stack([kinds[t % len(kinds)] for t in range(rows)], axis=1).astype(np.float32)
  found = choose(np.int32(0), jnp.asarray(scores)[:, None])
  cur = np.where(pos >= start, pos // 16, -1).ravel()
  expected = topk_ref.choose(
    jnp.asarray(scores[:, :T].reshape(B * T, M)),
    jnp.asarray(cur),
    rule,
    jnp.asarray(start // 16).ravel(),
  )
  for x, y in zip(found, expected, strict=True):
    x = np.asarray(x)[:, 0, :T]
    np.testing.assert_array_equal(x.reshape(np.asarray(y).shape), y)


@pytest.mark.parametrize("num_local", [0, 2])
def test_attend(num_local):
  config = attention.TritonConfig(run_queries=16, kv_rows=16, band_rows=32, band_keys=32)
  suite.check_attend(
    lambda *a, **kw: attention.attend_triton(*a, config=config, **kw), num_local=num_local
  )


def test_attend_backward_on_residuals_of_mosaic_gpu():
  config = mosaic_gpu.MosaicGpuConfig(backward="triton")
  suite.check_attend(
    lambda *a, **kw: mosaic_gpu.attend_mosaic_gpu(*a, config=config, **kw), num_local=2, T=37, H=16
  )


@pytest.mark.parametrize("splits", [2, 8])  # of lists of 5 blocks
def test_decode(splits):
  config = decoding.TritonConfig(num_splits=splits)
  for layout in suite.LAYOUTS:
    suite.check_decode(lambda *a, **kw: decoding.decode_triton(*a, config=config, **kw), layout)


@pytest.mark.parametrize("num_blocks, W, queries", [(300, 5, 31), (140, 130, 2), (3, 4, 12)])
def test_attend_union(num_blocks, W, queries, monkeypatch):
  """`tiles.union` of the lists: 3 rows, a last tile that is not full, an entry twice in a list."""
  monkeypatch.setattr(tiles, "UNION_PROGRAMS", 4)
  rng = np.random.default_rng(0)
  shape = (3, 2, 70, W)
  ids = np.where(rng.random(shape) < 0.3, -1, rng.integers(0, num_blocks, shape))
  ids[1, 0, :40] = -1
  ids[2, 1, 3, :2] = 2
  ids = jnp.asarray(ids, jnp.int32)
  found = tiles.listed(ids, queries, num_blocks, has_triton=True)
  for x, y in zip(found, tiles.listed(ids, queries, num_blocks), strict=True):
    np.testing.assert_array_equal(x, y)
