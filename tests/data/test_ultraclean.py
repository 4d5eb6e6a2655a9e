"""Normalisation: every expected line is worked out from the six steps of data.md 2.2."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.data import ultraclean
from minicpm_jax.text import tokenizer


class Pieces:
  """A tokenizer whose pieces are listed by the test: longest match, else one byte."""

  bos_id = eos_id = pad_id = None
  stop_ids, add_bos, special_tokens, chat_template = (), False, {}, None

  def __init__(self, *pieces: str):
    self.table = [bytes([b]) for b in range(256)] + [p.encode() for p in pieces]
    self.vocab_size = len(self.table)

  def encode(self, text, *, add_bos=False):
    data, ids = text.encode(), []
    while data:
      fits = [i for i, piece in enumerate(self.table) if data.startswith(piece)]
      ids.append(max(fits, key=lambda i: len(self.table[i])))
      data = data[len(self.table[ids[-1]]) :]
    return ids

  def decode(self, ids, *, skip_special=True):
    return self.decode_bytes(ids).decode("utf-8", "replace")

  def decode_bytes(self, ids, *, skip_special=True):
    return b"".join(self.table[i] for i in ids)

  def save(self, folder):
    with open(f"{folder}/pieces", "wb") as file:
      file.write(b"\0".join(self.table))


def decode(*pieces):
  return ultraclean.TokenizerSegmenter(Pieces(*pieces), "decode")


@pytest.mark.smoke
@pytest.mark.parametrize(
  "text, folded",
  [
    ("a\n\n\nb", "a\n\nb"),  # 1: three line feeds become two
    ("a\n\n\n\nb\n\nc\nd", "a\n\nb\n\nc\nd"),  # four too; two and one stay
    ("a\r\n\r\n\r\nb", "a\r\n\r\n\r\nb"),  # CRLF runs are left
    ("a\n \n \nb", "a\n \n \nb"),  # lines of spaces are left
    ("ÀB İSTANBUL", "ab istanbul"),  # 2, 3: lower case, then marks off (i + U+0307 too)
    ("ＡＢＣ１２", "abc12"),  # full-width folds to ASCII
    ("ﬁne ① ㎏", "fine 1 kg"),  # ligature, circled digit, unit sign
    ("e\u0301 \u00e9 \u1ec7", "e e e"),  # combining accents, composed or not
    ("한", "\u1112\u1161\u11ab"),  # Hangul becomes jamo
    ("がぱ", "かは"),  # dakuten and handakuten go
    ("नी", "न\u0940"),  # a spacing mark (Mc) stays, only Mn goes
    ("中文，字。", "中文,字。"),  # full-width comma folds; the full stop has no folding
    ("🙂", "🙂"),
    ("", ""),
  ],
)
def test_steps_1_to_3(text, folded):
  assert ultraclean.fold(text) == folded


@pytest.mark.smoke
@pytest.mark.parametrize(
  "pieces, text, line",
  [
    ((" the", " cat"), "a the cat", "a the cat"),  # 4: pieces joined; 6: spaces collapse
    (("the", "ir"), "Their", "the ir"),  # pieces are apart although the text is one word
    (("\n\n",), "a\n\nb", r"a \n\n b"),  # 5: a piece of two line feeds is one word
    ((), "a\n\n\n\nb", r"a \n \n b"),  # 1, then two single pieces
    ((), "a\tb\rc", r"a \t b \r c"),
    ((".\n",), "a.\nb", r"a .\n b"),  # inside a piece
    (("  ", "b  c"), "a  b  c", "a b c"),  # spaces inside a piece
    ((), "   ", ""),
    ((), "", ""),
    (("é",), "É", "e"),
    ((), "🙂", "\ufffd \ufffd \ufffd \ufffd"),  # four one-byte pieces, each no UTF-8
    (("🙂",), "x🙂", "x 🙂"),
    (("中", "文"), "中文", "中 文"),
    ((r"\n",), r"a\nb", r"a \n b"),  # a literal backslash n is that already
  ],
)
def test_lines_of_the_released_form(pieces, text, line):
  assert ultraclean.normalise(text, decode(*pieces)) == line


@pytest.mark.smoke
def test_bytes_mode_tells_rare_characters_apart():
  made = Pieces(" the", "\n\n")
  lines = {
    mode: [
      ultraclean.normalise(text, ultraclean.TokenizerSegmenter(made, mode)) for text in ("龘", "龗")
    ]
    for mode in ("decode", "bytes")
  }
  assert lines["decode"][0] == lines["decode"][1] == "\ufffd \ufffd \ufffd"
  assert lines["bytes"][0] != lines["bytes"][1]
  # bytes E9 BE 98 in the byte-level alphabet: 0xE9 and 0xBE stand for themselves; of the others
  # 33 lie below "!", then they go on at 0x7F, so 0x98 is U+0100 + 33 + (0x98 - 0x7F) = U+013A
  assert lines["bytes"][0] == "\u00e9 \u00be \u013a"
  line = ultraclean.normalise("a the\n\nb", ultraclean.TokenizerSegmenter(made, "bytes"))
  assert line == "a Ġthe ĊĊ b"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@pytest.mark.parametrize(
  "segmenter",
  [
    decode("\n\n", " a"),
    ultraclean.TokenizerSegmenter(Pieces("\n\n"), "bytes"),
    ultraclean.WhitespaceSegmenter(),
    ultraclean.CharacterSegmenter(),
  ],
  ids=["decode", "bytes", "whitespace", "character"],
)
def test_the_result_is_one_stripped_line(segmenter, text):
  line = ultraclean.normalise(text, segmenter)
  assert not set("\n\r\t") & set(line)
  assert line == line.strip(" ") and "  " not in line


@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_decode_line_is_the_six_steps_one_after_the_other(text):
  """The steps as the specification lists them, without our shortcuts by piece."""
  segmenter = decode("\n\n", " a", "e\t")
  while "\n\n\n" in text:
    text = text.replace("\n\n\n", "\n\n")
  x = unicodedata.normalize("NFKD", text.lower())
  x = "".join(c for c in x if unicodedata.category(c) != "Mn")
  x = " ".join(segmenter.tokenizer.decode([i]) for i in segmenter.tokenizer.encode(x))
  for char, name in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
    x = x.replace(char, name)
  while "  " in x:
    x = x.replace("  ", " ")
  assert ultraclean.normalise(text, segmenter) == x.strip(" ")


def test_not_idempotent():
  segmenter = decode("the", "ir")
  line = ultraclean.normalise("Their\n", segmenter)
  assert line == r"the ir \n" and ultraclean.normalise(line, segmenter) != line


def test_segmenters_without_a_tokenizer():
  text = "One  two\n\n\nthree\t4\u00a0五"
  words = ultraclean.normalise(text, ultraclean.WhitespaceSegmenter())
  assert words == r"one two \n\n three \t 4 五"
  assert ultraclean.normalise("字一\n\n 2b", ultraclean.CharacterSegmenter()) == r"字 一 \n\n 2 b"


def test_long_documents_keep_their_head():
  segmenter = ultraclean.WhitespaceSegmenter()
  assert ultraclean.normalise("abc " * 100, segmenter, max_chars=7) == "abc abc"


def test_identity_is_the_tokenizer_not_the_object():
  one, two, other = decode("a b"), decode("a b"), decode("a c")
  assert one.identity == two.identity != other.identity
  assert repr(one) == repr(two) and "object at" not in repr(one)


def test_a_real_tokenizer(shared_dir):
  folder = shared_dir / "models" / "minicpm4-0.5b-tokenizer"
  pytest.importorskip("sentencepiece")
  tok = tokenizer.load_tokenizer(folder)
  if tok is None:
    pytest.skip(f"no tokenizer in {folder}")
  text = "Naïve Café\n\n\nＡ 中文测试 龘"
  line = ultraclean.normalise(text, ultraclean.TokenizerSegmenter(tok, "decode"))
  assert line.replace(" ", "").startswith("naivecafe") and "\\n" in line
  assert "中" in line.replace(" ", "") and "A" not in line
