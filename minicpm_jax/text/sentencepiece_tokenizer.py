"""SentencePiece tokenizers: tokenizer.model with added tokens split off first (models.md 8).

The text is cut at the added tokens (longest first), the parts between go to SentencePiece as they
are, each on its own. MiniCPM's model files have no dummy prefix, digits split and byte fallback;
another file's dummy prefix is honoured per part, which is what SentencePiece itself does.
"""

import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from minicpm_jax.core.extras import require_extra
from minicpm_jax.text import bytes_map, tokenizer


class SentencePieceTokenizer(tokenizer.TraitsMixin):
  """A serialized SentencePiece model and the tokens added to it."""

  def __init__(
    self,
    model: bytes,
    added_tokens: dict[str, int],
    special_tokens: dict[str, int],
    traits: tokenizer.Traits,
    source: str = "tokenizer.model",
  ):
    """`added_tokens` (text -> id) are cut out of the text; `special_tokens` are not decoded."""
    sentencepiece = require_extra("sentencepiece", extra="text")
    try:
      self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
      raise tokenizer.TokenizerError(
        f"{source}: damaged, SentencePiece cannot read it: {error}"
      ) from error
    self.model = model
    self.traits = traits
    self.added_tokens = dict(added_tokens)
    self.special_tokens = dict(special_tokens)
    size = self.processor.get_piece_size()
    for text, index in added_tokens.items():
      if index < size and self.processor.id_to_piece(index) != text:
        raise tokenizer.TokenizerError(
          f"{source}: added token {text!r} has id {index}, which is the piece "
          f"{self.processor.id_to_piece(index)!r}"
        )
    self._added_by_id = {i: text for text, i in added_tokens.items()}
    self.vocab_size = max([size - 1, *added_tokens.values()]) + 1
    self._all = _splitter(self.added_tokens)
    self._ordinary = _splitter(set(self.added_tokens) - set(self.special_tokens))
    self.strips_first_space = self.processor.encode("a", out_type=str)[0].startswith("\u2581")

  def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
    ids = []
    splitter = self._all if parse_special else self._ordinary
    for i, part in enumerate(splitter.split(text) if splitter else [text]):
      if i % 2:  # what the splitter matched
        ids.append(self.added_tokens[part])
      elif part:
        with tokenizer.text_errors(part):
          ids.extend(self.processor.encode(part))
    return self._with_bos(ids, add_bos)

  def token_text(self, token_id: int) -> str | None:
    if token_id in self._added_by_id:
      return self._added_by_id[token_id]
    is_piece = 0 <= token_id < self.processor.get_piece_size()
    return self.processor.id_to_piece(token_id) if is_piece else None

  def piece_bytes(self, token_id: int) -> bytes:
    if token_id in self._added_by_id:
      return self._added_by_id[token_id].encode()
    if not 0 <= token_id < self.processor.get_piece_size():
      return b""
    return bytes_map.sentencepiece_bytes(self.processor.id_to_piece(token_id))

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes tokenizer.model unchanged, added_tokens.json and tokenizer_config.json."""
    size = self.processor.get_piece_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = self.tokenizer_config() | {
      "tokenizer_class": "LlamaTokenizer",
      "unk_token": self.processor.id_to_piece(self.processor.unk_id()),
      "added_tokens_decoder": {
        str(i): {"content": text, "special": text in self.special_tokens} | flags
        for text, i in sorted(self.added_tokens.items(), key=lambda item: item[1])
      },
      "additional_special_tokens": [t for t, i in self.special_tokens.items() if i >= size],
      "legacy": True,
      "sp_model_kwargs": {},
      "spaces_between_special_tokens": False,
    }
    added = {text: i for text, i in sorted(self.added_tokens.items()) if i >= size}
    tokenizer.write_files(
      folder,
      {
        "tokenizer.model": self.model,
        "added_tokens.json": tokenizer.json_bytes(added),
        "tokenizer_config.json": tokenizer.json_bytes(config),
      },
    )


def _splitter(tokens: Iterable[str]) -> re.Pattern[str] | None:
  longest_first = sorted(tokens, key=lambda text: (-len(text), text))
  return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def load(folder: pathlib.Path) -> SentencePieceTokenizer:
  """From tokenizer.model, added_tokens.json, tokenizer_config.json and the traits files."""
  path = folder / "tokenizer.model"
  model = tokenizer.read_bytes(path)
  config = tokenizer.read_json(folder / "tokenizer_config.json")
  added, special = _added_tokens(folder, config)
  plain = SentencePieceTokenizer(model, {}, {}, tokenizer.Traits(), str(path)).processor
  control = {plain.id_to_piece(i): i for i in range(plain.get_piece_size()) if plain.is_control(i)}
  unknown = {plain.id_to_piece(plain.unk_id()): plain.unk_id()}
  if "added_tokens_decoder" not in config:  # the model's own control symbols are special in text
    added = added | control

  def lookup(text: str) -> int | None:
    if text in added:
      return added[text]
    index = plain.piece_to_id(text)
    return index if index != plain.unk_id() or text in unknown else None

  defaults: dict[str, Any] = {"add_bos_token": True}  # as LlamaTokenizer's class defaults
  if plain.bos_id() >= 0:
    defaults["bos_token"] = plain.id_to_piece(plain.bos_id())
  if plain.eos_id() >= 0:
    defaults["eos_token"] = plain.id_to_piece(plain.eos_id())
  traits = tokenizer.read_traits(folder, lookup, defaults)
  special = control | unknown | special
  return SentencePieceTokenizer(model, added, special, traits, str(path))


def _added_tokens(
  folder: pathlib.Path, config: dict[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
  """(all added tokens, the special ones among them) of added_tokens.json and the config."""
  path = folder / "added_tokens.json"
  added = tokenizer.read_json(path)
  special = dict(added)
  own, decoder = folder / "tokenizer_config.json", config.get("added_tokens_decoder", {})
  for index, entry in decoder.items() if isinstance(decoder, dict) else [("?", decoder)]:
    text = entry.get("content") if isinstance(entry, dict) else None
    if not (isinstance(text, str) and index.isdecimal() and int(index) < tokenizer.MAX_ID):
      raise tokenizer.TokenizerError(
        f"{own}: added_tokens_decoder: found {{{index!r}: {entry!r:.60}}}, expected an id and "
        "{'content': text}"
      )
    if added.get(text, int(index)) != int(index):
      raise tokenizer.TokenizerError(
        f"{path}: {text!r} has id {added[text]}, tokenizer_config.json says {index}"
      )
    for flag in ("lstrip", "rstrip", "single_word"):
      if entry.get(flag):
        raise tokenizer.TokenizerError(
          f"{own}: added token {text!r} has {flag}=true, which is not supported"
        )
    added[text] = int(index)
    if entry.get("special", False):
      special[text] = int(index)
    else:
      special.pop(text, None)
  for text, index in added.items():
    if type(index) is not int or not 0 <= index < tokenizer.MAX_ID:
      raise tokenizer.TokenizerError(
        f"{path}: id of {text!r}: found {index!r}, expected an integer 0..{tokenizer.MAX_ID - 1}"
      )
  return added, special
