"""Low-bit weights: the QTensor leaf, quantisers, QAT forward, FP8 (quantization.md)."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
