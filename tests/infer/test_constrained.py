"""Grammars against readers that know nothing of them: jsonschema, re, sqlite3, ast."""

import ast
import json
import re
import sqlite3

import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.infer import constrained, grammars
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.text import tokenizer
from tests.infer import constrained_cases

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "weather",
      "parameters": {
        "type": "object",
        "properties": {
          "city": {"type": "string"},
          "days": {"type": "integer", "minimum": 1, "maximum": 14},
          "unit": {"enum": ["c", "f", None, 3, True]},
          "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
          "land": {"type": "string", "pattern": "^[a-zé]{2}$"},
          "mode": {"const": None},
          "limit": {"type": ["number", "null"]},
        },
        "required": ["city", "unit"],
      },
    },
  },
  {"name": "now"},
]
TABLES = {"users": ["id", "name"], "orders": ["id", "total"]}


@pytest.fixture
def compiler(byte_tokenizer):
  return constrained.GrammarCompiler(byte_tokenizer(), 300)


# --- Masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [32, 45, 96])
def test_apply_bitmask_is_minus_infinity_where_the_bit_is_zero(vocab_size):
  rng = np.random.default_rng(0)
  z_nV = rng.normal(size=(3, vocab_size)).astype(np.float32)
  words = -(-vocab_size // 32)
  mask_nW = rng.integers(-(2**31), 2**31, size=(3, words)).astype(np.int32)
  got_nV = np.asarray(constrained.apply_bitmask(jnp.asarray(z_nV), jnp.asarray(mask_nW)))
  for n in range(3):
    for v in range(vocab_size):
      bit = (int(mask_nW[n, v // 32]) & 0xFFFFFFFF) >> (v % 32) & 1
      assert got_nV[n, v] == (z_nV[n, v] if bit else -np.inf)
    expected = np.isfinite(got_nV[n])
    np.testing.assert_array_equal(constrained.unpack_mask(mask_nW[n], vocab_size), expected)
  with pytest.raises(ValueError, match="mask_nW: found shape"):
    constrained.apply_bitmask(jnp.asarray(z_nV), jnp.zeros((3, words + 1), jnp.int32))


def test_a_mask_holds_what_the_expression_allows_and_the_end_only_where_it_accepts(compiler):
  constraint = compiler.regex("ab+|é")
  first = "é".encode()[0]

  def allowed():
    return set(np.flatnonzero(constraint.allowed()))

  assert allowed() == {ord("a"), first} and not constraint.is_accepting()
  assert not constraint.consume(257) and not constraint.consume(ord("b"))  # nothing changed
  assert constraint.consume(ord("a")) and allowed() == {ord("b")}
  assert constraint.consume(ord("b")) and constraint.is_accepting()
  assert allowed() == {ord("b"), 257, 259} and not constraint.is_stopped()
  assert constraint.consume(259) and constraint.is_stopped() and allowed() == {257, 259}
  assert not constraint.consume(ord("b"))
  constraint.rollback(2)
  assert allowed() == {ord("b")} and not constraint.is_accepting()
  constraint.rollback(1)
  assert allowed() == {ord("a"), first}
  with pytest.raises(ValueError, match=r"rollback: found 1, expected 0\.\.0"):
    constraint.rollback(1)


def test_nothing_but_the_end_follows_a_finished_sentence_and_it_can_be_taken_back(compiler):
  constraint = compiler.choice(["yes", "no"])
  for byte in b"yes":
    assert constraint.consume(byte)
  assert constraint.is_stopped() and set(np.flatnonzero(constraint.allowed())) == {257, 259}
  assert constraint.consume(257)
  constraint.rollback(2)
  assert set(np.flatnonzero(constraint.allowed())) == {ord("s")}


def test_a_strided_row_is_filled_and_a_wrong_one_refused(compiler):
  constraint = compiler.regex("x")
  rows = np.full((10, 3), -1, np.int32)
  constraint.fill_mask(rows[:, 1])
  assert set(np.flatnonzero(constrained.unpack_mask(rows[:, 1].copy(), 300))) == {ord("x")}
  assert np.all(rows[:, [0, 2]] == -1)
  with pytest.raises(ValueError, match=r"row: found int64 \(10,\), expected int32 \(10,\)"):
    constraint.fill_mask(np.zeros(10, np.int64))


def test_tokens_of_several_bytes_and_twins_are_all_allowed(byte_tokenizer):
  class Pieces(byte_tokenizer):
    """Two tokens with the same bytes, one with a border inside a character, one id unused."""

    vocab_size = 8
    special_tokens = {"</s>": 7}
    table = [b"a", b"ab", b"ab", b"\xc3", b"\xa9b", b"b\xc3\xa9", b""]

    def __init__(self):
      self.traits = tokenizer.Traits(stop_ids=(7,))

    def piece_bytes(self, token_id):
      return self.table[token_id]

  compiler = constrained.GrammarCompiler(Pieces(), 9)
  constraint = compiler.regex("abéb")
  assert set(np.flatnonzero(constraint.allowed())) == {0, 1, 2}
  assert constraint.consume(2) and set(np.flatnonzero(constraint.allowed())) == {3}
  assert constraint.consume(3) and set(np.flatnonzero(constraint.allowed())) == {4}
  assert constraint.consume(4) and constraint.is_stopped()


def test_forced_tokens_spell_the_only_continuation(compiler):
  constraint = compiler.json_schema(
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    compact=True,
  )
  assert constraint.consume(ord("{"))
  assert bytes(constraint.forced_tokens()) == b'"city":'  # the last one is held back
  choice = compiler.choice(["yes", "ye gods"])
  assert bytes(choice.forced_tokens()) == b"y" and choice.consume(ord("y"))
  assert choice.consume(ord("e")) and choice.consume(ord("s")) and not choice.forced_tokens()
  whole = compiler.choice(["word"])
  assert bytes(whole.forced_tokens()) == b"word" and not whole.is_stopped()


def test_a_copy_goes_its_own_way(compiler):
  constraint = compiler.regex("ab|ac")
  constraint.consume(ord("a"))
  other = constraint.copy()
  assert other.consume(ord("b")) and other.is_stopped()
  assert not constraint.is_stopped() and constraint.consume(ord("c"))
  other.rollback(2)
  assert set(np.flatnonzero(other.allowed())) == {ord("a")}


# --- Trees ------------------------------------------------------------------------------------


def test_a_tree_walk_gives_every_node_its_own_row_and_restores_the_state(compiler):
  rng = np.random.default_rng(3)
  schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
  for _ in range(30):
    constraint = compiler.json_schema(schema, compact=True)
    for byte in b"[1":
      assert constraint.consume(byte)
    n = 14
    parent_n = np.array([0, *(rng.integers(0, i) for i in range(1, n))])
    tok_n = np.array([ord("1"), *rng.choice([*b"07],-", 257, -1], n - 1)], np.int32)
    mask_nW = rng.integers(-9, 9, (n, 10)).astype(np.int32)
    before = constraint.allowed()
    out_n = tree_lib.walk(constraint, tok_n, parent_n, mask_nW)
    np.testing.assert_array_equal(constraint.allowed(), before)
    assert constraint.num_consumed == 2
    for node in range(n):  # a fresh matcher down the path of each node
      path = []
      at = node
      while at:
        path.append(int(tok_n[at]))
        at = int(parent_n[at])
      fresh = compiler.json_schema(schema, compact=True)
      is_legal = all(fresh.consume(t) for t in b"[1")
      for token in reversed(path):
        is_legal = is_legal and token >= 0 and fresh.consume(token)
      assert out_n[node] == (tok_n[node] if is_legal else -1)
      row = constrained.unpack_mask(mask_nW[node], 300)
      is_used = is_legal and not fresh.is_stopped()  # elsewhere nobody samples: all is allowed
      np.testing.assert_array_equal(row, fresh.allowed() if is_used else np.ones(300, bool))


# --- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_random_logits_under_200_random_schemas_always_validate(compiler, byte_tokenizer, part):
  tok = byte_tokenizer()
  rng = np.random.default_rng(part)
  checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
  for number in range(50):
    schema = constrained_cases.random_schema(rng)
    constraint = compiler.json_schema(schema, compact=bool(number % 2))
    text = constrained_cases.random_answer(compiler, constraint, tok, rng)
    assert text is not None, schema
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    validator.validate(json.loads(text))


def test_json_with_and_without_whitespace(compiler):
  value = {"a": [1, {"b": None}], "c": "é\n"}
  forms = ({}, {"indent": 2}, {"separators": (",", ":")})
  texts = [json.dumps(value, ensure_ascii=False, **form) for form in forms]
  for text in texts:
    constraint = compiler.json_object()
    assert all(constraint.consume(b) for b in text.encode()) and constraint.is_accepting()
    compact = compiler.json_object(compact=True)
    assert all(compact.consume(b) for b in text.encode()) == (text == texts[-1])
  assert not compiler.json_object().consume(ord("["))


# --- Other grammars ---------------------------------------------------------------------------


def test_random_answers_match_the_regular_expression_or_are_a_choice(compiler, byte_tokenizer):
  tok, rng = byte_tokenizer(), np.random.default_rng(0)
  for pattern in (r"[a-c]{2,4}(x|yz)*", r"\d{1,3}(\.\d+)?", r"(né|語)+!"):
    for _ in range(10):
      text = constrained_cases.random_answer(compiler, compiler.regex(pattern), tok, rng)
      assert text is not None and re.fullmatch(pattern, text)
  options = ["yes", "no", 'quo"te', "a\\b", "né\x7f"]
  seen = {
    constrained_cases.random_answer(compiler, compiler.choice(options), tok, rng) for _ in range(60)
  }
  assert seen == set(options)


def test_every_random_select_statement_is_one_for_sqlite(compiler, byte_tokenizer):
  tok, rng = byte_tokenizer(), np.random.default_rng(1)
  database = sqlite3.connect(":memory:")
  for table, columns in TABLES.items():
    database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
  num_run = 0
  for _ in range(60):
    text = constrained_cases.random_answer(compiler, compiler.sql_select(TABLES), tok, rng)
    assert text is not None and text.startswith("SELECT")
    try:
      database.execute(text).fetchall()
      num_run += 1
    except sqlite3.OperationalError as error:  # names and aggregates may not fit; syntax must
      assert "syntax error" not in str(error), (text, error)
      assert re.search(
        "no such column|ambiguous|misuse of|wrong number|out of range|DISTINCT", str(error)
      ), text
  assert num_run > 5
  handwritten = (
    "SELECT DISTINCT name AS n, COUNT(*) FROM users INNER JOIN orders ON users.id = orders.id "
    "WHERE total >= 3.5 AND (name LIKE 'a''b%' OR name IS NOT NULL) GROUP BY name "
    "HAVING SUM(total) > 2 ORDER BY n DESC LIMIT 10 OFFSET 2"
  )
  assert _accepts(compiler.sql_select(), handwritten)
  for bad in ("DROP TABLE users", "SELECT name FROM users; SELECT 1", "SELECT name FROM secrets"):
    assert not _accepts(compiler.sql_select(TABLES), bad)
  assert not _accepts(compiler.sql_select(), "SELECT where FROM users")
  assert _accepts(compiler.sql_select(), "SELECT wherever FROM users")


def _accepts(constraint, text):
  return all(constraint.consume(b) for b in text.encode()) and constraint.is_accepting()


def test_every_random_tool_call_is_python_that_fits_the_schema(compiler, byte_tokenizer):
  tok, rng = byte_tokenizer(), np.random.default_rng(2)
  names = set()
  for _ in range(40):
    constraint = compiler.python_calls(TOOLS, before="<calls>\n", after="\n</calls>")
    text = constrained_cases.random_answer(compiler, constraint, tok, rng)
    assert text.startswith("<calls>\n") and text.endswith("\n</calls>")
    body = ast.parse(text.removeprefix("<calls>\n").removesuffix("\n</calls>")).body
    assert 1 <= len(body) <= 8
    for statement in body:
      call = statement.value
      names.add(call.func.id)
      values = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
      assert not call.args and len(values) == len(call.keywords)
      if call.func.id == "weather":
        jsonschema.validate(values, TOOLS[0]["function"]["parameters"])
      else:
        assert call.func.id == "now" and not values
  assert names == {"weather", "now"}
  one = {"name": "f", "parameters": TOOLS[0]["function"]["parameters"] | {"required": ["days"]}}
  for days, fits in (("14", True), ("15", False), ("0", False)):
    call = f'<function name="f"><param name="days">{days}</param></function>'
    assert _accepts(compiler.lark(grammars.xml_calls([one])), call) == fits
  fields = {"const": "é"}, {"const": 2}, {"type": "array", "const": [1]}, {"const": ""}
  for field, text in zip(fields, ("é", "2", "[1]", ""), strict=True):
    one = {"name": "f", "parameters": {"properties": {"a": field}, "required": ["a"]}}
    for value, fits in ((text, True), (text + "x", False)):
      call = f'<function name="f"><param name="a">{value}</param></function>'
      assert _accepts(compiler.lark(grammars.xml_calls([one])), call) == fits, field


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda c: c.json_schema({"type": "foo"}), "json_schema: Invalid type: foo"),
    (lambda c: c.json_schema({"not": {}}), "json_schema: Unimplemented keys"),
    (lambda c: c.json_schema({"type": "string", "format": "bogus"}), "Unknown format: bogus"),
    (lambda c: c.json_schema({"const": float("nan")}), "json_schema: "),
    (lambda c: c.json_schema({"$ref": "http://x/y"}), "json_schema: Resource"),
    (lambda c: c.regex("(("), "regex: .*unclosed group"),
    (lambda c: c.lark("start: nonsense"), 'grammar: .*unknown name: "nonsense"'),
    (lambda c: c.choice([]), "choice: found"),
    (lambda c: c.choice(["a", ""]), "choice: found"),
    (lambda c: c.choice("ab"), "choice: found"),
    (lambda c: c.regex("a\\"), "regex: found .*behind the last"),
    (lambda c: c.lark("start: /\ud800/"), "grammar: found half a surrogate pair"),
    (lambda c: c.lark("start: start"), "grammar: no answer satisfies it"),
    (lambda c: c.regex(r"[^\s\S]"), "regex: "),
  ],
)
def test_bad_grammars_are_refused_with_the_reason(compiler, make, message):
  with pytest.raises(constrained.GrammarError, match=f"(?s){message}"):
    make(compiler)


def test_lists_of_lists_in_python_calls_grow_with_their_depth_alone(compiler):
  """A request may nest 100 levels: text that doubled at each would end the process."""
  field, sizes = {"type": ["integer", "null"]}, {}
  for depth in range(1, 61):
    field = {"type": ["array", "array"], "items": field, "maxItems": 2}
    if depth in (20, 40, 60):
      tools = [{"name": "f", "parameters": {"properties": {"a": field, "b": field}}}]
      sizes[depth] = len(grammars.python_calls(tools))
  assert sizes[60] - sizes[40] <= 1.1 * (sizes[40] - sizes[20])
  for items, is_good in (("1, None", True), ("1, 2, 3", False), ("[]", False)):
    text = f"f(b={'[' * 60}{items}{']' * 60})"
    assert _accepts(compiler.python_calls(tools), text) is is_good


def test_a_long_chain_of_rules_is_compiled_or_refused(compiler):
  """It is a text that a client sends: llguidance's recursion must not end the process."""
  rules = [f"a{i}: a{i + 1}" for i in range(9000)]
  assert _accepts(compiler.lark("\n".join(["start: a0", *rules, 'a9000: "x"'])), "x")
  chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(9000)}
  schema = {"$defs": chain | {"d9000": {"type": "boolean"}}, "$ref": "#/$defs/d0"}
  with pytest.raises(constrained.GrammarError, match="json_schema: found .* at most 262144"):
    compiler.json_schema(schema)


