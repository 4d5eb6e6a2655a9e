"""Making a trained model small and portable: post-training quantisation of whole models."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
