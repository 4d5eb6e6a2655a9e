"""Text and tokenised data: readers, shards, sources, mixtures, packing, batches."""

import importlib

_SUBMODULES = (
  "classifier",
  "decontaminate",
  "dedup",
  "documents",
  "executor",
  "filters",
  "iterator",
  "judge",
  "langid",
  "mixture",
  "ngrams",
  "packing",
  "pii",
  "python_corpus",
  "repetition",
  "rounds",
  "scoring",
  "seeds",
  "semantic",
  "shards",
  "sources",
  "spark",
  "stats",
  "tolerant",
  "ultraclean",
  "warc",
  "workers",
)

__all__ = list(_SUBMODULES)


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.data.{name}")
  raise AttributeError(f"module 'minicpm_jax.data' has no attribute {name!r}")
