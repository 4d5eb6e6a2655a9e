"""Inputs at the edge of what sparse attention promises: unused slots, ids that come twice, jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.nn import sparse_attention
from tests.nn import sparse_oracle as oracle


@pytest.mark.parametrize("num, dense_len", [(3, -1), (20, -1), (20, 90)])
def test_unused_slots_may_hold_anything(num, dense_len):
  """Also what no product with 0 removes; results and gradients, by kv_length and by q_offset."""
  cfg = oracle.small(dense_len=dense_len)
  q, k, v = oracle.draw(3, num, 90, 2, 1, 8)
  end = 60 + num

  def total(q, k, v):
    out = sparse_attention.infllm_attention(q, k, v, cfg, q_offset=60, kv_length=end)
    same = sparse_attention.infllm_attention(q, k, v, cfg, q_offset=60)
    return jnp.sum(out**2), (out, same)

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
  expected = run(q, *(jnp.asarray(x).at[:, end:].set(0) for x in (k, v)))
  found = run(q, jnp.asarray(k).at[:, end:].set(np.nan), jnp.asarray(v).at[:, end:].set(np.inf))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert np.isfinite(found[0][0])


@pytest.mark.parametrize("dense_len", [-1, 30, 1000], ids=["sparse", "each", "dense"])
def test_queries_beyond_the_length_give_nothing(dense_len):
  """On both sides of the switch, decided by the shape or by the data; no gradient from there."""
  cfg = oracle.small(dense_len=dense_len)
  q, k, v = oracle.draw(7, 20, 40, 2, 1, 8, B=2)

  def total(k, v, lengths):
    out = sparse_attention.infllm_attention(q, k, v, cfg, q_offset=20, kv_length=lengths)
    return jnp.sum(out[0, 5:]) + jnp.sum(out[1, 15:]), out

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (beyond, out), gradients = run(k, v, np.array([25, 35]))
  assert beyond == 0 and np.all(out[0, :5] != 0) and np.all(out[1, :15] != 0)
  assert not any(np.any(x) for x in gradients)


@pytest.mark.parametrize("dense_len", [-1, 1000], ids=["sparse", "dense"])
def test_an_id_that_comes_twice_is_two_documents(dense_len):
  """A document is a run of equal ids (section 12), on both sides of the switch."""
  cfg = oracle.small(dense_len=dense_len)
  q, k, v = oracle.draw(4, 64, 64, 2, 1, 8)
  ids = np.repeat([5, 0, 7, 5], (16, 16, 16, 16))[None].astype(np.int32)
  found = sparse_attention.infllm_attention(q, k, v, cfg, segment_ids=ids)
  scores = np.einsum("thc,sc->hts", q[0, 48:], k[0, 48:, 0]) / np.sqrt(8)
  scores = np.where(np.tri(16, dtype=bool), scores, -np.inf)  # one block: all its past
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs = probs / probs.sum(-1, keepdims=True)
  np.testing.assert_allclose(
    found[0, 48:], np.einsum("hts,sv->thv", probs, v[0, 48:, 0]), atol=2e-5
  )


def test_under_jit_documents_off_the_grid_get_no_blocks():
  """Nobody can look at traced ids: an empty list, not one of another grid."""
  cfg = oracle.small()
  q, k, _ = oracle.draw(5, 96, 96, 2, 1, 8)
  ids = np.repeat([1, 2], (33, 63))[None].astype(np.int32)
  select = jax.jit(lambda ids: sparse_attention.select_blocks(q, k, cfg, segment_ids=ids))
  lists, counts = select(ids)
  whole, whole_counts = sparse_attention.select_blocks(q, k, cfg, segment_ids=ids)
  np.testing.assert_array_equal(counts[0, 0, :33], whole_counts[0, 0, :33])
  assert np.all(whole_counts[0, 0, 33:] > 0)
  assert not np.any(counts[0, 0, 33:]) and np.all(np.asarray(lists)[0, 0, 33:] == -1)


def test_numbers_in_arrays_are_checked_as_those_of_python():
  cfg = oracle.small()
  q, k, v = oracle.draw(6, 3, 20, 2, 1, 8)
  with pytest.raises(ValueError, match="q_offset: found 18, expected 0..17"):
    sparse_attention.infllm_attention(q, k, v, cfg, q_offset=np.int64(18))
  with pytest.raises(ValueError, match="kv_length: found 21, expected 0..20"):
    sparse_attention.infllm_attention(q, k, v, cfg, kv_length=np.int32(21))
  with pytest.raises(ValueError, match=r"kv_length: found \[ 3 21\], expected 0..20"):
    sparse_attention.infllm_attention(
      *(np.concatenate((x, x)) for x in (q, k, v)), cfg, kv_length=jnp.array([3, 21])
    )
  with pytest.raises(ValueError, match="q_offset: found -1, expected 0..17"):
    sparse_attention.select_blocks(q, k, cfg, q_offset=np.int64(-1))
