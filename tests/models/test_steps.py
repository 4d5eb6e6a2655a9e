"""Forwards on a cache with one length a row: chunks, trees and commits against whole forwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.nn import kv
from tests.infer import small
from tests.models import common

CHUNK, SLOTS = 16, 70  # no whole blocks
LENGTHS = (
  46,
  39,
)  # with up to 4 nodes the first row completes a coarse window (48), both fine ones
PARENTS = [0, 0, 0, 1, 1, 3, 5]
SPARSE = dataclasses.replace(small.SPARSE, dense_len=-1)
MLA = config.MLAConfig(
  q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
VARIANTS = {
  "unrolled": {},
  "scan": dict(scan_layers=True),
  "mla": dict(arch="minicpm3", head_dim=12, num_kv_heads=4, mla=MLA),
  "sparse": dict(sparse=SPARSE),
  "sparse_nope_scan": dict(
    sparse=dataclasses.replace(SPARSE, use_nope=True, selection="split", lse="exact"),
    scan_layers=True,
  ),
}


def tree_arrays():
  depth, anc = np.zeros(7, np.int32), np.eye(7, dtype=bool)
  for node in range(1, 7):
    depth[node] = depth[PARENTS[node]] + 1
    anc[node] |= anc[PARENTS[node]]
  return depth, anc


class Runner:
  """Jitted pieces of one model."""

  def __init__(self, model, params):
    self.model, self.params = model, params
    self.chunk = jax.jit(self._chunk)
    self.tree = jax.jit(self._tree)
    self.one = jax.jit(lambda cache, tok: self._apply(tok, cache))
    self.commit = jax.jit(lambda cache, path, num: cache_lib.commit(model.cfg, cache, path, num))

  def _apply(self, tokens, cache, **step):
    step = cache_lib.Step(**step)
    out = self.model.apply({"params": self.params}, tokens, cache=cache, step=step)
    return out.logits, out.cache

  def _chunk(self, cache, tokens_1C, num, row, total):
    more = dict(num_new_B=num[None], row=row, total_B=total[None])
    return self._apply(tokens_1C, cache, **more)

  def _tree(self, cache, tok_BP):
    depth, anc = (jnp.broadcast_to(x, (2, *x.shape)) for x in tree_arrays())
    return self._apply(tok_BP, cache, anc_BTT=anc, depth_BT=depth)

  def noise(self):
    """An empty cache full of garbage: what lies behind the length must not matter."""
    cache, rng = cache_lib.init(self.model.cfg, 2, SLOTS, per_row=True), np.random.default_rng(1)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)  # noqa: E731
    names = ("k", "v", "k_nope", "fine", "coarse")
    return cache.replace(**{n: jax.tree.map(fill, getattr(cache, n)) for n in names})

  def prefill(self, prompts, chunk=CHUNK):
    cache, last = self.noise(), []
    for row, prompt in enumerate(prompts):
      for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        tokens = np.zeros((1, CHUNK), np.int32)
        tokens[0, : len(part)] = part
        args = (np.int32(x) for x in (len(part), row, len(prompt)))
        logits, cache = self.chunk(cache, tokens, *args)
      last.append(logits[0, len(part) - 1])
    return cache, last


def prompts_of(lengths=LENGTHS):
  rng = np.random.default_rng(5)
  return [rng.integers(0, small.VOCAB, n).tolist() for n in lengths]


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_trees_and_commits_equal_whole_forwards(name):
  model, params = small.make(**VARIANTS[name])
  run, prompts = Runner(model, params), prompts_of()
  cache, last = run.prefill(prompts)
  for prompt, found in zip(prompts, last, strict=True):
    expected = small.full_logits(model, params, prompt)[-1]
    np.testing.assert_allclose(found, expected, atol=1e-4)

  tok_BP = np.random.default_rng(6).integers(0, small.VOCAB, (2, 7)).astype(np.int32)
  logits_BPV, after = run.tree(cache, tok_BP)
  depth, anc = tree_arrays()
  for row, prompt in enumerate(prompts):
    for node in (0, 2, 4, 6):
      path = prompt + tok_BP[row, np.nonzero(anc[node])[0]].tolist()
      expected = small.full_logits(model, params, path)[-1]
      np.testing.assert_allclose(
        logits_BPV[row, node], expected, atol=1e-4, err_msg=f"{row} {node}"
      )

  path_BA = np.array([[0, 1, 3, 5, 6], [0, 2, 0, 0, 0]], np.int32)
  num_B = np.array([5, 2], np.int32)
  found = run.commit(after, path_BA, num_B)
  longer = [p + tok_BP[r, path_BA[r, : num_B[r]]].tolist() for r, p in enumerate(prompts)]
  expected, _ = run.prefill(longer)
  assert_same_rows(model.cfg, found, expected, [len(p) for p in longer])
  logits_B1V, _ = run.one(found, np.array([[3], [4]], np.int32))
  for row, (prompt, token) in enumerate(zip(longer, (3, 4), strict=True)):
    expected = small.full_logits(model, params, [*prompt, token])[-1]
    np.testing.assert_allclose(logits_B1V[row, 0], expected, atol=1e-4)


def assert_same_rows(cfg, found, expected, lengths):
  """Keys and values below the length, and the complete windows of each level, in every layer."""
  np.testing.assert_array_equal(found.length, lengths)
  counts = {"k": lengths, "v": lengths}
  if cfg.sparse is not None:
    for level, scale in (("fine", 1), ("coarse", 4)):
      size, stride = scale * cfg.sparse.kernel_size, scale * cfg.sparse.kernel_stride
      counts[level] = [(n - size) // stride + 1 for n in lengths]
  for name, numbers in counts.items():
    arrays = [getattr(c, name) for c in (found, expected)]
    stacked = [x if cfg.scan_layers else np.stack(x) for x in arrays]
    for row, num in enumerate(numbers):
      a, b = (np.asarray(x)[:, row, :num] for x in stacked)
      np.testing.assert_allclose(a, b, atol=1e-4, err_msg=f"{name}, row {row}")


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunk_sizes_change_nothing(chunk):
  model, params = small.make()
  run, prompts = Runner(model, params), prompts_of((20, 9))
  a, last_a = run.prefill(prompts)
  b, last_b = run.prefill(prompts, chunk)
  np.testing.assert_allclose(np.stack(last_a), np.stack(last_b), atol=1e-4)
  assert_same_rows(model.cfg, a, b, [20, 9])


def test_nodes_cross_the_dense_switch_one_by_one():
  """Each node decides by its own length, as decoding token by token does."""
  model, params = small.make(sparse=dataclasses.replace(SPARSE, dense_len=49))
  run, prompts = Runner(model, params), prompts_of()
  cache, _ = run.prefill(prompts)
  tok_BP = np.random.default_rng(6).integers(0, small.VOCAB, (2, 7)).astype(np.int32)
  logits_BPV, _ = run.tree(cache, tok_BP)
  chain = [0, 1, 3, 5, 6]
  for node in chain:
    logits_B1V, cache = run.one(cache, tok_BP[:, [node]])
    np.testing.assert_allclose(logits_BPV[:, node], logits_B1V[:, 0], atol=1e-4, err_msg=str(node))


@pytest.mark.parametrize("is_scan", [True, False], ids=["scan", "unrolled"])
def test_taps_are_the_streams_before_the_layers(is_scan):
  model, params = small.make(num_layers=3, scan_layers=is_scan)
  tokens = jnp.asarray([prompts_of()[0][:12]])
  run = jax.jit(lambda p, t: model.apply({"params": p}, t, tap_layers=(0, 2)))
  out = run(params, tokens)
  np.testing.assert_allclose(
    out.taps[..., :16], 12 * params["embed"]["embedding"][tokens], rtol=1e-5
  )
  two, _ = small.make(num_layers=2, scan_layers=is_scan)
  cut = jax.tree.map(lambda x: x[:2], params["layers"]) if is_scan else None
  shallow = {**params, "layers": cut} if is_scan else params
  shallow = {k: v for k, v in shallow.items() if k != "layers_2"}
  shallow = {**shallow, "final_norm": {"scale": jnp.ones(16)}}
  stream = out.taps[..., 16:]
  normed = stream / jnp.sqrt(jnp.mean(stream**2, axis=-1, keepdims=True) + two.cfg.norm_eps)
  two = small.replace(two, scale_depth=1.4 * np.sqrt(2 / 3))  # residual scale of three layers
  expected = common.apply(two, shallow, tokens).hidden
  np.testing.assert_allclose(normed, expected, atol=1e-4)


def test_a_donated_cache_is_written_in_place_by_trees_and_commits():
  model, params = small.make()
  run = Runner(model, params)

  def round_(cache, tok_BP, path, num):
    _, cache = run._tree(cache, tok_BP)
    return cache_lib.commit(model.cfg, cache, path, num)

  cache = run.noise()
  where = sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves((cache.k, cache.v)))
  args = (np.zeros((2, 7), np.int32), np.zeros((2, 5), np.int32), np.ones(2, np.int32))
  compiled = jax.jit(round_, donate_argnums=0).lower(cache, *args).compile()
  out = compiled(cache, *args)
  found = sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves((out.k, out.v)))
  assert found == where
  size = sum(x.nbytes for x in jax.tree.leaves((out.k, out.v)))
  assert compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_step_that_reads_every_slot_copies_no_cache(scan_layers):
  """Temporaries stay below the size of one layer's share of it and its scores."""
  model, params = small.make(scan_layers=scan_layers)
  cache = cache_lib.init(model.cfg, 1, 4096, per_row=True)
  step = cache_lib.Step(anc_BTT=jnp.ones((1, 1, 1), bool), depth_BT=jnp.zeros((1, 1), jnp.int32))

  def forward(cache):
    return model.apply({"params": params}, jnp.zeros((1, 1), jnp.int32), cache=cache, step=step)

  compiled = jax.jit(forward, donate_argnums=0).lower(cache).compile()
  size = sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))
  found = compiled.memory_analysis().temp_size_in_bytes
  scores = 4 * model.cfg.num_heads * 4096 * 4
  assert found < size / model.cfg.num_layers + scores, (found, size)


