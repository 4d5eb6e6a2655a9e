"""Text and tokenised data: readers, shards, sources, mixtures, packing, batches."""

import importlib

_SUBMODULES = (
  "documents",
  "iterator",
  "mixture",
  "packing",
  "python_corpus",
  "shards",
  "sources",
)

__all__ = list(_SUBMODULES)


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.data.{name}")
  raise AttributeError(f"module 'minicpm_jax.data' has no attribute {name!r}")
