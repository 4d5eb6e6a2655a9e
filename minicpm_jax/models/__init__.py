"""The family: configs of its members, the transformer, caches, drafts, conversions."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
