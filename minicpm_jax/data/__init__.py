"""Text and tokenised data: readers, shards, sources, mixtures, packing, batches."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
