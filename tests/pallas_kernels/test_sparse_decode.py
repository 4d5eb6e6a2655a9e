"""Sparse decoding on rows and pages against a loop over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import spec
from pallas_kernels.sparse_attention import gather
from pallas_kernels.sparse_decode import api, ref, xla
from pallas_kernels.sparse_topk import rule as rules
from tests.pallas_kernels import sparse_suite as suite


@pytest.mark.parametrize("layout", suite.LAYOUTS)
@pytest.mark.parametrize(
  "backend", [ref.decode_ref, gather.attend_gather, xla.attend_union], ids=["ref", "one", "several"]
)
def test_decode_is_the_equation(backend, layout, monkeypatch):
  """ "several" in three products of 4 blocks, of which 10 are in a row."""
  monkeypatch.setattr(xla, "TOGETHER", 4)
  suite.check_decode(backend, layout)


def test_many_blocks_in_a_row_of_which_queries_list_some_each():
  """In products of 16: lists of 20 of 150 blocks, six queries at one position, one that is none."""
  rng = np.random.default_rng(0)
  B, T, K, G, W, M, H = 2, 7, 2, 2, 20, 150, 8
  q, k, v = (
    suite.normal(rng, B, n, heads, H) for n, heads in ((T, K * G), (16 * M, K), (16 * M, K))
  )
  ids = np.stack([np.sort(rng.permutation(M)[:W]) for _ in range(B * K * T)]).reshape(B, K, T, W)
  ids[0, :, 1, 9:], ids[1, 1, 2] = -1, -1
  pos = np.broadcast_to(np.array([[16 * M - 1], [1000]], np.int32), (B, T))
  start = np.zeros((B, T), np.int32)
  start[0, 3] = rules.NOWHERE
  ids, start = jnp.asarray(ids, jnp.int32), jnp.asarray(start)
  found = api.decode_blocks(
    q, k, v, ids, block_size=16, q_offset=pos, start_BT=start, implementation="xla"
  )
  expected = suite.loop_decode(q, k, v, ids, jnp.asarray(pos), start)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "backend", [gather.attend_gather, xla.attend_union], ids=["one", "several"]
)
def test_statistics_are_float32_under_x64(backend):
  with jax.enable_x64(True):
    args, _ = suite.decode_inputs("row")
    shapes = jax.eval_shape(functools.partial(backend, block_size=suite.BLOCK), *args)
  assert [x.dtype for x in shapes] == [jnp.float32, jnp.float32]


@pytest.mark.smoke
def test_a_random_page_order_changes_nothing():
  (q, k, v, ids, pos, start, _, table), _ = suite.decode_inputs("paged")
  rows = {"k": ref.unpage(k, table), "v": ref.unpage(v, table)}
  paged = api.decode_blocks(
    q, k, v, ids, block_size=16, q_offset=pos[:, 0], start_BT=start, page_table_BM=table
  )
  plain = api.decode_blocks(
    q, **rows, ids_BKTW=ids, block_size=16, q_offset=pos[:, 0], start_BT=start
  )
  assert jnp.array_equal(paged[0], plain[0]) and jnp.array_equal(paged[1], plain[1])


def test_length_makes_padding_of_the_queries_beyond():
  (q, k, v, ids, pos, start, _, _), _ = suite.decode_inputs("row")
  out, lse = api.decode_blocks(
    q, k, v, ids, block_size=16, q_offset=pos[:, 0], start_BT=start, kv_length=pos[:, 0] + 1
  )
  assert not jnp.any(out[:, 1]) and jnp.all(jnp.isneginf(lse[:, 1]))
  assert jnp.all(jnp.isfinite(lse[:, 0]))


def test_bad_calls_name_what_was_found():
  (q, k, v, ids, pos, start, _, table), _ = suite.decode_inputs("paged")
  with pytest.raises(ValueError, match="pages of 16 tokens, expected 64"):
    api.decode_blocks(q, k, v, ids, block_size=64, page_table_BM=table)
  with pytest.raises(ValueError, match="base_B and page_table_BM are both given"):
    api.decode_blocks(q, k, v, ids, block_size=16, page_table_BM=table, base_B=pos[:, 0])
  with pytest.raises(ValueError, match=r"q_offset of shape \(3, 3\), expected \(3, 2\)"):
    offset = jnp.zeros((3, 3), jnp.int32)
    api.decode_blocks(q, k, v, ids, block_size=16, page_table_BM=table, q_offset=offset)
  with pytest.raises(NotImplementedError, match="no 'metal', expected auto or"):
    api.decode_blocks(q, k, v, ids, block_size=16, page_table_BM=table, implementation="metal")


def test_auto_tries_the_next_backend_and_a_named_one_does_not(monkeypatch):
  def refuse():
    raise NotImplementedError("op: too old a device")

  servers = {"triton": refuse, "mosaic_gpu": refuse, "xla": lambda: "xla"}
  assert spec.dispatch("op", "auto", servers) == "xla"
  monkeypatch.setattr(spec.jax, "default_backend", lambda: "gpu")
  assert spec.dispatch("op", "auto", servers) == "xla"
  assert spec.dispatch("op", "auto", {**servers, "triton": lambda: "triton"}) == "triton"
  with pytest.raises(NotImplementedError, match="too old a device"):
    spec.dispatch("op", "triton", servers)
