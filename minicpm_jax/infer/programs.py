"""The engine's programs: compiled when they are called for, which is timed, or before.

Shapes are few: a prompt's chunk has one of `rows.chunk_sizes`, attention reads a span, and on a GPU
every span has a program for each `rounds.Known`.
"""

import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.infer import requests
from minicpm_jax.infer import rounds as rounds_lib
from minicpm_jax.infer import rows as rows_lib
from minicpm_jax.infer import state as state_lib
from minicpm_jax.infer.drafters import base


def of_rows(static: dict[str, Any], first: int, num: int, most: int) -> tuple[tuple, dict]:
  """(arguments, static ones) of `rounds.run` for `num` of `most` rows."""
  return ((), static) if num == most else ((np.int32(first),), static | {"num_rows": num})


class Program(NamedTuple):
  """A function of `rounds` as the engine will call it."""

  function: Any
  args: tuple[Any, ...]
  static: dict[str, Any]


class Sizes(NamedTuple):
  """What shapes depend on. `min_span`: the config's in whole blocks; `ahead`: slots that rounds
  under way may need behind a sequence; `dense_len`: of sparse attention (`Known.is_long`), or None;
  rounds hear of it where the host `tells`."""

  cfg: config.EngineConfig
  min_span: int
  num_slots: int
  ahead: int
  tells: bool
  shrinks: bool
  dense_len: int | None

  def span(self, num_slots: int) -> int:
    return rows_lib.span_of(num_slots, self.min_span, self.num_slots)

  def spans(self, num_tokens: int) -> list[int]:
    """Spans of sequences that end with `num_tokens` tokens."""
    return sorted({self.span(n) for n in range(1, num_tokens + self.ahead + 1)})

  @property
  def first(self) -> int:
    """The longest sequence that the smallest span serves to its end."""
    return max(1, self.span(1) - self.ahead)

  @property
  def windows(self) -> list[int]:
    """Numbers of rows that rounds may be of."""
    most = self.cfg.max_batch
    return rows_lib.window_sizes(most) if self.shrinks else [most]

  def lengths(self, span: int) -> list[bool]:
    """Values of Known.is_long for sequences within `span`."""
    if self.dense_len is None:
      return [False]
    return [False] * (self.dense_len > 1) + [True] * (self.dense_len <= span)


def settings(vocab_size: int) -> state_lib.RowSettings:
  """What an empty request sets in its row."""
  request = requests.Request([0], config.SamplingConfig())
  return rows_lib.settings(rows_lib.Job(0, request, (), requests.Stats()), vocab_size)


def prefills(sizes: Sizes, num_tokens: int, mask_1W: Any) -> Iterator[Program]:
  """Chunks of prompts of up to `num_tokens` tokens, also of what follows a cached beginning."""
  chunks = rows_lib.chunk_sizes(sizes.cfg.chunk_size)
  largest = rows_lib.chunk_of(0, num_tokens, sizes.cfg.chunk_size, sizes.num_slots)
  for size in (size for size in chunks if size <= largest):
    spans = {sizes.span(size), *(span for span in sizes.spans(num_tokens) if span >= size)}
    one = np.int32(1)
    args = (np.zeros((1, size), np.int32), np.int32(0), one, one, np.int32(0), mask_1W)
    for span in sorted(spans):
      for is_long in sizes.lengths(span):
        known = rounds_lib.Known(is_long=is_long)
        yield Program(rounds_lib.prefill, args, dict(span=span, known=known))


def runs(sizes: Sizes, num_tokens: int) -> Iterator[Program]:
  """Rounds of sequences of up to `num_tokens` tokens, for every `Known`."""
  for span in sizes.spans(num_tokens):
    for is_bare in (False, True) if sizes.tells else (False,):
      for is_long in sizes.lengths(span) if sizes.tells else (False,):
        known = rounds_lib.Known(is_bare, is_long)
        static = dict(span=span, rounds=sizes.cfg.rounds_per_dispatch, known=known)
        for num in sizes.windows:
          yield Program(rounds_lib.run, *of_rows(static, 0, num, sizes.cfg.max_batch))


def constrained_rounds(
  sizes: Sizes, num_tokens: int, num_words: int, tree_of: Callable[[tuple, dict], base.Tree]
) -> Iterator[Program]:
  """Both halves of rounds under a constraint. `tree_of` the rows: what the first half returns."""
  most = sizes.cfg.max_batch
  for num in sizes.windows:
    tree = None
    for span in sizes.spans(num_tokens):
      rows, static = of_rows(dict(span=span), 0, num, most)
      first = Program(rounds_lib.draft, (np.zeros((num, num_words), np.int32), *rows), static)
      tree = tree_of(*first[1:]) if tree is None else tree
      mask_BPW = np.zeros((*tree.tok_BP.shape, num_words), np.int32)
      yield first
      yield Program(rounds_lib.verify, (tree, mask_BPW, *rows), static)


def compile_all(lowered: Iterable[Any]) -> int:
  """Compiles side by side, while the next are traced; their number."""
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    futures = [pool.submit(one.compile) for one in lowered]
    for future in futures:
      future.result()
  return len(futures)


