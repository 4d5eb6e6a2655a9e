"""The Pallas TPU backends without a TPU: values in interpret mode, lowering; `-m tpu` with one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.sparse_attention import mosaic_tpu as attention
from pallas_kernels.sparse_decode import mosaic_tpu as decoding
from pallas_kernels.sparse_topk import mosaic_tpu as topk
from pallas_kernels.sparse_topk import rule as rules
from tests.pallas_kernels import sparse_suite as suite


@pytest.mark.parametrize("selection, lse", [("joint", "coarse"), ("split", "exact")])
def test_select(selection, lse):
  suite.check_select(topk.select_tpu, suite.small_rule(selection, lse))


def test_select_packed():
  config = topk.TpuConfig(chunk=5)
  suite.check_select_packed(
    jax.jit(lambda *a: topk.select_tpu(*a, config), static_argnums=(5, 6)),
    suite.small_rule("joint", "exact"),
  )


@pytest.mark.parametrize("head_dim", [8, 64])  # all heads in one column of lanes, or two of them
def test_attend(head_dim):
  config = attention.TpuConfig(rows=12, chunk=6)
  suite.check_attend(
    lambda *a, **kw: attention.attend_tpu(*a, config=config, **kw), num_local=2, H=head_dim
  )


@pytest.mark.parametrize("layout", ["row", "paged"])
def test_decode(layout):
  suite.check_decode(decoding.decode_tpu, layout)


def like(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def select_program(num_heads, head_dim, lse):
  rule, T, K, slots = rules.Rule(lse=lse), 1024, 2, 131072
  config = topk.TpuConfig(interpret=False)

  def run(q, fine, coarse, start):
    return topk.select_tpu(q, fine, coarse, slots - T, start, rule, slots, config)

  keys = [like(1, rule.num_windows(slots, level), K, head_dim) for level in (1, rules.COARSE)]
  return run, (like(1, T, num_heads, head_dim), *keys, like(1, T, dtype=jnp.int32))


def attend_program(num_heads, head_dim):
  T, S, K = 1024, 8192, 2
  config = attention.TpuConfig(interpret=False)

  def run(q, k, v, ids, pos, start):
    def forward(q, k, v):
      return attention.attend_tpu(q, k, v, ids, pos, start, block_size=64, config=config)

    out, vjp = jax.vjp(forward, q, k, v)
    return vjp(out)

  q, k = like(1, T, num_heads, head_dim), like(1, S, K, head_dim)
  return run, (q, k, k, like(1, K, T, 96, dtype=jnp.int32), *[like(1, T, dtype=jnp.int32)] * 2)


def decode_program(num_heads, head_dim):
  B, T, K, M = 2, 1, 2, 2048
  config = attention.TpuConfig(interpret=False)

  def run(q, k, v, ids, pos, start, table):
    return decoding.decode_tpu(q, k, v, ids, pos, start, None, table, block_size=64, config=config)

  k = like(B * M, 64, K, head_dim)
  lists = (like(B, K, T, 96, dtype=jnp.int32), *[like(B, T, dtype=jnp.int32)] * 2)
  return run, (like(B, T, num_heads, head_dim), k, k, *lists, like(B, M, dtype=jnp.int32))


PROGRAMS = {
  "select": lambda n, h: select_program(n, h, "coarse"),
  "attend": attend_program,
  "decode": decode_program,
}


@pytest.mark.parametrize("shape", [(16, 64), (32, 128)], ids=["0p5b", "8b"])
@pytest.mark.parametrize("op", PROGRAMS)
def test_lowers_for_tpu(op, shape):
  run, avals = PROGRAMS[op](*shape)
  device = AbstractDevice("TPU v5 lite", 1, "tpu")
  with use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
    lowered = jax.jit(run).trace(*avals).lower(lowering_platforms=("tpu",))
  assert lowered.as_text().count("tpu_custom_call") == {"select": 2, "attend": 3, "decode": 1}[op]


def test_heads_that_do_not_fill_the_lanes_are_refused():
  q, k = jnp.zeros((1, 4, 4, 96)), jnp.zeros((1, 64, 2, 96))
  ids, pos = jnp.zeros((1, 2, 4, 1), jnp.int32), jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(NotImplementedError, match="2 key heads of 96 do not fill lanes"):
    attention.attend_tpu(q, k, k, ids, pos, pos, block_size=64)


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_all_on_the_device(dtype):
  suite.check_select(topk.select_tpu, suite.small_rule("joint", "coarse"), dtype=dtype)
  suite.check_attend(attention.attend_tpu, num_local=2, dtype=dtype, T=300, W=12, H=128, G=16)
  suite.check_decode(decoding.decode_tpu, "paged", dtype=dtype)
