"""Objectives beyond pretraining: losses that plug into `train.step`."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