class Programs:
  """How `Engine` calls the functions of its state."""

  model: Any
  drafter: Any
  params: base.Params
  cfg: config.EngineConfig

  def warm_up(self, num_tokens: int | None = None, *, is_constrained: bool = False) -> int:
    """Compiles what requests of up to `num_tokens` tokens (prompt and answer; None: those of the
    smallest span) will ask for, those under a constraint where `is_constrained`, `fast_forward`
    included; the number of programs.

    One row takes a chunk of a prompt that never ends, which brings the state into the form (where
    its arrays lie) that all later steps find; the other programs are compiled and not run. Nothing
    is sampled, and the row stays unused; what its cache held is forgotten.
    """
    if self.has_work:
      raise ValueError("warm_up: found requests under way, expected none")
    began, before, zero = time.perf_counter(), self.compile_seconds, np.int32(0)
    sizes = self._sizes()
    num_before = 0 if self.before is None else self.before.length  # stand in front of every prompt
    most = sizes.first if num_tokens is None else num_tokens + num_before
    num_tokens = min(most, self.cfg.capacity)
    chunks = [*prefills(sizes, num_tokens, self._free_mask)]
    smallest = min(chunks, key=lambda program: program.args[0].size)
    blank = settings(self.model.cfg.vocab_size)
    self._rows[0] = rows_lib.Row()  # no prompt goes on from what the chunk overwrites
    self._state = state_lib.admit(self._state, zero, blank)
    self._call(smallest.function, [], *smallest.args, **smallest.static)
    self._state = state_lib.admit(self._state, zero, blank)

    def lowered():
      yield state_lib.admit.lower(self._state, zero, blank)
      yield state_lib.release.lower(self._state, zero)
      yield state_lib.copy_row.lower(self.drafter, self._state, zero, zero)
      if self.before is not None:
        yield state_lib.put_prefix.lower(self._state, zero, self.before.k, self.before.v)
      rounds = [*runs(sizes, num_tokens)]
      if is_constrained:
        num_words = self._free_mask.shape[1]
        rounds += constrained_rounds(sizes, num_tokens, num_words, self._blank_tree)
        for size in sorted({program.args[0].size for program in chunks}):  # `fast_forward`
          yield state_lib.resume.lower(self._state, zero, zero, np.zeros((size,), np.int32))
      # The smallest chunk again: the state has come to rest.
      for function, args, static in (*chunks, *rounds):
        yield function.lower(*self._head, *args, **static)
        _COMPILED.add(self._key(function, args, static))

    num = compile_all(lowered())
    self.compile_seconds = before + time.perf_counter() - began
    return num

  def _blank_tree(self, args: tuple, static: dict[str, Any]) -> base.Tree:
    """A tree as the engine hands it to `rounds.verify`: programs depend on where arrays lie."""

    def drafted(params: base.Params, state: state_lib.State) -> base.Tree:
      return rounds_lib.draft(self.model, self.drafter, params, state, *args, **static)[1]

    shapes = jax.eval_shape(drafted, self.params, self._state)
    blank = jax.jit(lambda root: jax.tree.map(lambda x: jnp.full(x.shape, root, x.dtype), shapes))
    tree = blank(self._state.root_B[0])  # lies where the state does
    return tree.replace(tok_BP=jnp.asarray(np.asarray(tree.tok_BP)))

  def _sizes(self) -> Sizes:
    sparse = self.model.cfg.sparse
    ahead = 2 * self.cfg.rounds_per_dispatch * (self.drafter.num_levels + 1) + self._num_rows
    dense_len = None if sparse is None else sparse.dense_len
    slots = (self._min_span, self._num_slots, ahead)
    return Sizes(self.cfg, *slots, self.tells, self._shrinks, dense_len)

  @property
  def _shrinks(self) -> bool:
    return self.cfg.shrinks and getattr(self.drafter, "by_row", False)

  @property
  def _head(self) -> tuple[Any, ...]:
    return (self.model, self.drafter, self.params, self._state)

  @functools.cached_property
  def _form(self) -> int:
    """What a program is compiled for beside model and drafter, FR and full heads have one: its
    number, which hashes faster in every round than hundreds of shapes."""
    leaves, structure = jax.tree.flatten(self.params)
    arrays = tuple((x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves)
    return _FORMS.setdefault((structure, arrays), next(_NUMBERS))  # one a form, also in threads

  def _key(self, function: Any, args: Sequence[Any], static: dict[str, Any]) -> Any:
    """Equal for calls of one program."""
    shapes = tuple(getattr(x, "shape", None) for x in args)
    key = (function.__name__, self.model, self.drafter, shapes, tuple(static.items()))
    return (*key, self.cfg.max_batch, self._num_slots, self._form)

  def _call(self, function: Any, jobs: list[rows_lib.Job], *args: Any, **static: Any) -> Any:
    """Runs a function of the state; what it compiles first is timed apart."""
    if (key := self._key(function, args, static)) not in _COMPILED:
      jax.block_until_ready(self._state)  # work under way is not compilation
      begin = time.perf_counter()
      function.lower(*self._head, *args, **static).compile()
      _COMPILED.add(key)
      seconds = time.perf_counter() - begin
      self._clock += seconds
      self.compile_seconds += seconds
      for job in jobs:
        job.stats.compile_seconds += seconds
      for row in self._rows:  # those that wait for another's compilation too
        if row.job is not None:
          row.job.started += seconds
    self._state, answer = function(*self._head, *args, **static)
    return answer


_COMPILED: set[Any] = set()
_FORMS: dict[Any, int] = {}
_NUMBERS = itertools.count()
