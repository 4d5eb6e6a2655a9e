"""Tokenizers against reference ids, the libraries themselves and exact bytes."""

import json
import pickle
import shutil

import hypothesis
import pytest
from hypothesis import strategies as st

from minicpm_jax.text import bytes_map, tokenizer

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
  "hi",
  "  two  spaces\t\ttabs\n\n\nnewlines \n",
  "Digits 12345, 3.14, ½ and ١٢٣",
  "naïve café Ünïcödé",
  "你好，世界。MiniCPM 是一个小模型",
  "emoji 😀👩‍👩‍👧 flags 🇫🇷",
  "def f(x):\n    return {'a': x[0]}  # code\r\n",
  '{"name": "Ann", "age": 31}',
  "a\x00b\x7f \u2028 \ufeff",
  "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
  "",
]


@pytest.fixture(scope="module")
def minicpm4(shared_dir):
  return tokenizer.load_tokenizer(shared_dir / "models/minicpm4-0.5b-tokenizer")


@pytest.fixture(scope="module")
def smollm(shared_dir):
  return tokenizer.load_tokenizer(shared_dir / "models/smollm2-135m-instruct")


@pytest.fixture(scope="module")
def trained():
  return tokenizer.train_bpe(["the cat sat on the mat, 2024 times. Über 你好\n"] * 20, 400)


@pytest.fixture
def copied(shared_dir, tmp_path):
  """A writable copy of the MiniCPM4 tokenizer folder."""
  folder = tmp_path / "tok"
  shutil.copytree(shared_dir / "models/minicpm4-0.5b-tokenizer", folder)
  return folder


@pytest.mark.smoke
@pytest.mark.parametrize(
  "text, ids",
  [
    ("hi", [6920]),
    ("\n", [5]),
    ("Hello, world! 12", [15934, 59342, 2809, 73, 59320, 59345, 59349]),
    (
      "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
      [73441, 1836, 5, 6920, 73440, 5, 73441, 43686, 5],
    ),
  ],
)
def test_minicpm4_reference_ids(minicpm4, text, ids):
  """The ids of shared/models/minicpm4-0.5b-tokenizer/README.md."""
  assert minicpm4.encode(text) == ids
  assert minicpm4.encode(text, add_bos=True) == [1, *ids]
  assert minicpm4.decode(ids, skip_special=False) == text


def test_minicpm4_traits(minicpm4):
  assert isinstance(minicpm4, tokenizer.Tokenizer)
  assert minicpm4.vocab_size == 73448
  assert (minicpm4.bos_id, minicpm4.eos_id, minicpm4.pad_id) == (1, 73440, 2)
  assert minicpm4.stop_ids == (2, 73440)
  assert minicpm4.add_bos
  assert minicpm4.special_tokens["<|execute_start|>"] == 73443
  assert minicpm4.special_tokens["</s>"] == 2
  assert minicpm4.decode([73441, 1836, 5, 6920, 73440]) == "user\nhi"


@pytest.mark.parametrize("text", [t for t in TEXTS if "<|" not in t])
def test_minicpm4_is_plain_sentencepiece_between_added_tokens(minicpm4, shared_dir, text):
  path = shared_dir / "models/minicpm4-0.5b-tokenizer/tokenizer.model"
  plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
  assert minicpm4.encode(text) == plain.encode(text)
  both = f"{text}<|im_end|>{text}"
  assert minicpm4.encode(both) == [*plain.encode(text), 73440, *plain.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_is_plain_tokenizers(smollm, shared_dir, text):
  path = shared_dir / "models/smollm2-135m-instruct/tokenizer.json"
  plain = tokenizers.Tokenizer.from_file(str(path))
  ids = plain.encode(text).ids
  assert smollm.encode(text) == ids
  assert smollm.encode_batch([text, "x"])[0] == ids
  for skip in (True, False):
    assert smollm.decode(ids, skip_special=skip) == plain.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["minicpm4", "smollm", "trained"])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_exact_and_streamable(request, name, text):
  tok = request.getfixturevalue(name)
  ids = tok.encode(text)
  assert tok.decode_bytes(ids, skip_special=False) == text.encode()
  assert b"".join(tok.decode_bytes([i], skip_special=False) for i in ids) == text.encode()


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(text=st.text(st.characters(exclude_characters="\u2581", codec="utf-8")))
@pytest.mark.parametrize("name", ["minicpm4", "smollm", "trained"])
def test_any_text_comes_back(request, name, text):
  tok = request.getfixturevalue(name)
  if name == "smollm":  # its vocabulary has no piece for some bytes (0xF1, 0x04, ...)
    chars = {b: c for c, b in bytes_map.byte_alphabet().items()}
    hypothesis.assume(all(tok.backend.token_to_id(chars[b]) is not None for b in text.encode()))
  assert tok.decode(tok.encode(text), skip_special=False) == text


