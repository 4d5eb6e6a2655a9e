"""The Mosaic GPU backends without a GPU: values in Pallas' interpreter, lowering, refusals.

`make mosaic-compile` goes on to machine code; with a Hopper GPU: `-m gpu`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.nn import sparse_attention
from pallas_kernels.common import mgpu
from pallas_kernels.sparse_attention import api as attention_api
from pallas_kernels.sparse_attention import inverse, tiles
from pallas_kernels.sparse_attention import mosaic_gpu as attention
from pallas_kernels.sparse_decode import mosaic_gpu as decoding
from pallas_kernels.sparse_topk import mosaic_gpu as topk
from pallas_kernels.sparse_topk import rule as rules
from tests.pallas_kernels import sparse_suite as suite

# --- Lists ---------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("num_blocks, tiles_a_run", [(200, 3), (9, 4096)])
def test_union_of_lists_is_that_of_sets(num_blocks, tiles_a_run, monkeypatch):
  monkeypatch.setattr(tiles, "TILES_A_RUN", tiles_a_run)
  rng = np.random.default_rng(0)
  X, Q, W = 7, 31, 5
  ids = np.where(rng.random((X, Q, W)) < 0.3, -1, rng.integers(0, num_blocks, (X, Q, W)))
  ids[2] = -1
  ids[3, 0, :2] = 4  # twice in one list counts once
  found = jax.jit(lambda ids: tiles.union_in_runs(ids, num_blocks))(jnp.asarray(ids, jnp.int32))
  union, members, counts = (np.asarray(x) for x in found)
  for x in range(X):
    expected = sorted({int(i) for i in ids[x].ravel() if i >= 0})
    assert counts[x] == len(expected) and union[x, : counts[x]].tolist() == expected
    for block, bits in zip(expected, members[x], strict=False):
      assert bits == sum(1 << t for t in range(Q) if block in ids[x, t])
    assert not members[x, counts[x] :].any()


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "selection, lse, warpgroups, num_queries", [("joint", "coarse", 1, 9), ("split", "exact", 2, 66)]
)
def test_select(selection, lse, warpgroups, num_queries):
  config = topk.MosaicGpuConfig(warpgroups=warpgroups)
  suite.check_select(
    lambda *a: topk.select_mosaic_gpu(*a, config=config),
    suite.small_rule(selection, lse),
    num_queries=num_queries,
    H=16,
  )


def test_select_packed():
  suite.check_select_packed(topk.select_mosaic_gpu, suite.small_rule("joint", "exact"), H=16)


def test_select_over_tiles():
  """70 blocks and 277 windows: two tiles of scores, two of the normaliser, one of them masked."""
  suite.check_select(
    topk.select_mosaic_gpu, suite.small_rule("joint", "exact"), offset=1105, num_queries=9, H=16
  )


@pytest.mark.slow
def test_select_in_runs():
  """70 queries in two runs of one tile."""
  config = topk.MosaicGpuConfig(max_score_bytes=1)
  suite.check_select(
    lambda *a: topk.select_mosaic_gpu(*a, config=config),
    suite.small_rule("joint", "coarse"),
    num_queries=70,
    H=16,
  )


@pytest.mark.parametrize(
  "options",
  [
    pytest.param(dict(run_units=2, num_stages=3, warpgroups=1), marks=pytest.mark.smoke),
    dict(unit_rows=64, q_stages=3, kv_stages=3),
    dict(backward="xla"),
  ],
  ids=lambda x: "-".join(x),
)
def test_attend_with_gradients(options):
  """float32; 21 queries of 3 heads in a tile of 64 rows, 10 or 21 in a unit."""
  config = attention.MosaicGpuConfig(**options)
  suite.check_attend(
    lambda *a, **kw: attention.attend_mosaic_gpu(*a, config=config, **kw), num_local=2, H=16
  )


@pytest.mark.parametrize(
  "group, queries, has_grad",
  [(1, 34, True), (16, 9, False), pytest.param(16, 9, True, marks=pytest.mark.slow)],
)
def test_attend_in_bfloat16(group, queries, has_grad):
  """31 queries of one head, then 4 of 16: a tile of 64 rows; 2 of 16 are a unit."""
  suite.check_attend(
    attention.attend_mosaic_gpu,
    num_local=0,
    has_grad=has_grad,
    dtype=jnp.bfloat16,
    T=queries + 36,
    G=group,
    H=16,
  )


def test_gradients_of_blocks_of_80_keys_are_those_of_dense_attention():
  """Every block listed twice; two parts of 64 keys a block, the second filled up; 40 heads."""
  rng = np.random.default_rng(5)
  T, S, G, H, block = 4, 90, 40, 16, 80
  shapes = ((1, T, G, H), (1, S, 1, H), (1, S, 1, H))
  q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  pos = jnp.arange(S - T, S, dtype=jnp.int32)[None, :]
  ids = jnp.broadcast_to(jnp.array([1, 0, 1], jnp.int32), (1, 1, T, 3))

  def attend(*arrays):
    return attention.attend_mosaic_gpu(*arrays, ids, pos, 0 * pos, block_size=block)[0]

  def dense(*arrays):
    mask = jnp.arange(S)[None, None, None, :] <= pos[:, None, :, None]
    return jax.nn.dot_product_attention(*arrays, mask=mask)

  def gradients(function):
    def loss(*x):
      return jnp.sum(jnp.sin(function(*x)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

  for found, expected in zip(gradients(attend), gradients(dense), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_warpgroup_may_pass_over_more_blocks_than_there_are_buffers():
  """Four queries list the first and the last of 14 blocks, the next four all of them."""
  rng = np.random.default_rng(8)
  T, M, block, G, H = 8, 14, 16, 16, 16
  shapes = ((1, T, G, H), (1, M * block, 1, H), (1, M * block, 1, H))
  q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  ids = np.tile(np.arange(M), (1, 1, T, 1))
  ids[:, :, :4, 1:-1] = -1
  pos = jnp.arange(M * block - T, M * block, dtype=jnp.int32)[None]
  config = attention.MosaicGpuConfig(warpgroups=2, num_stages=2)

  def attend(*arrays):
    options = dict(block_size=block, config=config)
    return attention.attend_mosaic_gpu(*arrays, pos, 0 * pos, **options)[0]

  found = jax.jit(attend)(q, k, v, jnp.asarray(ids, jnp.int32))
  slots = np.arange(M * block)
  mask = (slots <= np.asarray(pos)[0, :, None]) & (ids[0, 0] >= 0).repeat(block, axis=1)
  expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_remat_policies_can_keep_the_lists_and_the_result():
  """By the traced programs: times the forward kernel is in forward and backward pass."""
  shapes = ((1, 64, 8, 32), (1, 64, 2, 32), (1, 64, 2, 32))
  arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
  ids = jax.ShapeDtypeStruct((1, 2, 64, 4), jnp.int32)
  config = attention.MosaicGpuConfig(interpret=False)

  def loss(*args):
    options = dict(block_size=32, implementation="mosaic_gpu", config=config)
    return jnp.sum(attention_api.attend_blocks(*args, **options)[0].astype(jnp.float32))

  def counts(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    grad = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(grad)(*arrays, ids))
    return [text.count(f"sparse_attention_{x}") for x in ("forward", "backward_q")]

  forward, backward = counts(attention.LISTS, attention.OUT)
  assert forward > 0 and backward > 0
  assert counts(attention.LISTS) == counts() == [2 * forward, backward]


@pytest.mark.parametrize("device, size", [("cpu", 1), ("gpu", 3), ("cpu", 100)])
def test_runs_hold_every_entry_of_their_block_once(device, size, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: device)
  rng = np.random.default_rng(6)
  B, K, E, M, T = 2, 3, 40, 7, 11
  pairs = np.stack([rng.permutation(M * T)[:E] for _ in range(B * K)]).reshape(B, K, E)
  block, item = np.where(pairs % 5 == 0, M, pairs // T), pairs % T
  arrays = [jnp.asarray(x, jnp.int32) for x in (block, item, 100 * block + item)]
  big = 2**31 // (M + 1) + 1  # block and item do not fit one integer
  small = inverse.sort_by_block(*arrays, num_blocks=M, num_items=T)
  for x, y in zip(small, inverse.sort_by_block(*arrays, num_blocks=M, num_items=big), strict=True):
    is_entry = np.asarray(small[0]) < M
    np.testing.assert_array_equal(np.asarray(x)[is_entry], np.asarray(y)[is_entry])
  blocks, items, payload = (np.asarray(x) for x in small)
  first, own, begin, end = (np.asarray(x) for x in inverse.runs(small[0], M, size))
  for b, h in np.ndindex(B, K):
    for m in range(M):
      expected = sorted(item[b, h][block[b, h] == m].tolist())
      places = []
      for run in range(first[b, h, m], first[b, h, m + 1]):
        assert own[b, h, run] == m and 0 < end[b, h, run] - begin[b, h, run] <= size
        places += range(begin[b, h, run], end[b, h, run])
      assert items[b, h, places].tolist() == expected
      assert payload[b, h, places].tolist() == [100 * m + t for t in expected]
    assert (own[b, h, first[b, h, M] :] == -1).all()


@pytest.mark.parametrize("layout", ["row", "paged"])
def test_decode(layout):
  config = decoding.MosaicGpuConfig(num_splits=3)
  suite.check_decode(
    lambda *a, **kw: decoding.decode_mosaic_gpu(*a, config=config, **kw), layout, H=16
  )


def test_the_whole_of_sparse_attention_is_that_of_xla():
  """`infllm_attention` by name: selection and attention, and the gradient of the queries."""
  sizes = dict(kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=2, dense_len=-1)
  cfg = SparseAttentionConfig.from_hf(sizes, selection="joint", lse="coarse")
  rng = np.random.default_rng(4)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 90, n, 16)), jnp.float32) for n in (6, 2, 2))

  def run(implementation):
    def loss(q):
      out = sparse_attention.infllm_attention(q, k, v, cfg, implementation=implementation)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))(q)

  for found, expected in zip(run("mosaic_gpu"), run("xla"), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- Programs of real width, short ---------------------------------------------------------------


def like(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def select_program(num_heads, head_dim, lse, T=4096, warpgroups=1):
  rule, K = rules.Rule(lse=lse), 2
  config, slots = topk.MosaicGpuConfig(warpgroups=warpgroups, interpret=False), 131072

  def run(q, fine, coarse, start):
    return topk.select_mosaic_gpu(q, fine, coarse, slots - T, start, rule, slots, config)

  keys = [like(1, rule.num_windows(slots, level), K, head_dim) for level in (1, rules.COARSE)]
  return run, (like(1, T, num_heads, head_dim), *keys, like(1, T, dtype=jnp.int32))


def attend_program(num_heads, head_dim, dtype=jnp.bfloat16, T=4096, **tiles):
  """Forward and backward."""
  K = 2
  config = attention.MosaicGpuConfig(interpret=False, backward="mosaic_gpu", **tiles)

  def run(q, k, v, *lists):
    (out, lse), vjp = jax.vjp(
      lambda *x: attention.attend_mosaic_gpu(*x, *lists, block_size=64, config=config), q, k, v
    )
    return vjp((out, lse))

  q, k = like(1, T, num_heads, head_dim, dtype=dtype), like(1, T, K, head_dim, dtype=dtype)
  return run, (q, k, k, like(1, K, T, 96, dtype=jnp.int32), *[like(1, T, dtype=jnp.int32)] * 2)


def decode_program(num_heads, head_dim, is_paged, T=1):
  B, K, S = 2, 2, 131072
  config = decoding.MosaicGpuConfig(interpret=False)

  def run(q, k, v, ids, pos, start, table):
    table = table if is_paged else None
    return decoding.decode_mosaic_gpu(
      q, k, v, ids, pos, start, None, table, block_size=64, config=config
    )

  k = like(B * S // 64, 64, K, head_dim) if is_paged else like(B, S, K, head_dim)
  lists = (like(B, K, T, 96, dtype=jnp.int32), *[like(B, T, dtype=jnp.int32)] * 2)
  return run, (like(B, T, num_heads, head_dim), k, k, *lists, like(B, S // 64, dtype=jnp.int32))


PROGRAMS = {
  "select_0p5b": lambda: select_program(16, 64, "exact"),
  "select_8b": lambda: select_program(32, 128, "coarse"),
  "select_8b_pair": lambda: select_program(32, 128, "coarse", warpgroups=2),
  "attend_0p5b": lambda: attend_program(16, 64),
  "attend_8b": lambda: attend_program(32, 128),
  "attend_f16": lambda: attend_program(32, 96, jnp.float16),
  "decode_0p5b": lambda: decode_program(16, 64, False, T=4),
  "decode_8b": lambda: decode_program(32, 128, True),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_lowers_for_cuda(program):
  run, avals = PROGRAMS[program]()
  device = AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
  with use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
    text = jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  assert "custom_call @mosaic_gpu_v2" in text, text[:2000]


def launches(program, monkeypatch):
  """(grid, types of shared memory) of every kernel of a program, which is not run."""
  found = []

  def record(body, *, out_type, grid, scratch_types=(), **options):
    found.append((options["kernel_name"], grid, scratch_types))
    return lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

  monkeypatch.setattr(plgpu, "kernel", record)
  run, avals = program()
  jax.eval_shape(run, *avals)
  return found


@pytest.mark.parametrize("num_tokens", [131072, 1 << 20])
def test_long_prompts_stay_within_the_grids_of_cuda(num_tokens, monkeypatch):
  """At a million tokens the forward pass has 174,764 tiles; only the last dimension may hold so
  many."""
  found = launches(lambda: attend_program(32, 128, T=num_tokens), monkeypatch)
  if num_tokens == 131072:
    found += launches(lambda: select_program(2, 128, "exact", T=num_tokens), monkeypatch)
  else:
    assert max(grid[-1] for _, grid, _ in found) >= 65536
  for name, grid, _ in found:
    assert len(grid) <= 3 and all(size <= 65535 for size in grid[:-1]), (name, grid)


@pytest.mark.parametrize("group", [1, 2, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_tiles_fit_the_shared_memory_of_hopper(group, head_dim, monkeypatch):
  """H100 and H200: 227 KiB a program; two programs of dk and dv a multiprocessor (228 KiB, of which
  each takes one more)."""
  for program in (
    lambda: attend_program(2 * group, head_dim),
    lambda: select_program(2 * group, head_dim, "coarse"),
    lambda: decode_program(2 * group, head_dim, True),
  ):
    for name, _, scratch in launches(program, monkeypatch):
      buffers = [x for x in scratch if hasattr(x, "shape") and hasattr(x, "dtype")]
      num_bytes = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
      assert num_bytes <= 227 * 1024, name
      if name == "sparse_attention_backward_kv":
        assert 2 * (num_bytes + 2048) <= 228 * 1024, (name, num_bytes)


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(head_dim=160), "head widths 160 and 160, mosaic_gpu serves equal ones"),
    (dict(head_dim=24), "head widths 24 and 24"),
    (dict(block_size=40, head_dim=16), "block_size = 40, mosaic_gpu serves multiples of 16"),
    (dict(block_size=32, head_dim=128), "multiples of 64 up to 128 at head width 128"),
    (dict(heads=130), "65 heads a group"),
    (dict(v_dtype=jnp.float16), "expected one of"),
    (dict(dtype=jnp.float32), "multiplies bfloat16 or float16, found float32"),
    (dict(num_stages=7, head_dim=128), "7 stages of 64 x 128 take .* bytes of shared memory"),
    (dict(q_stages=6, head_dim=128), "6 stages of 64 x 128 take .* bytes of shared memory"),
    (dict(kv_stages=6, head_dim=128), "6 stages of 128 columns take .* bytes of shared memory"),
  ],
  ids=lambda x: "_".join(x) if isinstance(x, dict) else "",
)
def test_calls_that_are_not_served_name_the_reason(change, reason):
  H, dtype = change.get("head_dim", 64), change.get("dtype", jnp.bfloat16)
  q, k = jnp.zeros((1, 4, change.get("heads", 4), H), dtype), jnp.zeros((1, 64, 2, H), dtype)
  v = k.astype(change.get("v_dtype", dtype))
  ids, pos = jnp.zeros((1, 2, 4, 1), jnp.int32), jnp.zeros((1, 4), jnp.int32)
  stages = {name: n for name, n in change.items() if name.endswith("stages")}
  config = attention.MosaicGpuConfig(interpret=False, backward="mosaic_gpu", **stages)
  block_size = change.get("block_size", 64)
  with pytest.raises(NotImplementedError, match=reason):
    attention.attend_mosaic_gpu(q, k, v, ids, pos, pos, block_size=block_size, config=config)


def test_decode_refuses_too_many_rows_and_shifted_rows():
  q, k = jnp.zeros((1, 17, 32, 64), jnp.bfloat16), jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
  ids, pos = jnp.zeros((1, 2, 17, 1), jnp.int32), jnp.zeros((1, 17), jnp.int32)
  with pytest.raises(NotImplementedError, match="17 queries of 16 heads .* serves 16"):
    decoding.decode_mosaic_gpu(q, k, k, ids, pos, pos, None, None, block_size=64)
  args = (q[:, :4], k, k, ids[:, :, :4], pos[:, :4], pos[:, :4])
  with pytest.raises(NotImplementedError, match="base_B"):
    decoding.decode_mosaic_gpu(*args, jnp.zeros((1,), jnp.int32), None, block_size=64)


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(head_dim=8), "head width 8, mosaic_gpu serves multiples of 16"),
    (dict(slots=600_000), "9472 blocks, mosaic_gpu serves up to 8192"),
    (dict(dtype=jnp.float32), "multiplies bfloat16 or float16, found float32"),
  ],
  ids=lambda x: "_".join(x) if isinstance(x, dict) else "",
)
def test_select_refuses_with_the_reason(change, reason):
  dtype = change.get("dtype", jnp.bfloat16)
  q, fine = (jnp.zeros((1, n, 2, change.get("head_dim", 64)), dtype) for n in (4, 6))
  config = topk.MosaicGpuConfig(interpret=False)
  slots = change.get("slots", 128)
  start = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(NotImplementedError, match=reason):
    topk.select_mosaic_gpu(q, fine, fine, 0, start, rules.Rule(), slots, config)


@pytest.mark.parametrize("capability, is_served", [("8.0", False), ("9.0", True), ("10.0", False)])
def test_only_hopper_is_served(capability, is_served, monkeypatch):
  device = type("Device", (), dict(compute_capability=capability))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  if is_served:
    assert not mgpu.is_interpreted("op", None)
    return
  with pytest.raises(NotImplementedError, match=f"compute capability 9.0 .* found {capability}"):
    mgpu.is_interpreted("op", None)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: topk.MosaicGpuConfig(warpgroups=3), "warpgroups: found 3, expected 1 or 2"),
    (lambda: attention.MosaicGpuConfig(num_stages=1), "num_stages: found 1, expected 2 to 8"),
    (lambda: attention.MosaicGpuConfig(kv_stages=9), "kv_stages: found 9, expected 2 to 8"),
    (lambda: attention.MosaicGpuConfig(unit_rows=48), "unit_rows: found 48, expected 32 or 64"),
    (lambda: attention.MosaicGpuConfig(warpgroups=5), "warpgroups: found 5, expected 1 to 4"),
    (lambda: attention.MosaicGpuConfig(run_units=0), "run_units: found 0, expected 1 or more"),
    (lambda: attention.MosaicGpuConfig(backward="gather"), "backward: found 'gather'"),
    (lambda: decoding.MosaicGpuConfig(num_splits=129), "num_splits: found 129, expected 1 to 128"),
    (lambda: decoding.MosaicGpuConfig(num_stages=1), "num_stages: found 1, expected 2 to 8"),
  ],
)
def test_bad_configs_name_the_field(make, message):
  with pytest.raises(ValueError, match=f"MosaicGpuConfig.{message}"):
    make()


# --- On a Hopper GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape, tiles",
  [
    (dict(H=16), dict()),
    (dict(T=700, W=4, H=128, G=16, block=64), dict()),
    (dict(T=700, W=4, H=128, G=16, block=64), dict(warpgroups=1, num_stages=3)),
  ],
  ids=["tiny", "8b", "8b_one"],
)
def test_attend_on_the_device(shape, tiles):
  config = attention.MosaicGpuConfig(**tiles)
  suite.check_attend(
    lambda *a, **kw: attention.attend_mosaic_gpu(*a, config=config, **kw),
    num_local=2,
    dtype=jnp.bfloat16,
    is_repeated=True,
    **shape,
  )


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [2, 12, 31])
def test_union_by_triton_on_the_device(queries):
  """More tiles than programs, and more blocks than a part."""
  rng = np.random.default_rng(0)
  shape = (2, 2, 2600 * queries // 2 - 1, 96)
  ids = rng.integers(0, 3000, shape)
  ids = jnp.asarray(np.where(rng.random(shape) < 0.3, -1, ids), jnp.int32)
  found, expected = (
    jax.jit(lambda ids, by=by: tiles.listed(ids, queries, 3000, by))(ids) for by in (True, False)
  )
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("lse", ["exact", "coarse"])
@pytest.mark.parametrize("selection", ["joint", "split"])
@pytest.mark.parametrize(
  "shape",
  [dict(H=64), dict(offset=3000, num_queries=70, H=128, group=16)],  # 192 blocks: three tiles
  ids=["tiny", "8b"],
)
def test_select_on_the_device(selection, lse, shape):
  rule = suite.small_rule(selection, lse)
  suite.check_select(topk.select_mosaic_gpu, rule, dtype=jnp.bfloat16, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["row", "paged"])
@pytest.mark.parametrize(("width", "block"), [(16, 16), (128, 64)])
def test_decode_on_the_device(layout, width, block):
  suite.check_decode(decoding.decode_mosaic_gpu, layout, dtype=jnp.bfloat16, H=width, block=block)
