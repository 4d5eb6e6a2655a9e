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


# --- Stop strings and whole answers -----------------------------------------------------------


def _first_end(text, stops):
  """The definition: cut at the first character that completes a stop string."""
  for end in range(1, len(text) + 1):
    hits = [stop for stop in stops if text[:end].endswith(stop)]
    if hits:
      return text[: end - max(map(len, hits))], max(hits, key=len)
  return text, None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
  st.text("abc", max_size=30),
  st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
  st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_stop_strings_cut_where_the_first_one_ends_whatever_the_pieces(text, stops, cuts):
  expected, found = _first_end(text, stops)
  stream = detokenize.StopStrings(stops)
  said, start = "", 0
  for size in cuts:
    said += stream.push(text[start : start + size])
    start += size
    assert expected.startswith(said)  # nothing has to be taken back
  assert said + stream.finish() == expected
  assert stream.found == found


def test_one_text_is_one_stop_string():
  stream = detokenize.StopStrings("###")
  assert stream.push("# 1\n## 2\n### 3") == "# 1\n## 2\n" and stream.found == "###"


def test_text_that_only_looked_like_a_stop_string_comes_out_as_soon_as_it_cannot_be_one():
  stream = detokenize.StopStrings(["</end>"])
  assert [stream.push(p) for p in ("a<", "/en", "x</", "end")] == ["a", "", "</enx", ""]
  assert stream.finish() == "</end"
  found = detokenize.StopStrings(["##"])
  assert found.push("a#") == "a" and found.push("#tail") == "" and found.rest == "tail"
  with pytest.raises(ValueError, match=r"stop: found \[''\], expected texts that are not empty"):
    detokenize.StopStrings([""])


def test_an_answer_ends_at_a_stop_id_or_a_stop_string_across_tokens(byte_tokenizer):
  tok = byte_tokenizer()
  stream = detokenize.TextStream(tok, stop_ids=(257,), stop=["né!"])
  assert stream.push(list("a né?".encode())) == "a né?"
  assert stream.push([*"b né".encode()]) == "b "
  assert stream.finish_reason is None
  assert stream.push([*b"! more"]) == ""
  assert stream.finish_reason == "stop" and stream.stop_string == "né!"
  assert stream.num_tokens == len("a né?b né!".encode())  # tokens after the end do not count
  assert stream.finish("length") == "" and stream.finish_reason == "stop"

  ended = detokenize.TextStream(tok, stop_ids=(257,), stop=["xyz"])
  assert ended.push([*b"xy", 258, 257, 65]) == "xy"  # 258 is special and not shown
  assert ended.finish_reason == "stop" and ended.stop_string is None and ended.num_tokens == 4

  cut = detokenize.TextStream(tok, stop=["xyz"], kept_special=(258,))
  assert cut.push([258, *b"xy", 0xE8]) == "<|im_start|>"
  assert cut.finish("length") == "xy\N{REPLACEMENT CHARACTER}"
  assert cut.finish_reason == "length" and cut.num_tokens == 4