def test_byte_alphabet_is_that_of_the_library():
  assert set(bytes_map.byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  for byte in range(128):
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(char, _)] = pieces.pre_tokenize_str(chr(byte))
    assert bytes_map.byte_level_bytes(char) == bytes([byte])


@pytest.mark.parametrize("name", ["minicpm4", "smollm", "trained"])
def test_unknown_ids_decode_to_nothing(request, name):
  tok = request.getfixturevalue(name)
  assert tok.decode_bytes([tok.vocab_size, tok.vocab_size + 100]) == b""


@pytest.mark.parametrize("name", ["minicpm4", "smollm", "trained"])
def test_save_then_load(request, name, tmp_path):
  tok = request.getfixturevalue(name)
  tok.save(tmp_path)
  again = tokenizer.load_tokenizer(tmp_path)
  assert again.traits == tok.traits
  assert again.special_tokens == tok.special_tokens
  assert again.vocab_size == tok.vocab_size
  for text in TEXTS:
    assert again.encode(text) == tok.encode(text)
  assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["minicpm4", "smollm", "trained"])
def test_pickle(request, name):
  """Shard workers get the tokenizer through pickle."""
  tok = request.getfixturevalue(name)
  again = pickle.loads(pickle.dumps(tok))
  assert again.encode(TEXTS[4]) == tok.encode(TEXTS[4])
  assert again.decode(tok.encode(TEXTS[4])) == TEXTS[4]


def test_saved_sentencepiece_file_is_the_released_one(minicpm4, shared_dir, tmp_path):
  minicpm4.save(tmp_path)
  released = shared_dir / "models/minicpm4-0.5b-tokenizer"
  for name in ("tokenizer.model", "added_tokens.json"):
    ours, theirs = (tmp_path / name).read_bytes(), (released / name).read_bytes()
    assert ours == theirs if name.endswith("model") else json.loads(ours) == json.loads(theirs)


# ------------------------------------------------------------------------------ training


def test_trained_bpe(trained):
  assert [trained.special_tokens[t] for t in tokenizer.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
  assert (trained.bos_id, trained.eos_id, trained.stop_ids) == (1, 2, (2, 4))
  assert trained.add_bos
  digits = [trained.decode([i]) for i in trained.encode("2024")]
  assert digits == ["2", "0", "2", "4"]
  assert len(trained.encode(" the")) == 1
  assert trained.encode("<|im_start|>cat<|im_end|>")[0] == 3


def test_training_is_reproducible():
  texts = ["one two three", "two three four", "three four five"] * 3
  first, second = (tokenizer.train_bpe(iter(texts), 300) for _ in range(2))
  assert first.backend.to_str() == second.backend.to_str()


@pytest.mark.parametrize(
  "texts, size, match",
  [(["abc"], 200, "vocab_size: found 200, expected at least 261"), ([], 300, "corpus is empty")],
)
def test_training_refuses(texts, size, match):
  with pytest.raises(ValueError, match=match):
    tokenizer.train_bpe(texts, size)


@pytest.mark.oracle
def test_trained_tokenizer_in_transformers(trained, tmp_path):
  transformers = pytest.importorskip("transformers")
  trained.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert theirs(text)["input_ids"] == trained.encode(text, add_bos=True)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (trained.bos_id, trained.eos_id)
  messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
  text = theirs.apply_chat_template(messages, tokenize=False)
  assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"


# ---------------------------------------------------------------------- other json files


def test_byte_fallback_json(tmp_path):
  """A Llama-style tokenizer.json: U+2581 for spaces, <0xAB> bytes, a dummy prefix."""
  vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
  for piece in ("▁", "a", "b", "▁a"):
    vocab[piece] = len(vocab)
  model = tokenizers.models.BPE(
    vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
  )
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
  decoders = tokenizers.decoders
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
  )
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer.prepend_bos(backend, "<s>")
  backend.save(str(tmp_path / "tokenizer.json"))
  config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tok = tokenizer.load_tokenizer(tmp_path)
  assert (tok.bos_id, tok.eos_id, tok.add_bos) == (1, 2, True)
  assert tok.encode("a b") == [vocab["▁a"], vocab["▁"], vocab["b"]]
  assert tok.decode(tok.encode("a bé")) == "a bé"
  assert tok.decode_bytes(tok.encode("é")[-2:]) == "é".encode()