def test_bad_presets_and_tokenizers_are_refused(byte_tokenizer):
  with pytest.raises(ValueError, match="found the name 'a b', expected a Python identifier"):
    grammars.python_calls([{"name": "a b"}])
  with pytest.raises(ValueError, match="found the name 'class'"):
    grammars.python_calls([{"name": "f", "parameters": {"properties": {"class": {}}}}])
  with pytest.raises(ValueError, match="tools: found none"):
    grammars.python_calls([])
  for make in (grammars.python_calls, grammars.json_calls, grammars.xml_calls):
    with pytest.raises(ValueError, match="tools: found {}, expected an object with a name"):
      make([{}])
    with pytest.raises(ValueError, match="tools: f.a.type: found 3, expected a name or a list"):
      make([{"name": "f", "parameters": {"properties": {"a": {"type": 3}}}}])
  with pytest.raises(ValueError, match="tools: f: found parameters 3"):
    grammars.python_calls([{"name": "f", "parameters": 3}])
  for most in (2, 0):
    with pytest.raises(ValueError, match=f"tools: found 3 minItems, {most} maxItems"):
      field = {"type": "array", "items": {}, "minItems": 3, "maxItems": most}
      grammars.python_calls([{"name": "f", "parameters": {"properties": {"a": field}}}])
  with pytest.raises(ValueError, match="found the name 'a; b'"):
    grammars.sql_select({"a; b": ["x"]})
  with pytest.raises(ValueError, match="tables: found the name 'Select', .*no word of SQL"):
    grammars.sql_select({"a": ["Select"]})
  for tables in ({"a": "xyz"}, {"a": []}):
    with pytest.raises(ValueError, match="tables: found .*expected lists of column names"):
      grammars.sql_select(tables)
  with pytest.raises(ValueError, match=r"stop_ids: found 999, expected tokens of 0\.\.259"):
    constrained.GrammarCompiler(byte_tokenizer(), stop_ids=[999])
  with pytest.raises(ValueError, match="vocab_size: found 100, expected at least"):
    constrained.GrammarCompiler(byte_tokenizer(), 100)
  with pytest.raises(ValueError, match="stop_ids: found none"):
    constrained.GrammarCompiler(byte_tokenizer(), stop_ids=())


