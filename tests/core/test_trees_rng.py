"""Paths, regex labels, counts; random keys by purpose and step."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.core import rng, trees

TREE = {
  "embed": {"embedding": jnp.ones((4, 2))},
  "layers": {"attn": {"q": {"kernel": jnp.ones((3, 2, 2), jnp.bfloat16)}}, "n": jnp.zeros(2, int)},
}


@pytest.mark.smoke
def test_flatten_and_unflatten_are_inverse():
  flat = trees.flatten_paths(TREE)
  assert list(flat) == ["embed/embedding", "layers/attn/q/kernel", "layers/n"]
  assert jax.tree.structure(trees.unflatten(flat)) == jax.tree.structure(TREE)
  assert trees.unflatten(flat)["layers"]["n"] is TREE["layers"]["n"]


@pytest.mark.parametrize("paths", [["a", "a/b"], ["a/b", "a"]])
def test_unflatten_refuses_a_leaf_that_is_also_a_folder(paths):
  with pytest.raises(ValueError, match="found"):
    trees.unflatten({path: 0 for path in paths})


def test_counts_and_casts():
  assert trees.num_params(TREE) == 8 + 12 + 2
  assert trees.nbytes(TREE) == 8 * 4 + 12 * 2 + 2 * 4
  cast = trees.cast(TREE, jnp.float16)
  assert cast["layers"]["attn"]["q"]["kernel"].dtype == jnp.float16
  assert cast["layers"]["n"].dtype == TREE["layers"]["n"].dtype
  assert trees.map_with_path(lambda path, x: f"{path}:{x.ndim}", TREE)["embed"]["embedding"] == (
    "embed/embedding:2"
  )


@pytest.mark.smoke
def test_keys_depend_on_seed_purpose_and_step_only():
  data = lambda *args: tuple(np.asarray(jax.random.key_data(rng.key(*args))))  # noqa: E731
  assert data(0, "init") == data(0, "init", 0)
  distinct = {data(0, "init"), data(1, "init"), data(0, "dropout"), data(0, "init", 1)}
  assert len(distinct) == 4
  traced = jax.jit(lambda step: jax.random.key_data(rng.key(0, "init", step)))(7)
  assert tuple(np.asarray(traced)) == data(0, "init", 7)


def test_the_tag_of_a_purpose_is_its_hash_on_every_machine():
  digest = hashlib.sha256(b"init").digest()
  assert rng.tag("init") == int.from_bytes(digest[:4], "little") // 2