def test_stored_truncation_and_padding_are_off(trained, tmp_path):
  backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
  backend.enable_truncation(4)
  backend.enable_padding(length=64)
  backend.save(str(tmp_path / "tokenizer.json"))
  text = "the cat sat on the mat " * 5
  assert tokenizer.load_tokenizer(tmp_path).encode(text) == trained.encode(text)


def test_named_templates_and_template_file(copied):
  config = json.loads((copied / "tokenizer_config.json").read_text())
  config["chat_template"] = [
    {"name": "tool_use", "template": "T"},
    {"name": "default", "template": "D"},
  ]
  (copied / "tokenizer_config.json").write_text(json.dumps(config))
  assert tokenizer.load_tokenizer(copied).chat_template == "D"
  (copied / "chat_template.jinja").write_text("J")
  assert tokenizer.load_tokenizer(copied).chat_template == "J"


def test_bare_sentencepiece_model(copied):
  for path in copied.iterdir():
    if path.name != "tokenizer.model":
      path.unlink()
  tok = tokenizer.load_tokenizer(copied)
  assert (tok.bos_id, tok.eos_id, tok.stop_ids, tok.vocab_size) == (1, 2, (2,), 73440)
  assert tok.encode("<s>hi</s>") == [1, 6920, 2]


# ---------------------------------------------------------------------------- bad input


def test_a_folder_without_tokenizer_gives_none(tmp_path):
  assert tokenizer.load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
  "name, data, match",
  [
    ("tokenizer.json", b'{"version": "1.0", "model"', "tokenizer.json: damaged"),
    ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ("tokenizer.model", b"", "tokenizer.model: found an empty file"),
    ("tokenizer.model", b"\x0agarbage" * 50, "tokenizer.model: damaged"),
    ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
    ("tokenizer_config.json", b"[]", "found a list, expected a JSON object"),
    ("tokenizer_config.json", b'{"eos_token": "<nope>"}', "eos_token '<nope>' is not in the voc"),
    ("added_tokens.json", b'{"<|im_end|>": 5}', "'<|im_end|>' has id 5"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token 5 is not in the vocabulary"),
    ("tokenizer_config.json", b'{"add_bos_token": "no"}', "add_bos_token: found 'no'"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": 1}]}', "chat_template: found"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder: found"),
    (
      "tokenizer_config.json",
      b'{"added_tokens_decoder": {"x": {}}}',
      "added_tokens_decoder: found",
    ),
    ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: not valid JSON"),
    ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id: found '2', expected"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja: found no UTF-8"),
    ("added_tokens.json", b'{"<new>": "5"}', "id of '<new>': found '5', expected an integer"),
  ],
)
def test_damaged_files_are_named(copied, name, data, match):
  (copied / name).write_bytes(data)
  with pytest.raises(tokenizer.TokenizerError, match=match.replace("|", r"\|")):
    tokenizer.load_tokenizer(copied)


def test_an_id_that_no_vocabulary_has(trained, tmp_path):
  trained.save(tmp_path)
  path = tmp_path / "tokenizer.json"
  spec = json.loads(path.read_text())
  spec["model"]["vocab"]["cat"] = 10**9  # the library would walk through all ids below
  path.write_text(json.dumps(spec))
  with pytest.raises(
    tokenizer.TokenizerError, match="tokenizer.json: vocabulary: found token id 1"
  ):
    tokenizer.load_tokenizer(tmp_path)


