"""Model wind tunnel: small runs that decide about large ones."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(__name__)
