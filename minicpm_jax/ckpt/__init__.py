"""Checkpoints: Hugging Face folders, GGUF files, training runs. Functions load on first use."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(
  __name__,
  {
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
  },
)