def test_truncated_model_file(copied):
  path = copied / "tokenizer.model"
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(tokenizer.TokenizerError, match="tokenizer.model"):
    tokenizer.load_tokenizer(copied)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_unsupported_added_token_flags(copied, flag):
  config = json.loads((copied / "tokenizer_config.json").read_text())
  config["added_tokens_decoder"]["73440"][flag] = True
  (copied / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(tokenizer.TokenizerError, match=f"{flag}=true"):
    tokenizer.load_tokenizer(copied)


def test_added_token_on_top_of_a_piece(copied):
  for name in ("tokenizer_config.json", "added_tokens.json"):
    (copied / name).unlink()
  (copied / "added_tokens.json").write_text('{"<|x|>": 6920}')
  with pytest.raises(tokenizer.TokenizerError, match="id 6920, which is the piece 'hi'"):
    tokenizer.load_tokenizer(copied)


def test_bos_where_there_is_none(smollm):
  with pytest.raises(ValueError, match="no BOS"):
    smollm.encode("x", add_bos=True)


SPELLED = "a <s> in HTML, <|im_start|>user <|im_end|></s> <|endoftext|> and <unk>"


@pytest.mark.parametrize("name", ["smollm", "trained"])
def test_plain_text_has_no_special_tokens(request, name):
  """Reference: the same file without its special tokens."""
  tok = request.getfixturevalue(name)
  spec = json.loads(tok.backend.to_str())
  spec["added_tokens"], spec["post_processor"] = [], None
  bare = tokenizers.Tokenizer.from_str(json.dumps(spec))
  special = set(tok.special_tokens.values())
  assert special & set(tok.encode(SPELLED))
  plain = tok.encode(SPELLED, parse_special=False)
  assert plain == bare.encode(SPELLED).ids
  assert not special & set(plain)
  assert tok.decode_bytes(plain) == SPELLED.encode()
  assert tok.encode_batch([SPELLED, "x"], parse_special=False)[0] == plain
  assert tokenizer.encode_plain(tok, [SPELLED, "x"])[0] == plain
  assert special & set(pickle.loads(pickle.dumps(tok)).encode(SPELLED))  # the other mode stays


def test_plain_text_of_sentencepiece(minicpm4, shared_dir):
  path = shared_dir / "models/minicpm4-0.5b-tokenizer/tokenizer.model"
  reference = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(SPELLED)
  assert 73441 in minicpm4.encode(SPELLED)
  assert tokenizer.encode_plain(minicpm4, [SPELLED]) == [reference]
  assert not set(minicpm4.special_tokens.values()) & set(reference)


def test_added_tokens_that_are_not_special_stay_tokens_in_plain_text(copied, shared_dir):
  path = copied / "tokenizer_config.json"
  config = json.loads(path.read_text())
  flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
  config["added_tokens_decoder"] = {
    str(i): {"content": text, "special": text != "<|tool_call|>"} | flags
    for text, i in json.loads((copied / "added_tokens.json").read_text()).items()
  }
  path.write_text(json.dumps(config))
  tok = tokenizer.load_tokenizer(copied)
  ids = tok.encode("<|tool_call|><|im_end|>", parse_special=False)
  assert ids[0] == 73442 and 73440 not in ids


@pytest.mark.parametrize("bad, message", [("a\ud800b", r"U\+D800 at character 1"), (3, "found 3")])
def test_what_is_no_text_is_named(bad, message):
  tok = tokenizer.train_bpe(["hello world"] * 3, 280)
  encode = type(tok).encode
  encode = getattr(encode, "__wrapped__", encode)  # without beartype
  with pytest.raises(tokenizer.TokenizerError, match=message):
    encode(tok, bad)


def test_ids_that_no_table_has_decode_to_nothing():
  tok = tokenizer.train_bpe(["hello world"] * 3, 280)
  assert tok.decode([-1, *tok.encode("hello"), 2**31, 2**40]) == "hello"
