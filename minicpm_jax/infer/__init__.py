"""Decoding: `Chat(model, params, tok).say(text)`; below it `Engine`, `generate`, `sampling`."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(
  __name__,
  {
    "Chat": "chat",
    "Engine": "engine",
    "Request": "engine",
  },
)