def test_only_cpus_write_inside_a_loop():
  """Elsewhere a loop's condition would be a wait for the host in every layer."""
  x_BSKH, new_BTKH, length_B = jnp.zeros((2, 8, 1, 4)), jnp.ones((2, 3, 1, 4)), jnp.array([0, 4])

  def write(x_BSKH, new_BTKH, length_B):
    cache = kv.LayerCache(k=x_BSKH, v=x_BSKH[..., :0], length=length_B)
    return kv.write(cache, new_BTKH, new_BTKH[..., :0])[1]

  args = (x_BSKH, new_BTKH, length_B)
  traced = jax.jit(write).trace(*args)
  loops = [
    traced.lower(lowering_platforms=(name,)).as_text().count("stablehlo.while")
    for name in ("cpu", "cuda", "tpu")
  ]
  assert loops == [1, 0, 0]
  expected = np.zeros((2, 8, 1, 4))
  expected[0, :3] = expected[1, 4:7] = 1
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("dp",))
  mapped = jax.shard_map(write, mesh=mesh, in_specs=jax.P("dp"), out_specs=jax.P("dp"))
  for found in (jax.jit(write)(*args), jax.jit(mapped)(*args)):
    np.testing.assert_array_equal(found, expected)


def test_gradients_pass_through_a_cache_that_is_read_whole():
  """A tree on an empty cache is a plain forward, here with every slot read."""
  model, params = small.make()
  tokens_BT = np.array([[3, 4, 5]], np.int32)

  def loss(params, cache, step):
    out = model.apply({"params": params}, tokens_BT, cache=cache, step=step, rope_length=SLOTS)
    return jnp.mean(jax.nn.log_softmax(out.logits)[..., 1])

  tree = cache_lib.Step(
    anc_BTT=jnp.tril(jnp.ones((1, 3, 3), bool)), depth_BT=jnp.arange(3, dtype=jnp.int32)[None]
  )
  cache = cache_lib.init(model.cfg, 1, SLOTS, per_row=True)
  found = jax.grad(loss)(params, cache, tree)
  expected = jax.grad(loss)(params, None, None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("rows, text", [(1, "found 1 rows, expected 2 "), (3, "found 3 rows")])
def test_wrong_batches_are_refused(rows, text):
  model, params = small.make()
  cache = cache_lib.init(model.cfg, 2, SLOTS, per_row=True)
  with pytest.raises(ValueError, match=text):
    model.apply({"params": params}, np.zeros((rows, 1), np.int32), cache=cache)


def test_a_step_needs_a_cache_of_rows():
  model, params = small.make()
  with pytest.raises(ValueError, match="step: found one, expected none"):
    model.apply({"params": params}, np.zeros((1, 1), np.int32), step=cache_lib.Step())
