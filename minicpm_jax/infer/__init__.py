"""Decoding: `Chat(model, params, tok).say(text)`; below it `Engine`, `generate`, `sampling`."""

import importlib

_SUBMODULES = (
  "chain",
  "chat",
  "constrained",
  "detokenize",
  "drafters",
  "engine",
  "frspec",
  "generate",
  "grammars",
  "sampling",
  "server",
  "tree",
  "tune",
)
_NAMES = {"Chat": "chat", "Engine": "engine", "Request": "engine"}

__all__ = [*_NAMES, *_SUBMODULES]


def __getattr__(name):
  if name in _NAMES:
    return getattr(importlib.import_module(f"minicpm_jax.infer.{_NAMES[name]}"), name)
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.infer.{name}")
  raise AttributeError(f"module 'minicpm_jax.infer' has no attribute {name!r}")


def __dir__():
  return sorted(__all__)
