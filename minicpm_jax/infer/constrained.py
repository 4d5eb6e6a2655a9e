"""Constrained decoding: llguidance matchers over our tokenizers (inference.md section 16).

`GrammarCompiler(tok, vocab_size)` turns a JSON schema, a regular expression, a list of choices or a
Lark grammar into a `Constraint`, which the engine asks for one row of allowed tokens at a time
(`fill_mask`) and tells every sampled token (`consume`). `apply_bitmask` is the device side. With a
draft tree it walks depth first (`tree.walk`) and is back where it was afterwards.
The law is the target's distribution restricted to the allowed tokens, before temperature and
filters: every cut of an allowed text into tokens is allowed. (llguidance by itself allows only the
canonical cut where the bytes are forced; its `no_forcing` switches that off.) Needs the extra
`constrained`.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minicpm_jax.core.extras import require_extra
from minicpm_jax.infer import grammars
from minicpm_jax.text import tokenizer

MAX_GRAMMAR = 2**18  # characters: 30,000 rules at most
STACK_BYTES = 2**29  # of the thread that compiles; only what is used of it is ever there
_STACK = threading.Lock()  # around the size of new threads' stacks, which is the process's
_EVERY_CUT = '\n%llguidance {"no_forcing": true}\n'


class GrammarError(ValueError):
  """A schema, expression or grammar that cannot be compiled, or that ran out of its limits."""


def apply_bitmask(z_nV: Float[Array, "n V"], mask_nW: Int[Array, "n W"]) -> Float[Array, "n V"]:
  """Logits with -inf where bit v % 32 of word v // 32 is 0; W = ceil(V / 32), int32 words."""
  n, V = z_nV.shape
  if mask_nW.shape != (n, mask_width(V)):
    raise ValueError(f"mask_nW: found shape {mask_nW.shape}, expected {(n, mask_width(V))}")
  bits_nW32 = (mask_nW[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1
  allowed_nV = bits_nW32.reshape(n, -1)[:, :V] != 0
  return jnp.where(allowed_nV, z_nV, -jnp.inf)


def mask_width(vocab_size: int) -> int:
  """Words of one mask row."""
  return -(-vocab_size // 32)


def unpack_mask(mask_W: np.ndarray, vocab_size: int) -> np.ndarray:
  """bool [vocab_size] of one mask row (host side)."""
  row = np.ascontiguousarray(mask_W, dtype="<i4")
  return np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)


def token_bytes(tok: tokenizer.Tokenizer, vocab_size: int) -> list[bytes]:
  """Bytes of every id; b"" (never allowed) for ids without a token. Special tokens: their text."""
  special = {i: name for name, i in tok.special_tokens.items()}
  table = [
    special[i].encode() if i in special else tok.decode_bytes([i], skip_special=False)
    for i in range(tok.vocab_size)
  ]
  return table + [b""] * (vocab_size - tok.vocab_size)


class Constraint:
  """One answer's grammar state; the TokenConstraint protocol of the engine.

  Every token that `consume` took can be taken back with `rollback`, the end token included.
  """

  def __init__(
    self, matcher: Any, tok: tokenizer.Tokenizer, vocab_size: int, stop_ids: Sequence[int]
  ):
    self.matcher = matcher
    self.tok = tok
    self.vocab_size = vocab_size
    self.stop_ids = tuple(stop_ids)
    self.num_consumed = 0
    self._num_ends = 0  # stop ids among them; the matcher itself never sees one

  @property
  def error(self) -> str:
    """Why the matcher gave up (grammar over its limits); "" while all is well."""
    return self.matcher.get_error().split("\n<state>")[0] if self.matcher.is_error() else ""

  def fill_mask(self, row: np.ndarray) -> None:
    """Writes the allowed next tokens into int32 `row` [ceil(V / 32)].

    Stop ids are allowed where the grammar accepts. A matcher that ran into its limits allows the
    stop ids alone, so that the answer ends; `error` tells.
    """
    if row.shape != (mask_width(self.vocab_size),) or row.dtype != np.int32:
      raise ValueError(
        f"row: found {row.dtype} {row.shape}, expected int32 ({mask_width(self.vocab_size)},)"
      )
    if not (self._num_ends or self.matcher.is_error()):
      if row.flags.c_contiguous:
        self._fill(row)
      else:
        copy = np.empty_like(row)
        self._fill(copy)
        row[:] = copy
    if self._num_ends or self.matcher.is_error():
      self._allow_stops(row)

  def _fill(self, row: np.ndarray) -> None:
    lnp = require_extra("llguidance.numpy", extra="constrained")
    lnp.fill_next_token_bitmask(self.matcher, row[None], 0)

  def _allow_stops(self, row: np.ndarray) -> None:
    row[:] = 0
    words = row.view(np.uint32)
    for i in self.stop_ids:
      words[i // 32] |= np.uint32(1 << (i % 32))

  def allowed(self) -> np.ndarray:
    """bool [V], the mask as it is for `fill_mask`."""
    row = np.zeros(mask_width(self.vocab_size), np.int32)
    self.fill_mask(row)
    return unpack_mask(row, self.vocab_size)

  def consume(self, token: int) -> bool:
    """Takes a token; False, and nothing changes, if the grammar does not allow it here."""
    if self._num_ends or self.matcher.is_error():
      return False
    if token in self.stop_ids:
      taken = self.matcher.is_accepting()
      self._num_ends += taken
    else:
      taken = self.matcher.try_consume_tokens([int(token)]) == 1
    self.num_consumed += taken
    return taken

  def rollback(self, n: int) -> None:
    """Takes the last n consumed tokens back."""
    if not 0 <= n <= self.num_consumed:
      raise ValueError(f"rollback: found {n}, expected 0..{self.num_consumed} (tokens consumed)")
    num_ends = min(n, self._num_ends)
    if n > num_ends and not self.matcher.rollback(n - num_ends):
      raise GrammarError(f"rollback: {self.error}")
    self._num_ends -= num_ends
    self.num_consumed -= n

  def is_accepting(self) -> bool:
    """Whether the text so far is a complete sentence of the grammar (the end is allowed)."""
    return self.matcher.is_accepting()

  def is_stopped(self) -> bool:
    """Whether nothing but a stop id can follow."""
    return self._num_ends > 0 or self.matcher.is_stopped()

  def forced_tokens(self) -> list[int]:
    """Tokens that spell the only possible continuation, in the tokenizer's own cut.

    An option of decoders, off by default: other cuts of the same bytes have probability too, so
    appending these changes the law. The last token is left out where it might grow.
    """
    if self._num_ends:
      return []
    text = self.matcher.compute_ff_bytes().decode("utf-8", errors="ignore")
    ids = self.tok.encode(text) if text else []
    ids = ids[: self.matcher.validate_tokens(ids)]
    if ids and self.matcher.try_consume_tokens(ids) == len(ids):
      is_end = self.matcher.is_stopped()
      self.matcher.rollback(len(ids))
      ids = ids if is_end else ids[:-1]
    return ids

  def copy(self) -> "Constraint":
    """An independent state at the same place."""
    other = Constraint(self.matcher.deep_copy(), self.tok, self.vocab_size, self.stop_ids)
    other.num_consumed, other._num_ends = self.num_consumed, self._num_ends
    return other


class GrammarCompiler:
  """Grammars for one tokenizer and model vocabulary; compile once, ask for many constraints.

  `stop_ids` (default: the tokenizer's) are the tokens that may end an answer. Errors in a schema or
  grammar raise GrammarError with the library's message.
  """

  def __init__(
    self,
    tok: tokenizer.Tokenizer,
    vocab_size: int | None = None,
    *,
    stop_ids: Sequence[int] | None = None,
  ):
    llguidance = require_extra("llguidance", extra="constrained")
    self.vocab_size = tok.vocab_size if vocab_size is None else vocab_size
    if self.vocab_size < tok.vocab_size:
      raise ValueError(
        f"vocab_size: found {vocab_size}, expected at least the tokenizer's {tok.vocab_size}"
      )
    self.stop_ids = tuple(tok.stop_ids if stop_ids is None else stop_ids)
    if not self.stop_ids:
      raise ValueError("stop_ids: found none, expected a token that ends an answer")
    for token in self.stop_ids:
      if not 0 <= token < self.vocab_size:
        raise ValueError(f"stop_ids: found {token}, expected tokens of 0..{self.vocab_size - 1}")
    self._tok = tok
    self._llguidance = llguidance
    special = sorted({*tok.special_tokens.values(), *self.stop_ids})
    table = _TokenTable(tok, token_bytes(tok, self.vocab_size), self.stop_ids[0], special)
    self._tokenizer = llguidance.LLTokenizer(
      llguidance.TokenizerWrapper(table), eos_token=list(self.stop_ids)
    )

  def json_schema(self, schema: Mapping[str, Any] | bool, *, compact: bool = False) -> Constraint:
    """Values of a JSON schema. Keywords that cannot be enforced are refused, not ignored.

    Whitespace between tokens is a space or a line end with its indent; `compact` allows none.
    """
    whitespace = grammars.JSON_COMPACT if compact else grammars.JSON_WHITESPACE
    if not isinstance(schema, Mapping) and schema is not True:
      raise GrammarError(f"json_schema: found {schema!r:.80}, expected an object or true")
    schema = {} if schema is True else dict(schema)
    schema["x-guidance"] = {"whitespace_pattern": whitespace}
    try:
      return self._constraint(f"start: %json {json.dumps(schema, allow_nan=False)}", "json_schema")
    except (TypeError, RecursionError, GrammarError, ValueError) as error:
      # The reason without the position and the text of the grammar around the schema.
      reason = str(error).split("compile JSON schema: ")[-1].split("\n")[0]
      raise GrammarError(f"json_schema: {reason.removeprefix('json_schema: ')}") from error

  def json_object(self, *, compact: bool = False) -> Constraint:
    """Any JSON object."""
    return self.json_schema({"type": "object"}, compact=compact)

  def regex(self, pattern: str) -> Constraint:
    """The whole answer matches `pattern` (Rust regex syntax, no look-around)."""
    _check_text("regex", pattern)
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
      # The grammar would take the backslash with the slash that ends the expression.
      raise GrammarError(f"regex: found {pattern!r:.80}, expected something behind the last \\\\")
    pattern = self._llguidance.regex_to_lark(pattern, "")
    return self._constraint(f"start: /{pattern}/", "regex")

  def choice(self, options: Sequence[str]) -> Constraint:
    """The answer is one of `options`."""
    if isinstance(options, str) or not options or not all(o and type(o) is str for o in options):
      raise GrammarError(f"choice: found {list(options)!r}, expected texts that are not empty")
    return self.lark("start: " + " | ".join(map(grammars.quote, options)))

  def lark(self, grammar: str) -> Constraint:
    """A grammar in llguidance's Lark dialect; its start rule is `start`."""
    _check_text("grammar", grammar)
    return self._constraint(grammar, "grammar")

  def sql_select(self, tables: Mapping[str, Sequence[str]] | None = None) -> Constraint:
    """One SQL SELECT statement, `grammars.sql_select`."""
    return self.lark(grammars.sql_select(tables))

  def python_calls(
    self, tools: Sequence[Mapping[str, Any]], *, before: str = "", after: str = ""
  ) -> Constraint:
    """Calls of the tools in Python syntax, one a line, `grammars.python_calls`.

    `before` and `after` are texts that stand around the calls (markers, a code fence).
    """
    parts = [grammars.quote(before), "calls", grammars.quote(after)]
    start = "start: " + " ".join(part for part in parts if part != '""')
    return self.lark(f"{start}\n{grammars.python_calls(tools)}")

  def _constraint(self, grammar: str, what: str) -> Constraint:
    """llguidance recurses into rules: a chain of 3,000 names ends a process on a usual stack."""
    if len(grammar) > MAX_GRAMMAR:
      raise GrammarError(f"{what}: found {len(grammar)} characters, expected at most {MAX_GRAMMAR}")
    with futures.ThreadPoolExecutor(1) as pool:
      with _STACK:
        before = threading.stack_size(STACK_BYTES)
        try:
          made = pool.submit(self._compile, grammar, what)
        finally:
          threading.stack_size(before)
      return made.result()

  def _compile(self, grammar: str, what: str) -> Constraint:
    matcher_class = self._llguidance.LLMatcher
    grammar = matcher_class.grammar_from_lark(grammar + _EVERY_CUT)
    matcher = matcher_class(self._tokenizer, grammar, log_level=0)
    if matcher.is_error():
      raise GrammarError(f"{what}: {matcher.get_error().split(chr(10) + '<state>')[0]}")
    constraint = Constraint(matcher, self._tok, self.vocab_size, self.stop_ids)
    row = np.zeros(mask_width(self.vocab_size), np.int32)
    constraint.fill_mask(row)
    if constraint.error or not row.any():
      raise GrammarError(f"{what}: no answer satisfies it {constraint.error}".rstrip())
    return constraint


def _check_text(what: str, text: Any) -> None:
  if not isinstance(text, str):
    raise GrammarError(f"{what}: found {text!r:.80}, expected a text")
  if any("\ud800" <= character <= "\udfff" for character in text):
    raise GrammarError(f"{what}: found half a surrogate pair, expected characters")


class _TokenTable:
  """What llguidance reads of a tokenizer."""

  def __init__(self, tok: tokenizer.Tokenizer, tokens: list[bytes], eos: int, special: list[int]):
    self._tok = tok
    self.tokens = tokens
    self.eos_token_id = eos
    self.bos_token_id = tok.bos_id
    self.special_token_ids = special

  def __call__(self, data: bytes | str) -> list[int]:
    text = data.decode("utf-8", errors="replace") if isinstance(data, bytes) else data
    return self._tok.encode(text)
