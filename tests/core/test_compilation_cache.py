"""The persistent compilation cache is on inside a run and off behind it."""

import jax
import jax.numpy as jnp
import pytest

from minicpm_jax.core import compilation_cache


def test_only_what_is_compiled_inside_is_stored(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  folders = [tmp_path / "a", tmp_path / "b"]
  for i, folder in enumerate(folders):
    with compilation_cache.use(str(folder)):
      jax.jit(lambda x, i=i: x * (i + 2))(jnp.ones(3 + i)).block_until_ready()
  jax.jit(lambda x: x * 5)(jnp.ones(7)).block_until_ready()
  stored = [{p.name for p in folder.glob("jit*-cache")} for folder in folders]
  assert all(stored) and not stored[0] & stored[1]
  assert jax.config.jax_compilation_cache_dir == before
  with pytest.raises(RuntimeError, match="inside"), compilation_cache.use(str(tmp_path / "c")):
    raise RuntimeError("inside")
  assert jax.config.jax_compilation_cache_dir == before
  with compilation_cache.use(None):
    assert jax.config.jax_compilation_cache_dir == before
