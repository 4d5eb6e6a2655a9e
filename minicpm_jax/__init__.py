"""MiniCPM and MiniCPM4 in JAX: models, training, sparse attention, decoding.

`import minicpm_jax as mc` then `mc.ckpt.load_hf(...)`, `mc.infer.Chat(...)`; submodules are
imported on first use.
"""

import importlib

_SUBMODULES = (
  "ckpt",
  "config",
  "core",
  "data",
  "infer",
  "models",
  "nn",
  "optim",
  "quant",
  "text",
  "train",
)

__all__ = list(_SUBMODULES)
__version__ = "0.1.0"


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.{name}")
  raise AttributeError(f"module 'minicpm_jax' has no attribute {name!r}")


def __dir__():
  return sorted(list(globals()) + list(_SUBMODULES))
