"""Text and ids: tokenizers behind one protocol, chat templates, loss masks from turns."""

from minicpm_jax.core import lazy

__getattr__, __dir__ = lazy.exports(
  __name__,
  {
    "load_tokenizer": "tokenizer",
    "train_bpe": "tokenizer",
    "render": "chat",
    "encode_chat": "chat",
    "encode_with_mask": "masks",
  },
)
