"""Text and tokenised data: readers, shards, sources, mixtures, packing, batches."""

import importlib

_SUBMODULES = (
  "decontaminate",
  "dedup",
  "documents",
  "executor",
  "filters",
  "iterator",
  "langid",
  "mixture",
  "ngrams",
  "packing",
  "pii",
  "python_corpus",
  "repetition",
  "semantic",
  "shards",
  "sources",
  "spark",
  "tolerant",
  "workers",
)

__all__ = list(_SUBMODULES)


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.data.{name}")
  raise AttributeError(f"module 'minicpm_jax.data' has no attribute {name!r}")