def test_a_matcher_over_its_limits_ends_the_answer_and_says_so(compiler):
  constraint = compiler.regex("a+")
  constraint.matcher.consume_token(ord("b"))  # what a limit does: an error that stays
  assert "doesn't satisfy" in constraint.error
  assert set(np.flatnonzero(constraint.allowed())) == {257, 259}
  assert constraint.is_stopped() and not constraint.consume(257)


# --- Bytes of tokens --------------------------------------------------------------------------


def _random_texts(num, seed=0):
  rng = np.random.default_rng(seed)
  ranges = [(32, 127), (0xA0, 0x250), (0x4E00, 0x9FA5), (0x1F300, 0x1F650), (9, 14), (0x900, 0x980)]
  for _ in range(num):
    low, high = ranges[rng.integers(len(ranges))]
    mixed = rng.random() < 0.3
    size = rng.integers(1, 24)
    yield "".join(
      chr(rng.integers(*ranges[rng.integers(len(ranges))]) if mixed else rng.integers(low, high))
      for _ in range(size)
    )


def _check_bytes(tok, num):
  table = constrained.token_bytes(tok, tok.vocab_size + 3)
  assert table[-3:] == [b""] * 3
  for name, i in tok.special_tokens.items():
    assert table[i] == name.encode()
  for text in _random_texts(num):
    assert b"".join(table[i] for i in tok.encode(text)) == text.encode()


def test_bytes_of_a_byte_level_vocabulary_spell_10000_random_strings():
  pytest.importorskip("tokenizers")
  corpus = [*_random_texts(400, seed=9), "def add(a, b):\n  return a + b\n" * 40]
  _check_bytes(tokenizer.train_bpe(corpus, 700), 10_000)


def test_bytes_of_the_released_sentencepiece_vocabulary_spell_10000_random_strings(shared_dir):
  pytest.importorskip("sentencepiece")
  tok = tokenizer.load_tokenizer(shared_dir / "models" / "minicpm4-0.5b-tokenizer")
  _check_bytes(tok, 10_000)
  compiler = constrained.GrammarCompiler(tok, 73448)
  constraint = compiler.json_object()
  assert all(constraint.consume(i) for i in tok.encode('{"naïve": ["語", 1.5]}'))
  assert constraint.is_accepting()
