"""Placed arrays: values, types and structure stay, and the memory lives as long as they do."""

import gc
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.core import huge_pages


def test_values_stay_and_arrays_lie_in_one_block():
  rng = np.random.default_rng(0)
  tree = {
    "a": jnp.asarray(rng.normal(size=(300, 70)), jnp.float32),
    "b": [jnp.asarray(rng.integers(-9, 9, (400, 200)), jnp.int8), jnp.ones((3,))],
    "low": jnp.asarray(rng.normal(size=(256, 256)), jnp.bfloat16),
    "codes": jnp.asarray(rng.integers(-8, 8, (512, 512)), jnp.int4),
    "host": rng.normal(size=(300, 300)),
  }
  placed = huge_pages.place(tree)
  assert jax.tree.structure(placed) == jax.tree.structure(tree)
  for new, old in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
    assert new.dtype == old.dtype
    np.testing.assert_array_equal(new, old)
  assert placed["b"][1] is tree["b"][1] and placed["codes"] is tree["codes"]
  if not hasattr(mmap, "MADV_HUGEPAGE"):
    pytest.skip("the system has no MADV_HUGEPAGE, so nothing was moved")
  starts = [x.unsafe_buffer_pointer() for x in (placed["a"], placed["b"][0], placed["low"])]
  sizes = [300 * 70 * 4, 400 * 200, 256 * 256 * 2]
  expected = np.cumsum([0] + [-(-size // 4096) * 4096 for size in sizes])[:3]
  np.testing.assert_array_equal(np.subtract(starts, starts[0]), expected)
  assert starts[0] % 2**21 == 0


def test_a_leaf_outlives_the_tree():
  placed = huge_pages.place([jnp.full((256, 256), i, jnp.float32) for i in range(3)])
  last = placed[2]
  del placed
  gc.collect()
  np.testing.assert_array_equal(jax.jit(lambda x: x + 1)(last), np.full((256, 256), 3.0))


def test_arrays_stay_on_their_device():
  device = jax.devices()[-1]
  placed = huge_pages.place([jax.device_put(jnp.ones((256, 256)), device), jnp.ones((256, 256))])
  assert placed[0].devices() == {device} and placed[0].committed and not placed[1].committed
