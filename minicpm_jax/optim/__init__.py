"""Learning-rate schedules, muP, the optimiser, diagnostics of the decay."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
