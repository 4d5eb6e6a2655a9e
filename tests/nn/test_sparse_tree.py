"""A draft tree's nodes behind a cache, each against the committed tokens and its own path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.nn import kv, sparse_attention, sparse_cache, sparse_tree
from pallas_kernels.sparse_topk import api as topk_api
from pallas_kernels.sparse_topk import xla as topk_xla
from tests.pallas_kernels import sparse_suite as suite

CFG = config.SparseAttentionConfig(
  kernel_size=8,
  kernel_stride=4,
  block_size=16,
  window_size=32,
  topk=3,
  init_blocks=1,
  dense_len=-1,
  selection="joint",
  lse="exact",
)
LENGTHS = (187, 70)  # with 5 tokens and more the first row completes a coarse window (192)
SLOTS, HEADS, KV_HEADS, WIDTH = 256, 6, 2, 8


def make_tree(rng, num: int, longest: int):
  depth, anc = np.zeros(num, np.int32), np.eye(num, dtype=bool)
  for node in range(1, num):
    parent = node - 1 if node <= longest else rng.integers(0, node)
    depth[node], anc[node] = depth[parent] + 1, anc[node] | anc[parent]
  return depth, anc


def make(
  num: int, cfg=CFG, lengths=LENGTHS, slots=SLOTS, longest=8, width=WIDTH, dtype=jnp.float32
):
  """(queries, keys, values of the nodes, cache with garbage behind the length, grid).

  The nodes' keys are long: their windows weigh in the normalisers of some heads, which changes what
  a group's sum ranks first.
  """
  rng = np.random.default_rng(num)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  B = len(lengths)
  q, k_new, v_new = (normal(B, num, n, width) for n in (HEADS, KV_HEADS, KV_HEADS))
  k_new *= 6
  k, v = normal(B, slots, KV_HEADS, width), normal(B, slots, KV_HEADS, width)
  levels = {}
  for level, scale in sparse_cache.LEVELS.items():
    entries = 9 * normal(B, sparse_cache.num_entries(cfg, level, slots), KV_HEADS, width)
    for row, length in enumerate(lengths):
      rule = sparse_attention.sparse_grid.rule_of(cfg)
      whole = topk_xla.compress(jnp.asarray(k[[row], :length]), rule, scale)
      entries[row, : whole.shape[1]] = whole[0]
    levels[level] = jnp.asarray(entries, dtype)
  for row, length in enumerate(lengths):
    k[row, length : length + num], v[row, length : length + num] = k_new[row], v_new[row]
  length_B = jnp.asarray(lengths, jnp.int32)
  cache = kv.LayerCache(k=jnp.asarray(k, dtype), v=jnp.asarray(v, dtype), length=length_B, **levels)
  depth, anc = (np.broadcast_to(x, (B, *x.shape)) for x in make_tree(rng, num, longest))
  grid = sparse_tree.TreeGrid(length_B, jnp.asarray(depth), jnp.asarray(anc))
  return *(jnp.asarray(x, dtype) for x in (q, k_new, v_new)), cache, grid


def attend(q, k, v, cache, grid, cfg=CFG):
  return sparse_tree.attend_tree(q, k, v, q, cache, cfg, grid)


@pytest.mark.parametrize(
  "num, selection, lse, dense_len",
  [(12, "joint", "exact", 192), (12, "split", "coarse", -1), (40, "joint", "coarse", 192)],
)
def test_a_node_attends_as_its_path_does(num, selection, lse, dense_len, monkeypatch):
  """Trees of 12 and of 40 (scores over tiles of 16 windows): own windows, the switch, two rows."""
  monkeypatch.setattr(topk_xla, "TILE", 16)
  cfg = dataclasses.replace(CFG, selection=selection, lse=lse, dense_len=dense_len)
  arrays = make(num, cfg)
  out = jax.jit(lambda *a: attend(*a, cfg))(*arrays)
  q, _, _, cache, grid = arrays
  whole = jax.jit(
    lambda q, k, v, length: sparse_attention.infllm_attention(
      q, k, v, cfg, q_offset=length - 1, kv_length=length, implementation="ref"
    )
  )
  for row, length in enumerate(LENGTHS):
    for node in range(0, num, 1 if num < 20 else 3):
      path = length + np.nonzero(np.asarray(grid.anc_BPP[row, node]))[0]
      slots = np.concatenate([np.arange(length), path, np.zeros(SLOTS - length - len(path), int)])
      k, v = cache.k[row][slots][None], cache.v[row][slots][None]
      expected = whole(q[row : row + 1, node : node + 1], k, v, jnp.int32(length + len(path)))
      np.testing.assert_allclose(out[row, node], expected[0, 0], atol=2e-5, err_msg=f"{row} {node}")


def test_nodes_share_the_compressed_keys():
  """By the compiler's count the temporaries are less than a copy for every second node."""
  q, k, v, cache, grid = make(12, lengths=(8000,), slots=8192, width=64)
  names = ("k", "v", "fine", "coarse", "length")

  def run(q, k, v, held):
    return attend(q, k, v, kv.LayerCache(**held), grid)

  held = {name: getattr(cache, name) for name in names}
  memory = jax.jit(run).lower(q, k, v, held).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 12 * (cache.fine.nbytes + cache.coarse.nbytes) / 2


def test_nodes_on_a_mesh_stand_behind_all_committed_tokens(monkeypatch):
  """Also those of a device that has later nodes: kernels read `q_offset`, the XLA form does not."""
  arrays = make(12)
  expected = jax.jit(attend)(*arrays)
  mesh = mesh_lib.make_mesh(config.MeshConfig(cp=2, tp=2), jax.devices()[:4])
  seen = []

  def select(q_BTNH, *args, q_offset, **kwargs):
    seen.append(q_BTNH.shape)
    ids, counts = topk_select(q_BTNH, *args, q_offset=q_offset, **kwargs)
    is_right = jnp.all(jnp.isin(jnp.broadcast_to(q_offset, ids.shape[:1]), jnp.array(LENGTHS)))
    return jnp.where(is_right, ids, -1), counts

  topk_select = topk_api.select_blocks
  monkeypatch.setattr(topk_api, "select_blocks", select)
  with jax.set_mesh(mesh):
    found = jax.jit(lambda *args: attend(*args))(*arrays)
  assert seen == [(2, 6, HEADS // 2, WIDTH)]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_nodes_that_are_not_those_of_the_queries_are_refused():
  args, nodes = suite.tree_inputs(suite.small_rule("joint", "exact"), 3, slots=100)
  q, fine, coarse, length, _, rule, slots = args
  with pytest.raises(ValueError, match=r"nodes.pos_BT: found \(2, 3\) rows .* expected \(2, 2\)"):
    topk_api.select_blocks(
      q[:, :2], fine, coarse, rule=rule, num_slots=slots, q_offset=length, nodes=nodes
    )
