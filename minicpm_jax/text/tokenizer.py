"""One tokenizer protocol, the `tokenizers` (HF json) implementation, loading and training.

A tokenizer here never adds or guesses a BOS by itself: `encode` is text to ids, special and added
tokens in the text are recognised, and `add_bos=True` puts one BOS in front. `add_bos` (attribute)
says what the model expects. With `parse_special=False` special tokens in the text are ordinary
characters ("<s>" in a document is no BOS), which is what raw text wants: `encode_plain`. Bytes come
out exactly, so that streaming and bits-per-byte work.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from minicpm_jax.core import files
from minicpm_jax.core.extras import require_extra
from minicpm_jax.text import bytes_map, templates

Lookup = Callable[[str], int | None]  # token text -> id, None where there is no such token
MAX_ID = 1 << 24  # no vocabulary has as many tokens
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


class TokenizerError(ValueError):
  """A tokenizer file that is damaged, incomplete or of a kind not supported."""


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the code needs of a tokenizer; ids outside its table decode to nothing."""

  @property
  def vocab_size(self) -> int: ...
  @property
  def special_tokens(self) -> dict[str, int]: ...
  @property
  def bos_id(self) -> int | None: ...
  @property
  def eos_id(self) -> int | None: ...
  @property
  def pad_id(self) -> int | None: ...
  @property
  def stop_ids(self) -> tuple[int, ...]: ...
  @property
  def add_bos(self) -> bool: ...
  @property
  def chat_template(self) -> str | None: ...

  def encode(
    self, text: str, *, add_bos: bool = False, parse_special: bool = True
  ) -> list[int]: ...
  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...
  def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = True) -> bytes: ...
  def save(self, folder: str | os.PathLike[str]) -> None: ...


