"""Decoding: `Chat(model, params, tok).say(text)`; below it `generate`, `sampling`, `detokenize`."""

import importlib

_SUBMODULES = ("chat", "constrained", "detokenize", "generate", "grammars", "sampling")

__all__ = ["Chat", *_SUBMODULES]


def __getattr__(name):
  if name == "Chat":
    return importlib.import_module("minicpm_jax.infer.chat").Chat
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.infer.{name}")
  raise AttributeError(f"module 'minicpm_jax.infer' has no attribute {name!r}")


def __dir__():
  return sorted(__all__)
