"""Training: step, loop, starts, evaluation, stopping."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