@contextlib.contextmanager
def text_errors(*texts: Any) -> Iterator[None]:
  """Around the encoding of texts by a library: TokenizerError for what is no Unicode text."""
  try:
    yield
  except (TypeError, RuntimeError) as error:
    for text in texts:
      if not isinstance(text, str):
        raise TokenizerError(f"text: found {text!r:.60}, expected a str") from error
      lone = [i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"]
      if lone:
        raise TokenizerError(
          f"text: found a lone surrogate U+{ord(text[lone[0]]):04X} at character {lone[0]}, "
          "expected Unicode text"
        ) from error
    raise


def encode_plain(tok: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """Ids of raw text: a special token that is spelled out in it is text like any other.

  Added tokens that are not special (white space runs, MiniCPM5's <think>) stay tokens.
  """
  option = {"parse_special": False} if tok.special_tokens else {}
  if hasattr(tok, "encode_batch"):
    return tok.encode_batch(list(texts), **option)
  return [tok.encode(text, **option) for text in texts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """What a tokenizer folder says beside the vocabulary itself."""

  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  stop_ids: tuple[int, ...] = ()
  add_bos: bool = False
  chat_template: str | None = None


class TraitsMixin:
  """The trait properties of the protocol, read from `self.traits`; decoding through bytes."""

  traits: Traits
  special_tokens: dict[str, int]
  strips_first_space: bool = False

  bos_id = property(lambda self: self.traits.bos_id)
  eos_id = property(lambda self: self.traits.eos_id)
  pad_id = property(lambda self: self.traits.pad_id)
  stop_ids = property(lambda self: self.traits.stop_ids)
  add_bos = property(lambda self: self.traits.add_bos)
  chat_template = property(lambda self: self.traits.chat_template)

  def piece_bytes(self, token_id: int) -> bytes:
    """The bytes that one token stands for (its own text for a special token)."""
    raise NotImplementedError

  def token_text(self, token_id: int) -> str | None:
    """The token as its file spells it."""
    raise NotImplementedError

  def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = True) -> bytes:
    """The exact bytes of the tokens, without any space stripped: concatenation is streaming."""
    skipped = self._special_ids if skip_special else frozenset()
    return b"".join(self.piece_bytes(int(i)) for i in ids if int(i) not in skipped)

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of the tokens; bytes that are no UTF-8 become U+FFFD."""
    text = self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")
    return text[1:] if self.strips_first_space and text.startswith(" ") else text

  @property
  def _special_ids(self) -> frozenset[int]:
    ids = self.__dict__.get("_special_id_set")
    if ids is None:
      ids = self.__dict__["_special_id_set"] = frozenset(self.special_tokens.values())
    return ids

  def _with_bos(self, ids: list[int], add_bos: bool) -> list[int]:
    if not add_bos:
      return ids
    if self.bos_id is None:
      raise ValueError("encode: add_bos=True, but this tokenizer has no BOS token")
    return [self.bos_id, *ids]

  def tokenizer_config(self) -> dict[str, Any]:
    """The content of tokenizer_config.json that rebuilds the traits."""
    config: dict[str, Any] = {"add_bos_token": self.add_bos, "add_eos_token": False}
    for key, index in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
      config[f"{key}_token"] = None if index is None else self.token_text(index)
    if self.chat_template is not None:
      config["chat_template"] = self.chat_template
    config["clean_up_tokenization_spaces"] = False
    config["stop_token_ids"] = list(self.stop_ids)  # ours: other readers ignore the key
    return config


class HFTokenizer(TraitsMixin):
  """A `tokenizers` tokenizer (tokenizer.json): byte-level BPE, or BPE with byte fallback."""

  def __init__(self, backend: Any, traits: Traits):
    """Takes a `tokenizers.Tokenizer`; truncation and padding stored in it are switched off."""
    self.backend = backend
    self.backend.no_truncation()
    self.backend.no_padding()
    self.traits = traits
    vocab = backend.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values(), default=-1) + 1
    if self.vocab_size > MAX_ID:  # before to_str, which goes through all ids up to it
      found = self.vocab_size - 1
      raise TokenizerError(f"vocabulary: found token id {found}, expected ids below {MAX_ID}")
    spec = json.loads(backend.to_str())
    decoder = json.dumps(spec["decoder"] or {})
    if '"ByteLevel"' in decoder:
      self._to_bytes = bytes_map.byte_level_bytes
    elif '"ByteFallback"' in decoder:
      self._to_bytes = bytes_map.sentencepiece_bytes
      self.strips_first_space = '"Strip"' in decoder
    else:
      found = (spec["decoder"] or {}).get("type")
      raise TokenizerError(f"decoder: found {found!r}, expected ByteLevel or ByteFallback")
    self._added = {t["id"]: t["content"] for t in spec["added_tokens"]}
    self.special_tokens = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}

  def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
    backend = self.backend if parse_special else self._plain
    with text_errors(text):
      ids = backend.encode(text, add_special_tokens=False).ids
    return self._with_bos(ids, add_bos)

  def encode_batch(self, texts: list[str], *, parse_special: bool = True) -> list[list[int]]:
    """Many texts at once on the library's threads."""
    backend = self.backend if parse_special else self._plain
    with text_errors(*texts):
      return [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]

  @functools.cached_property
  def _plain(self) -> Any:
    """A copy that reads special tokens as text: the switch is a state of the library's object."""
    plain = type(self.backend).from_str(self.backend.to_str())
    plain.encode_special_tokens = True
    return plain

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "_plain"}

  def token_text(self, token_id: int) -> str | None:
    return self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

  def piece_bytes(self, token_id: int) -> bytes:
    if token_id in self._added:
      return self._added[token_id].encode()
    piece = self.token_text(token_id)
    return b"" if piece is None else self._to_bytes(piece)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, readable by transformers."""
    config = self.tokenizer_config() | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_files(
      folder,
      {
        "tokenizer.json": self.backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": json_bytes(config),
      },
    )


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
  """The tokenizer of a model folder: tokenizer.json first, else tokenizer.model, else None."""
  folder = pathlib.Path(folder)
  if (folder / "tokenizer.json").is_file():
    return _load_hf(folder)
  if (folder / "tokenizer.model").is_file():
    from minicpm_jax.text import sentencepiece_tokenizer

    return sentencepiece_tokenizer.load(folder)
  return None


def _load_hf(folder: pathlib.Path) -> HFTokenizer:
  tokenizers = require_extra("tokenizers", extra="text")
  path = folder / "tokenizer.json"
  text = read_bytes(path)
  try:
    backend = tokenizers.Tokenizer.from_str(text.decode())
  except Exception as error:  # the Rust side raises the bare class
    raise TokenizerError(f"{path}: damaged or unknown tokenizer.json: {error}") from error
  config = read_json(folder / "tokenizer_config.json")
  bos = token_id(folder / "tokenizer_config.json", backend.token_to_id, config, "bos_token")
  first = backend.encode("", add_special_tokens=True).ids[:1]
  defaults = {"add_bos_token": bos is not None and first == [bos]}
  traits = read_traits(folder, backend.token_to_id, defaults)
  try:
    return HFTokenizer(backend, traits)
  except TokenizerError as error:
    raise TokenizerError(f"{path}: {error}") from None


def train_bpe(
  texts: Iterable[str],
  vocab_size: int,
  special_tokens: Sequence[str] = SPECIAL_TOKENS,
) -> HFTokenizer:
  """Byte-level BPE over `texts`, digits one by one, no prefix space, no normaliser.

  The special tokens take ids 0.. in their order; <s>, </s> and <|im_end|> get the roles of BOS, EOS
  and stop token where they are among them, and <|im_start|>/<|im_end|> bring the ChatML template.
  A small corpus may give fewer than `vocab_size` ids.
  """
  tokenizers = require_extra("tokenizers", extra="text")
  smallest = 256 + len(special_tokens)
  if vocab_size < smallest:
    raise ValueError(
      f"vocab_size: found {vocab_size}, expected at least {smallest} (bytes+special)"
    )
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  pre = tokenizers.pre_tokenizers
  byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=True)
  backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(special_tokens),
    initial_alphabet=pre.ByteLevel.alphabet(),
    show_progress=False,
  )
  num_chars = 0

  def counted():
    nonlocal num_chars
    for text in texts:
      num_chars += len(text)
      yield text

  backend.train_from_iterator(counted(), trainer=trainer)
  if num_chars == 0:
    raise ValueError("train_bpe: the corpus is empty, expected some text")
  bos, eos, im_end = (backend.token_to_id(t) for t in ("<s>", "</s>", "<|im_end|>"))
  is_chatml = im_end is not None and backend.token_to_id("<|im_start|>") is not None
  traits = Traits(
    bos_id=bos,
    eos_id=eos,
    stop_ids=tuple(i for i in (eos, im_end) if i is not None),
    add_bos=bos is not None,
    chat_template=templates.CHATML if is_chatml else None,
  )
  if bos is not None:
    prepend_bos(backend, "<s>")
  return HFTokenizer(backend, traits)


def prepend_bos(backend: Any, bos: str) -> None:
  """Stores the rule "BOS first" in the `tokenizers` object: other readers of the file need it."""
  tokenizers = require_extra("tokenizers", extra="text")
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
  )


# ----------------------------------------------------------------- files beside the vocabulary


def read_traits(folder: pathlib.Path, lookup: Lookup, defaults: dict[str, Any]) -> Traits:
  """Traits from tokenizer_config.json, generation_config.json, config.json, chat_template.jinja.

  `defaults` fill keys that tokenizer_config.json lacks.
  Stop ids: those of generation_config.json, else of config.json, else of our own key; the
  tokenizer's EOS is always among them.
  """
  own, other, third = (folder / f"{name}config.json" for name in ("tokenizer_", "generation_", ""))
  config, generation, model = defaults | read_json(own), read_json(other), read_json(third)
  eos_id = token_id(own, lookup, config, "eos_token")
  for path, found, key in (
    (other, generation, "eos_token_id"),
    (third, model, "eos_token_id"),
    (own, config, "stop_token_ids"),
  ):
    stops = _ids(path, found, key)
    if key in found:
      break
  if eos_id is not None and eos_id not in stops:
    stops.append(eos_id)
  pad_id = token_id(own, lookup, config, "pad_token")
  if eos_id is None and stops:
    eos_id = stops[0]
  bos_id = token_id(own, lookup, config, "bos_token")
  add_bos = config["add_bos_token"]
  if not isinstance(add_bos, bool | None):
    raise TokenizerError(f"{own}: add_bos_token: found {add_bos!r}, expected true, false or null")
  if bos_id is None:
    bos_id = next(iter(_ids(third, model, "bos_token_id")), None)
  if pad_id is None:
    pad_id = next(iter(_ids(other, generation, "pad_token_id")), None)
  return Traits(
    bos_id=bos_id,
    eos_id=eos_id,
    pad_id=pad_id,
    stop_ids=tuple(stops),
    add_bos=bool(add_bos) and bos_id is not None,
    chat_template=_chat_template(folder, config.get("chat_template")),
  )


def _ids(path: pathlib.Path, config: dict[str, Any], key: str) -> list[int]:
  value = config.get(key)
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
    raise TokenizerError(
      f"{path}: {key}: found {value!r:.80}, expected a token id, a list of token ids or null"
    )
  return list(ids)


def _chat_template(folder: pathlib.Path, template: Any) -> str | None:
  path = folder / "chat_template.jinja"
  if path.is_file():
    try:
      return read_bytes(path).decode()
    except UnicodeDecodeError as error:
      raise TokenizerError(f"{path}: found no UTF-8: {error}") from error
  found = template
  if isinstance(template, list):  # older files: [{"name": "default", "template": ...}, ...]
    is_named = all(isinstance(e, dict) and {"name", "template"} <= set(e) for e in template)
    named = [e["template"] for e in template if e["name"] == "default"] if is_named else [template]
    template = named[-1] if named else None
  if not isinstance(template, str | None):
    raise TokenizerError(
      f"{folder / 'tokenizer_config.json'}: chat_template: found {found!r:.80}, expected a text or "
      "a list of {name, template}"
    )
  return template


def token_id(path: pathlib.Path, lookup: Lookup, config: dict[str, Any], key: str) -> int | None:
  """Id of a token that tokenizer_config.json names as text or as {"content": text}."""
  token = config.get(key)
  if isinstance(token, dict):
    token = token.get("content")
  if token is None:
    return None
  is_text = isinstance(token, str) and not any("\ud800" <= char <= "\udfff" for char in token)
  found = lookup(token) if is_text else None
  if found is None:
    raise TokenizerError(f"{path}: {key} {token!r:.80} is not in the vocabulary")
  return found


def read_bytes(path: pathlib.Path) -> bytes:
  """The file, refused where it is a Git LFS pointer or empty."""
  data = path.read_bytes()
  if not data or data.startswith(b"version https://git-lfs"):
    what = "a Git LFS pointer (run `git lfs pull`)" if data else "an empty file"
    raise TokenizerError(f"{path}: found {what}, expected the file itself")
  return data


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in the file; {} where there is no file."""
  if not path.is_file():
    return {}
  data = read_bytes(path)
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise TokenizerError(f"{path}: not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise TokenizerError(f"{path}: found a {type(value).__name__}, expected a JSON object")
  return value


def json_bytes(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_files(folder: str | os.PathLike[str], contents: dict[str, bytes]) -> None:
  """Name -> bytes in `folder`, each file whole or not at all."""
  for name, content in contents.items():
    files.write(pathlib.Path(folder) / name, content)
