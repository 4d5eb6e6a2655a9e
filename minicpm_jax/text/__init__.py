"""Text and ids: tokenizers behind one protocol, chat templates, loss masks from turns."""

import importlib

_FUNCTIONS = {
  "load_tokenizer": "tokenizer",
  "train_bpe": "tokenizer",
  "render": "chat",
  "encode_chat": "chat",
  "encode_with_mask": "masks",
}
_SUBMODULES = ("chat", "masks", "sentencepiece_tokenizer", "templates", "tokenizer", "tools")

__all__ = [*_FUNCTIONS, *_SUBMODULES]


def __getattr__(name):
  if name in _SUBMODULES:
    return importlib.import_module(f"minicpm_jax.text.{name}")
  if name in _FUNCTIONS:
    return getattr(importlib.import_module(f"minicpm_jax.text.{_FUNCTIONS[name]}"), name)
  raise AttributeError(f"module 'minicpm_jax.text' has no attribute {name!r}")


def __dir__():
  return sorted(__all__)
