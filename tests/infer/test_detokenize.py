"""Streaming text equals text decoded at once, whatever the cuts."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpm_jax.infer import detokenize


@pytest.mark.smoke
def test_a_character_of_four_bytes_waits_for_its_last_byte(byte_tokenizer):
  stream = detokenize.StreamDecoder(byte_tokenizer())
  pieces = [stream.push([byte]) for byte in "né🙂語".encode()]
  assert pieces == ["n", "", "é", "", "", "", "🙂", "", "", "語"]
  assert stream.finish() == ""


def test_a_sequence_that_ends_inside_a_character(byte_tokenizer):
  stream = detokenize.StreamDecoder(byte_tokenizer())
  assert stream.push(list("a語".encode())[:-1]) == "a"
  assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_skipped_or_shown(byte_tokenizer):
  assert detokenize.StreamDecoder(byte_tokenizer()).push([65, 257, 66]) == "AB"
  shown = detokenize.StreamDecoder(byte_tokenizer(), skip_special=False)
  assert shown.push([65, 257, 66]) == "A</s>B"


def test_only_the_first_space_is_stripped_where_the_tokenizer_adds_one(byte_tokenizer):
  stream = detokenize.StreamDecoder(byte_tokenizer(strips_first_space=True))
  assert [stream.push([b]) for b in b"  a b"] == ["", " ", "a", " ", "b"]


@pytest.mark.smoke
@settings(
  max_examples=25,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)),
  st.lists(st.integers(1, 5), min_size=80, max_size=80),
)
def test_any_bytes_in_any_cuts_equal_one_decode(byte_tokenizer, data, cuts):
  stream = detokenize.StreamDecoder(byte_tokenizer())
  text, start = "", 0
  for size in cuts:
    text += stream.push(list(data[start : start + size]))
    start += size
  assert text + stream.finish() == data.decode("utf-8", errors="replace")


def test_the_released_tokenizer_streams_what_it_decodes(shared_dir):
  """MiniCPM4's SentencePiece vocabulary spells rare characters in single bytes."""
  pytest.importorskip("sentencepiece")
  from minicpm_jax.text import tokenizer

  tok = tokenizer.load_tokenizer(shared_dir / "models" / "minicpm4-0.5b-tokenizer")
  text = "Ünïcode 🙂🙃 𠜎𠜱 你好,世界 12345  two  spaces<|im_end|>\n"
  ids = tok.encode(text)
  stream = detokenize.StreamDecoder(tok)
  pieces = [stream.push([i]) for i in ids]
  assert "".join(pieces) + stream.finish() == tok.decode(ids) == text.replace("<|im_end|>", "")
  assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
