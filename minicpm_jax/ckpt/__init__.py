"""Checkpoints: Hugging Face folders, GGUF files, training runs. Functions load on first use."""

import importlib

_FUNCTIONS = {
  "load_hf": "hf_io",
  "save_hf": "hf_io",
  "load_gguf": "gguf_io",
  "save_gguf": "gguf_write",
  "load_run": "orbax_io",
  "save_gptq": "quant_write",
  "save_marlin": "quant_write",
  "load_draft": "draft_io",
  "save_draft": "draft_io",
  "load_bita": "bita_io",
  "save_bita": "bita_io",
}

__all__ = list(_FUNCTIONS)


def __getattr__(name):
  if name in _FUNCTIONS:
    return getattr(importlib.import_module(f"minicpm_jax.ckpt.{_FUNCTIONS[name]}"), name)
  raise AttributeError(f"module 'minicpm_jax.ckpt' has no attribute {name!r}")


def __dir__():
  return sorted(list(globals()) + list(_FUNCTIONS))
