"""Sparse decoding on rows and pages against a loop over queries in float64."""

import jax.numpy as jnp
import pytest

from pallas_kernels.common import spec
from pallas_kernels.sparse_decode import api, ref, xla
from tests.pallas_kernels import sparse_suite as suite


@pytest.mark.parametrize("layout", suite.LAYOUTS)
@pytest.mark.parametrize("backend", [ref.decode_ref, xla.decode_xla], ids=["ref", "xla"])
def test_decode_is_the_equation(backend, layout):
  suite.check_decode(backend, layout)


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
