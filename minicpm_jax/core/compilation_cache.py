"""JAX's persistent compilation cache for as long as a run lasts.

The setting is global to the process and JAX opens a cache once: without this, what is compiled
after a run would go to that run's folder too.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

_EVERYTHING = {
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def use(folder: str | None) -> Iterator[None]:
  """Programs compiled inside are stored in and taken from `folder`; None changes nothing."""
  if folder is None:
    yield
    return
  wanted = {"jax_compilation_cache_dir": folder, **_EVERYTHING}
  before = {name: getattr(jax.config, name) for name in wanted}
  try:
    for name, value in wanted.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
