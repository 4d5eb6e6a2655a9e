"""MiniCPM and MiniCPM4 in JAX: models, training, sparse attention, decoding.

`import minicpm_jax as mc` then `mc.ckpt.load_hf(...)`, `mc.infer.Chat(...)`; submodules are
imported on first use.
"""

from minicpm_jax.core import lazy

__version__ = "0.1.0"
__getattr__, __dir__ = lazy.exports(__name__)
