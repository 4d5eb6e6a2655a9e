"""Math of the layers as functions of arrays, and the linen modules that own their parameters."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
