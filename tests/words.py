"""Sources whose token ids a test chooses: text is numbers, every number is a token."""

import pathlib
from collections.abc import Iterable

from minicpm_jax import config
from minicpm_jax.data import documents, shards


class NumberTokenizer:
  """Token ids written as numbers; EOS is 1, nothing is special in text."""

  vocab_size, bos_id, eos_id, pad_id, stop_ids, add_bos = 64, None, 1, None, (), False
  special_tokens: dict[str, int] = {}
  chat_template = None

  def encode(self, text, *, add_bos=False, parse_special=True):
    return [int(word) for word in text.split()]

  def decode(self, ids, *, skip_special=True):
    return " ".join(map(str, ids))

  def decode_bytes(self, ids, *, skip_special=True):
    return self.decode(ids).encode()

  def save(self, folder):
    (pathlib.Path(folder) / "name").write_text("numbers")


def text_of(ids: Iterable[int]) -> str:
  return " ".join(map(str, ids))


def write_source(
  folder: pathlib.Path, name: str, texts: Iterable[str], tok: NumberTokenizer | None = None
) -> config.SourceConfig:
  """A shard folder of documents written as numbers."""
  tok = tok or NumberTokenizer()
  shards.prepare(documents.from_texts(texts), folder / name, name=name, tokenizer=tok)
  return config.SourceConfig(name=name, path=str(folder / name))


def model_config(vocab_size: int, **changes) -> config.ModelConfig:
  """Two layers, width 32: compiles in seconds."""
  return config.ModelConfig(
    name="test",
    vocab_size=vocab_size,
    model_dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    **changes,
  )
