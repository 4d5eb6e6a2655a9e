"""Tokenizers inside GGUF files: reference ids, pre-tokenizers, refusals."""

import json

import numpy as np
import pytest

from minicpm_jax.ckpt import errors, gguf_io
from minicpm_jax.text import tokenizer

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")

from tests.ckpt import gguf_files
from tests.ckpt.gguf_files import STRINGS, TYPES


def write_vocab(path, num_tokens, vocab, drop=()):
  """A one-block file of width 32 whose embedding has a row for each token."""
  rng = np.random.default_rng(0)
  shapes = {
    "token_embd": (num_tokens, 32),
    "output_norm": (32,),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
    **{f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")},
    **{f"blk.0.ffn_{n}": (32, 32) for n in ("gate", "up", "down")},
  }
  tensors = {
    f"{n}.weight": (rng.normal(size=s).astype(np.float32), TYPES["f32"]) for n, s in shapes.items()
  }
  keys = {
    "block_count": 1,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
  }
  return gguf_files.write(path, tensors, keys=keys, vocab=vocab, drop=drop)


def add_bpe(writer, *, tokens, types, merges, pre):
  writer.add_tokenizer_model("gpt2")
  if pre is not None:
    writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_token_merges(merges)


def test_sentencepiece_inside_gives_the_reference_ids(tmp_path, shared_dir):
  """The released MiniCPM4 model file, written as llama.cpp's converter writes it."""
  folder = shared_dir / "models/minicpm4-0.5b-tokenizer"
  expected = tokenizer.load_tokenizer(folder)
  processor = expected.processor
  size = processor.get_piece_size()
  kinds = [
    6 if processor.is_byte(i) else 3 if processor.is_control(i) else 2 if i == 0 else 1
    for i in range(size)
  ]
  names = [processor.id_to_piece(i) for i in range(size)]
  user_defined = {"\n", "\t", "<SEP>", "<CLS>", "!", ".", "+", "-", "=", "?", "...", "```", "---"}
  kinds = [4 if n in user_defined else k for n, k in zip(names, kinds, strict=True)]
  added = sorted(expected.added_tokens.items(), key=lambda item: item[1])[3:]

  def vocab(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*names, *(t for t, _ in added)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)] + [-1000.0] * len(added))
    writer.add_token_types([*kinds, *[3] * len(added)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(73440)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("T")

  _, _, tok = gguf_io.load_gguf(write_vocab(tmp_path / "m.gguf", 73448, vocab))
  for text in STRINGS:
    assert tok.encode(text) == expected.encode(text), text
    assert tok.decode(tok.encode(text)) == expected.decode(expected.encode(text))
  assert tok.encode("hi", add_bos=True) == [1, 6920]
  assert (tok.bos_id, tok.eos_id, tok.stop_ids, tok.add_bos) == (1, 73440, (73440, 2), True)
  assert tok.chat_template == "T"
  tok.save(tmp_path / "saved")
  assert tokenizer.load_tokenizer(tmp_path / "saved").encode(STRINGS[7]) == tok.encode(STRINGS[7])


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "default", None])
def test_byte_level_bpe_inside(tmp_path, shared_dir, pre):
  spec = json.loads((shared_dir / "models/smollm2-135m-instruct/tokenizer.json").read_text())
  merges = [tuple(m) for m in spec["model"]["merges"]][:600]
  base = sorted(c for c in spec["model"]["vocab"] if len(c) == 1)
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokens = list(dict.fromkeys([*special, *base, *("".join(m) for m in merges)]))

  def vocab(writer):
    types = [3] * 3 + [1] * (len(tokens) - 3)
    add_bpe(writer, tokens=tokens, types=types, merges=[" ".join(m) for m in merges], pre=pre)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

  _, _, tok = gguf_io.load_gguf(write_vocab(tmp_path / "m.gguf", len(tokens), vocab))
  expected = {  # by llama.cpp's list of regular expressions for each kind
    "smollm": [*["I", "'ll", " pay", " "], *"12345", " $$(", "5", ").", "\n\n", " ok"],
    "gpt-2": ["I", "'ll", " pay", " 12345", " $$(", "5", ").", "\n\n", " ok"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", " $$(", "5", ").\n\n", " ok"],
    "default": ["I", "'", "ll", " pay", " ", "123", "45", " ", "$$(", "5", ").", "\n\n", " ok"],
  }
  split = tok.backend.pre_tokenizer.pre_tokenize_str("I'll pay 12345 $$(5).\n\n ok")
  found = [tok.decode_bytes([tok.backend.token_to_id(c) for c in p]).decode() for p, _ in split]
  assert found == expected["default" if pre is None else pre]
  assert tok.stop_ids == (2, 0)
  assert tok.add_bos == (pre == "llama-bpe")


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"pre": "tekken"}, "tokenizer.ggml.pre: found 'tekken', expected one of"),
    ({"types": [1]}, "token_type: found 1 entries, expected 3"),
    ({"tokens": ["a", "b", "a"]}, "'a' stands there twice"),
    ({"merges": ["a c"]}, "tokenizer.ggml.merges: "),
    ({"tokens": ["a", "b", "ab", "c"], "types": [1] * 4}, "number of tokens: found 4, expected 3"),
    ({"eos": 7}, "eos_token_id: found 7, expected < 3"),
    ({"merges": [1.5]}, r"m.gguf: tokenizer.ggml.merges: found \[1.5\], expected an array of str"),
    ({"types": ["x"] * 3}, "tokenizer.ggml.token_type: found .'x'.*, expected an array of int"),
  ],
)
def test_bad_vocabulary(tmp_path, changes, match):
  eos = changes.pop("eos", 1)
  fields = {"tokens": ["a", "b", "ab"], "types": [1, 1, 1], "merges": ["a b"], "pre": "gpt-2"}

  def vocab(writer):
    add_bpe(writer, **(fields | changes))
    writer.add_eos_token_id(eos)

  with pytest.raises(errors.CheckpointError, match=match):
    gguf_io.load_gguf(write_vocab(tmp_path / "m.gguf", 3, vocab))


def test_other_vocabulary_kind(tmp_path):
  path = write_vocab(tmp_path / "m.gguf", 3, lambda writer: writer.add_tokenizer_model("t5"))
  with pytest.raises(errors.CheckpointError, match="ggml.model: found 't5', expected one of"):
    gguf_io.load_gguf(path)
