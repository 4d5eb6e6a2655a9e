"""The Triton backends without a GPU: values, lowering for CUDA, cubins; with one: `-m gpu`.

Values come from Triton's interpreter in a process of its own (float32). Lowering through jax-triton
compiles to PTX; `triton_cubin` goes on to machine code and reads registers and spills.
"""

import dataclasses
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import triton as attention
from pallas_kernels.sparse_decode import triton as decoding
from pallas_kernels.sparse_topk import few
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.sparse_topk import triton as topk
from pallas_kernels.sparse_topk import xla as topk_xla
from tests.pallas_kernels import sparse_suite as suite
from tests.pallas_kernels import triton_cubin as cubin
from tests.pallas_kernels import triton_host as host

ARCHS = (80, 90)


@pytest.mark.parametrize("op", ["select", "attend", "decode"])
def test_values_in_the_interpreter(op):
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  host.run_in_process("tests/pallas_kernels/interpreted_triton.py", op)


# --- Programs of real width, short ---------------------------------------------------------------


def like(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def select_program(num_heads, head_dim, arch, lse):
  rule, T, K = rules.Rule(lse=lse), 4096, 2
  with unittest.mock.patch.object(topk.gpu, "capability", lambda _: arch):
    config = topk.default_config(num_heads // K, head_dim, jnp.bfloat16)
  config = dataclasses.replace(config, compute_capability=arch)
  slots = 131072

  def run(q, fine, coarse, start):
    return topk.select_triton(q, fine, coarse, slots - T, start, rule, slots, config)

  keys = [like(1, rule.num_windows(slots, level), K, head_dim) for level in (1, rules.COARSE)]
  return run, (like(1, T, num_heads, head_dim), *keys, like(1, T, dtype=jnp.int32))


def few_program(num_heads, head_dim, arch, lse, T=12):
  slots, K = 131072, 2
  rule = rules.Rule(lse=lse)
  keys = [like(1, rule.num_windows(slots, level), K, head_dim) for level in (1, rules.COARSE)]
  avals = (like(1, T, num_heads, head_dim), *keys, like(1, T, dtype=jnp.int32))
  return lambda q, fine, coarse, start: few.select(
    q, fine, coarse, slots - T, start, rule, slots, arch
  ), avals


def nodes_program(num_heads, head_dim, arch, lse, T=12):
  slots, K, R = 131072, 2, 1
  rule = rules.Rule(lse=lse)
  keys = [like(1, rule.num_windows(slots, level), K, head_dim) for level in (1, rules.COARSE)]
  own = nodes_lib.Own(like(1, dtype=jnp.int32), like(1, T, R, K, head_dim))
  numbers = [like(1, T, dtype=jnp.int32)] * 2
  avals = (like(1, T, num_heads, head_dim), *keys, *numbers, own, own)

  def run(q, fine, coarse, start, pos, *own):
    nodes = nodes_lib.Nodes(pos, *own)
    return few.select(q, fine, coarse, slots - T, start, rule, slots, arch, nodes)

  return run, avals


def attend_program(num_heads, head_dim, arch, num_local=33, has_grad=True, dtype=jnp.bfloat16):
  T, K = 4096, 2
  config = attention.default_config(num_heads // K, head_dim, dtype)
  config = dataclasses.replace(config, compute_capability=arch)

  def forward(q, k, v, ids, pos, start):
    return attention.attend_triton(
      q, k, v, ids, pos, start, block_size=64, num_local=num_local, config=config
    )

  def run(q, k, v, ids, pos, start):
    out, vjp = jax.vjp(lambda *x: forward(*x, ids, pos, start), q, k, v)
    return vjp(out)

  q, k = like(1, T, num_heads, head_dim, dtype=dtype), like(1, T, K, head_dim, dtype=dtype)
  lists = (like(1, K, T, 96, dtype=jnp.int32), *[like(1, T, dtype=jnp.int32)] * 2)
  return run if has_grad else forward, (q, k, k, *lists)


def decode_program(num_heads, head_dim, arch, is_paged):
  B, T, K, S = 2, 1, 2, 131072
  config = decoding.TritonConfig(compute_capability=arch)

  def run(q, k, v, ids, pos, start, table):
    table = table if is_paged else None
    return decoding.decode_triton(
      q, k, v, ids, pos, start, None, table, block_size=64, config=config
    )

  k = like(B * S // 64, 64, K, head_dim) if is_paged else like(B, S, K, head_dim)
  lists = (like(B, K, T, 96, dtype=jnp.int32), *[like(B, T, dtype=jnp.int32)] * 2)
  return run, (like(B, T, num_heads, head_dim), k, k, *lists, like(B, S // 64, dtype=jnp.int32))


LOWERED = {
  "select_80": lambda: select_program(16, 64, 80, "exact"),
  "select_90": lambda: select_program(32, 128, 90, "coarse"),
  "few_90": lambda: few_program(32, 128, 90, "exact"),
  "nodes_90": lambda: nodes_program(32, 128, 90, "coarse"),
  "attend_80": lambda: attend_program(16, 64, 80, has_grad=False),
  "attend_90": lambda: attend_program(32, 128, 90, num_local=0),
  "decode_80": lambda: decode_program(16, 64, 80, False),
  "decode_90": lambda: decode_program(32, 128, 90, True),
}


@pytest.mark.parametrize("program", LOWERED)
def test_lowers_for_cuda(program, triton_installed):
  run, avals = LOWERED[program]()
  text = jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
  assert "triton_kernel_call" in text


@pytest.mark.parametrize("op", ["select", "few", "nodes", "attend", "decode"])
def test_compiles_to_cubins_without_spills(op, triton_installed):
  """The 8B shape (G 16, H 128) on sm_80 and sm_90; prints registers, spills and shared memory."""
  program = {
    "select": lambda arch: select_program(32, 128, arch, "coarse"),
    "few": lambda arch: few_program(32, 128, arch, "exact", T=16),
    "nodes": lambda arch: nodes_program(32, 128, arch, "exact"),
    "attend": lambda arch: attend_program(32, 128, arch),
    "decode": lambda arch: decode_program(32, 128, arch, True),
  }[op]
  rows = []
  for arch in ARCHS:
    run, avals = program(arch)
    rows += cubin.table(run, *avals, archs=(arch,))
  assert {row.arch for row in rows} == set(ARCHS)
  for row in rows:
    assert row.spills == 0, row
    most = (
      99 if op in ("few", "nodes") else 163 if row.arch == 80 else 227
    )  # sm_86 and sm_89 have 99
    assert row.shared <= most * 1024, row


@pytest.mark.parametrize(
  "T, N, H, is_served",
  [(16, 32, 128, True), (17, 32, 128, False), (9, 64, 128, False), (8, 64, 128, True)]
  + [(9, 32, 256, False), (1, 32, 256, True)],
)
def test_few_queries_are_those_that_one_program_holds(T, N, H, is_served):
  assert few.is_served(like(1, T, N, H), 2) is is_served
  assert not few.is_served(like(1, T, N, H, dtype=jnp.float32), 2)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_tiles_of_other_shapes_fit(group, head_dim, triton_installed):
  """Shared memory of an A100 and an H100. Spills are few: up to 32 bytes where ptxas holds 64
  registers or so, 72 in the band of groups of 2 and 128 columns on sm_80."""
  for arch in ARCHS:
    for run, avals in (
      select_program(2 * group, head_dim, arch, "coarse"),
      attend_program(2 * group, head_dim, arch),
      decode_program(2 * group, head_dim, arch, True),
    ):
      for row in cubin.table(run, *avals, archs=(arch,)):
        assert row.spills <= 72, row
        assert row.shared <= (163 if row.arch == 80 else 227) * 1024, row


# --- Refusals ------------------------------------------------------------------------------------


def test_triton_on_a_cpu_is_refused_with_the_reason():
  q, k = jnp.zeros((1, 4, 2, 16)), jnp.zeros((1, 64, 1, 16))
  ids, pos = jnp.zeros((1, 1, 4, 1), jnp.int32), jnp.zeros((1, 4), jnp.int32)
  if jax.default_backend() == "gpu":
    pytest.skip("this machine has a GPU")
  with pytest.raises(NotImplementedError, match="needs a CUDA device"):
    attention.attend_triton(q, k, k, ids, pos, pos, block_size=64)


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(block_size=48), "block_size = 48, expected a power of two"),
    (dict(v_dtype=jnp.float32), "expected one of"),
    (dict(head_dim=320), "head widths 320"),
  ],
)
def test_calls_that_triton_does_not_serve(change, reason, triton_installed):
  H = change.get("head_dim", 16)
  q, k = jnp.zeros((1, 4, 2, H), jnp.bfloat16), jnp.zeros((1, 64, 1, H), jnp.bfloat16)
  v = k.astype(change.get("v_dtype", jnp.bfloat16))
  ids, pos = jnp.zeros((1, 1, 4, 1), jnp.int32), jnp.zeros((1, 4), jnp.int32)
  config = attention.TritonConfig(compute_capability=90)
  with pytest.raises(NotImplementedError, match=reason):
    block_size = change.get("block_size", 64)
    attention.attend_triton(q, k, v, ids, pos, pos, block_size=block_size, config=config)


def test_tiles_that_are_no_power_of_two_are_refused():
  with pytest.raises(ValueError, match="TritonConfig.kv_rows: found 48"):
    attention.TritonConfig(kv_rows=48)


# --- On a GPU ------------------------------------------------------------------------------------

TYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("lse", ["exact", "coarse"])
@pytest.mark.parametrize("selection", ["joint", "split"])
@pytest.mark.parametrize(
  "shape",
  [dict(), dict(offset=3000, num_queries=70, H=128, group=16)],  # 192 blocks: three tiles
  ids=["tiny", "8b"],
)
def test_select_on_the_device(selection, lse, dtype, shape):
  suite.check_select(topk.select_triton, suite.small_rule(selection, lse), dtype=dtype, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("lse", ["exact", "coarse"])
@pytest.mark.parametrize("num_queries", [1, 12])
def test_select_of_few_on_the_device(num_queries, lse):
  shape = dict(offset=131000, num_queries=num_queries, H=128, group=16)
  rule = rules.Rule(lse=lse, selection="joint" if num_queries == 1 else "split")
  suite.check_select(topk.select_triton, rule, dtype=jnp.bfloat16, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("lse", ["exact", "coarse"])
@pytest.mark.parametrize("num_nodes", [12, 40])
def test_select_of_nodes_on_the_device(num_nodes, lse):
  """As XLA's form, but for blocks whose scores differ by rounding."""
  args, nodes = suite.tree_inputs(rules.Rule(lse=lse), num_nodes, jnp.bfloat16, 128, 16, 131072)
  found = topk.select_triton(*args, nodes=nodes)[0]
  expected = topk_xla.select_xla(*args, nodes=nodes)[0]
  assert np.mean(np.asarray(found == expected)) > 0.99


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("shape", [dict(), dict(T=700, W=12, H=128, G=16)], ids=["tiny", "8b"])
def test_attend_on_the_device(num_local, dtype, shape):
  options = dict(num_local=num_local, dtype=dtype, is_repeated=True)
  suite.check_attend(attention.attend_triton, **options, **shape)


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("layout", suite.LAYOUTS)
def test_decode_on_the_device(layout, dtype):
  suite.check_decode(decoding.decode_triton, layout, dtype=dtype)
