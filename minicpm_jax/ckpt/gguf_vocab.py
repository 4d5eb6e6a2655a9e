"""The tokenizer inside a GGUF file (`tokenizer.ggml.*`).

Built: model "gpt2" (byte-level BPE) with the pre-tokenizers of `PRE`, and model "llama"
(SentencePiece BPE, merges by score), read and written. Every other kind is refused by its name.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from minicpm_jax import config
from minicpm_jax.ckpt import errors
from minicpm_jax.core.extras import require_extra
from minicpm_jax.text import tokenizer
from minicpm_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer

# Token types of the format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# End-of-generation texts beside the declared EOS: llama.cpp stops at them too when they are control
# tokens.
END_TEXTS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regular expressions applied one after the other (llama.cpp's list), or None
# for GPT-2's own splitting after single digits.
PRE: dict[str, tuple[str, ...] | None] = {
  "smollm": None,
  "gpt-2": (_GPT2,),
  "llama-bpe": (_LLAMA3,),
  "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}


# What is read of the metadata, by type: of one value, and of all in an array.
_VALUES: dict[str, type] = {f"tokenizer.ggml.{name}": str for name in ("model", "pre")}
_VALUES |= {f"tokenizer.ggml.{name}_token_id": int for name in ("bos", "eos", "eot", "padding")}
_VALUES |= {"tokenizer.ggml.add_bos_token": bool, "tokenizer.chat_template": str}
_ARRAYS: dict[str, Any] = {"tokens": str, "merges": str, "token_type": int, "scores": int | float}


def _check_types(fields: Mapping[str, Any], source: str) -> None:
  for key, kind in _VALUES.items():
    if (value := fields.get(key)) is not None and type(value) is not kind:
      raise errors.CheckpointError(
        f"{source}: {key}: found {value!r:.60}, expected one of type {kind.__name__}"
      )
  for name, kind in _ARRAYS.items():
    key = f"tokenizer.ggml.{name}"
    value = fields.get(key, [])
    if not isinstance(value, list) or not all(isinstance(x, kind) for x in value):
      shown = getattr(kind, "__name__", kind)
      raise errors.CheckpointError(
        f"{source}: {key}: found {value!r:.60}, expected an array of {shown}"
      )


def read_tokenizer(fields: Mapping[str, Any], source: str) -> tokenizer.Tokenizer | None:
  """The tokenizer of the metadata, None where the file holds none; `source` is for messages."""
  _check_types(fields, source)
  kind = fields.get("tokenizer.ggml.model")
  builders: dict[str, Callable[..., tokenizer.Tokenizer]] = {"gpt2": _bpe, "llama": _spm}
  if kind is None or kind == "none":
    return None
  if kind not in builders:
    raise errors.CheckpointError(
      f"{source}: tokenizer.ggml.model: found {kind!r}, expected one of {sorted(builders)}"
    )
  tokens = _list(fields, "tokenizer.ggml.tokens", source)
  types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
  if len(types) != len(tokens):
    raise errors.CheckpointError(
      f"{source}: tokenizer.ggml.token_type: found {len(types)} entries, expected {len(tokens)}"
    )
  try:
    return builders[kind](fields, tokens, types, source)
  except tokenizer.TokenizerError as error:
    raise errors.CheckpointError(f"{source}: tokenizer: {error}") from error


def _list(fields: Mapping[str, Any], key: str, source: str) -> list[Any]:
  value = fields.get(key)
  if not isinstance(value, list) or not value:
    raise errors.CheckpointError(f"{source}: {key}: found {value!r:.40}, expected a filled array")
  return value


def _traits(
  fields: Mapping[str, Any], tokens: list[str], types: list[int], source: str, default_bos: bool
) -> tokenizer.Traits:
  def token_id(name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = fields.get(key)
    if value is not None and not 0 <= value < len(tokens):
      raise errors.CheckpointError(f"{source}: {key}: found {value}, expected < {len(tokens)}")
    return value

  stops = [token_id("eos"), token_id("eot")]
  stops += [i for i, t in enumerate(tokens) if types[i] == CONTROL and t in END_TEXTS]
  bos_id = token_id("bos")
  add_bos = fields.get("tokenizer.ggml.add_bos_token", default_bos)
  return tokenizer.Traits(
    bos_id=bos_id,
    eos_id=token_id("eos"),
    pad_id=token_id("padding"),
    stop_ids=tuple(dict.fromkeys(i for i in stops if i is not None)),
    add_bos=bool(add_bos) and bos_id is not None,
    chat_template=fields.get("tokenizer.chat_template"),
  )


def _bpe(
  fields: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> tokenizer.HFTokenizer:
  """Byte-level BPE: vocabulary, merges and the named pre-tokenizer."""
  tokenizers = require_extra("tokenizers", extra="text")
  pre = fields.get("tokenizer.ggml.pre", "default")
  if pre not in PRE:
    raise errors.CheckpointError(
      f"{source}: tokenizer.ggml.pre: found {pre!r}, expected one of {sorted(PRE)}"
    )
  vocab = {text: i for i, text in enumerate(tokens)}
  if len(vocab) != len(tokens):
    twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
    raise errors.CheckpointError(f"{source}: tokenizer.ggml.tokens: {twice!r} stands there twice")
  merges = [tuple(m.split(" ")) for m in _list(fields, "tokenizer.ggml.merges", source)]
  try:
    model = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
  except Exception as error:  # the Rust side raises the bare class
    raise errors.CheckpointError(f"{source}: tokenizer.ggml.merges: {error}") from error
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = _pre_tokenizer(PRE[pre])
  backend.decoder = tokenizers.decoders.ByteLevel()
  for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
    if kind in (UNKNOWN, CONTROL, USER_DEFINED):
      is_special = kind != USER_DEFINED
      added = tokenizers.AddedToken(text, normalized=False, special=is_special)
      (backend.add_special_tokens if is_special else backend.add_tokens)([added])
      assert backend.token_to_id(text) == i
  traits = _traits(fields, tokens, types, source, default_bos=pre == "llama-bpe")
  if traits.add_bos and traits.bos_id is not None:
    tokenizer.prepend_bos(backend, tokens[traits.bos_id])
  return tokenizer.HFTokenizer(backend, traits)


def _pre_tokenizer(patterns: tuple[str, ...] | None) -> Any:
  tokenizers = require_extra("tokenizers", extra="text")
  pre = tokenizers.pre_tokenizers
  if patterns is None:
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre.Sequence([pre.Digits(individual_digits=True), byte_level])
  splits = [pre.Split(tokenizers.Regex(p), behavior="isolated") for p in patterns]
  return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _spm(
  fields: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> SentencePieceTokenizer:
  """SentencePiece BPE from pieces, scores and types; control tokens are cut out of the text."""
  require_extra("sentencepiece", extra="text")
  from sentencepiece import sentencepiece_model_pb2

  scores = _list(fields, "tokenizer.ggml.scores", source)
  if len(scores) != len(tokens):
    raise errors.CheckpointError(
      f"{source}: tokenizer.ggml.scores: found {len(scores)} entries, expected {len(tokens)}"
    )
  traits = _traits(fields, tokens, types, source, default_bos=True)
  proto = sentencepiece_model_pb2.ModelProto()
  for text, score, kind in zip(tokens, scores, types, strict=True):
    proto.pieces.add(piece=text, score=score, type=kind)
  spec = proto.trainer_spec
  spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
  spec.vocab_size = len(tokens)
  spec.byte_fallback = BYTE in types
  if UNKNOWN in types:
    spec.unk_piece = tokens[types.index(UNKNOWN)]
  if traits.bos_id is not None:
    spec.bos_piece = tokens[traits.bos_id]
  if traits.eos_id is not None:
    spec.eos_piece = tokens[traits.eos_id]
  normalizer = proto.normalizer_spec
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
  normalizer.remove_extra_whitespaces = bool(
    fields.get("tokenizer.ggml.remove_extra_whitespaces", False)
  )
  special = {t: i for i, t in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL)}
  return SentencePieceTokenizer(proto.SerializeToString(), special, special, traits, source)


# ------------------------------------------------------------------------------------ writing


def write_tokenizer(writer: Any, tok: tokenizer.Tokenizer | None, cfg: config.ModelConfig) -> None:
  """Vocabulary, special ids and chat template into a `gguf.GGUFWriter`; None writes the ids only.

  The vocabulary is filled up to the model's with tokens of type unused.
  """
  if tok is None:
    writer.add_tokenizer_model("none")
    _write_ids(writer, cfg.bos_id, cfg.stop_ids, cfg.pad_id)
    return
  if tok.vocab_size > cfg.vocab_size:
    raise errors.CheckpointError(
      f"save_gguf: tokenizer: found {tok.vocab_size} tokens, expected at most the model's "
      f"{cfg.vocab_size}"
    )
  if isinstance(tok, SentencePieceTokenizer):
    tokens, types = _write_spm(writer, tok, cfg.vocab_size)
  elif isinstance(tok, tokenizer.HFTokenizer):
    tokens, types = _write_bpe(writer, tok)
  else:
    raise errors.CheckpointError(
      f"save_gguf: tokenizer: found {type(tok).__name__}, expected HFTokenizer or "
      "SentencePieceTokenizer"
    )
  for i in range(len(tokens), cfg.vocab_size):
    tokens.append(f"[PAD{i}]")
    types.append(UNUSED)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  eos = () if tok.eos_id is None else (tok.eos_id,)
  _write_ids(writer, tok.bos_id, tuple(dict.fromkeys((*eos, *tok.stop_ids))), tok.pad_id)
  writer.add_add_bos_token(tok.add_bos)
  writer.add_add_eos_token(False)
  if tok.chat_template is not None:
    writer.add_chat_template(tok.chat_template)


def _write_ids(
  writer: Any, bos_id: int | None, stop_ids: tuple[int, ...], pad_id: int | None
) -> None:
  """The first stop id is EOS, the second end-of-turn; the format has no place for more."""
  if bos_id is not None:
    writer.add_bos_token_id(bos_id)
  if stop_ids:
    writer.add_eos_token_id(stop_ids[0])
  if len(stop_ids) > 1:
    writer.add_eot_token_id(stop_ids[1])
  if pad_id is not None:
    writer.add_pad_token_id(pad_id)


def _write_bpe(writer: Any, tok: tokenizer.HFTokenizer) -> tuple[list[str], list[int]]:
  spec = json.loads(tok.backend.to_str())
  model = spec["model"]
  if model["type"] != "BPE" or model.get("byte_fallback"):
    raise errors.CheckpointError(
      f"save_gguf: tokenizer.json: found {model['type']} (byte_fallback "
      f"{model.get('byte_fallback')}), expected byte-level BPE"
    )
  if spec["normalizer"] is not None:
    raise errors.CheckpointError(
      f"save_gguf: tokenizer.json: found normalizer {spec['normalizer']['type']}, expected none"
    )
  by_id = {i: text for text, i in model["vocab"].items()}
  added = {t["id"]: t for t in spec["added_tokens"]}
  tokens, types = [], []
  for i in range(tok.vocab_size):
    if i in added:
      tokens.append(added[i]["content"])
      types.append(CONTROL if added[i]["special"] else USER_DEFINED)
    else:
      tokens.append(by_id.get(i, f"[PAD{i}]"))
      types.append(NORMAL if i in by_id else UNUSED)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(_pre_name(spec["pre_tokenizer"]))
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  writer.add_token_merges(merges)
  return tokens, types


def _pre_name(found: dict[str, Any] | None) -> str:
  """The name in `PRE` whose pre-tokenizer is this one (offsets do not matter)."""
  tokenizers = require_extra("tokenizers", extra="text")

  def plain(spec: Any) -> Any:
    if isinstance(spec, dict):
      parts = {k: plain(v) for k, v in spec.items() if k not in ("trim_offsets", "invert")}
      is_single = parts.get("type") == "Sequence" and len(parts["pretokenizers"]) == 1
      return parts["pretokenizers"][0] if is_single else parts
    return [plain(x) for x in spec] if isinstance(spec, list) else spec

  for name, patterns in PRE.items():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(patterns)
    if plain(json.loads(backend.to_str())["pre_tokenizer"]) == plain(found):
      return name
  raise errors.CheckpointError(
    f"save_gguf: tokenizer.json: pre_tokenizer: found {json.dumps(found)[:200]}, expected one that "
    f"GGUF names among {sorted(PRE)}"
  )


def _write_spm(writer: Any, tok: SentencePieceTokenizer, size: int) -> tuple[list[str], list[int]]:
  require_extra("sentencepiece", extra="text")
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(tok.model)
  tokens = [p.piece for p in proto.pieces]
  scores = [float(p.score) for p in proto.pieces]
  types = [int(p.type) for p in proto.pieces]
  for i in range(len(tokens), tok.vocab_size):
    tokens.append(f"[PAD{i}]")
    scores.append(-1000.0)
    types.append(UNUSED)
  for text, i in tok.added_tokens.items():
    tokens[i] = text
    if types[i] not in (UNKNOWN, BYTE):
      types[i] = CONTROL if text in tok.special_tokens else USER_DEFINED
  scores += [-1000.0] * (size - len(scores))
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_scores(scores)
  writer.add_add_space_prefix(bool(proto.normalizer_spec.add_dummy_prefix))
  extra = bool(proto.normalizer_spec.remove_extra_whitespaces)
  writer.add_remove_extra_whitespaces(extra)
  return tokens, types
