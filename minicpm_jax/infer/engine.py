"""The decode engine: requests in, tokens out, several rows at a time (inference.md 1-9).

    engine = Engine(model, params, config.EngineConfig(max_batch=4))
    uid = engine.add(Request(prompt, sampling))
    while engine.has_work:
      for event in engine.step(): ...

Rows join and leave while others decode. The host asks for a round and reads the answer of the round
before, so the device never waits for it; rows under a constraint are the exception. Tokens are a
function of (prompt, sampling) alone: not of the drafter, the other rows, or the sizes.
"""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.config import validate
from minicpm_jax.core import types
from minicpm_jax.infer import driver as driver_lib
from minicpm_jax.infer import programs, requests
from minicpm_jax.infer import rounds as rounds_lib
from minicpm_jax.infer import rows as rows_lib
from minicpm_jax.infer import state as state_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import transformer
from minicpm_jax.quant import prefix as prefix_lib

NO_TOKEN = state_lib.NO_TOKEN
TokenConstraint, Request, Stats = requests.TokenConstraint, requests.Request, requests.Stats
Event, Generation, RequestError = requests.Event, requests.Generation, requests.RequestError
Top = requests.Top
FinishReason, check_prompt = requests.FinishReason, requests.check_prompt


class Engine(programs.Programs, driver_lib.Driver):
  """Continuous batching over `cfg.max_batch` rows; see the module docstring.

  `model` and `params` as they are to run: pass them through `generate.for_decoding` first.
  `drafter` with its `draft_params` proposes tokens (infer/drafters); None decodes plainly.
  `before`: prefix tokens whose stored keys and values every request starts with (quant.prefix).
  """

  def __init__(
    self,
    model: transformer.Transformer,
    params: types.Params,
    cfg: config.EngineConfig | None = None,
    *,
    drafter: base.Drafter | None = None,
    draft_params: Any = (),
    stop_ids: Sequence[int] = (),
    before: prefix_lib.Prefix | None = None,
  ):
    validate.require(
      cfg is None or isinstance(cfg, config.EngineConfig), "engine", cfg, "an EngineConfig"
    )
    self.model, self.cfg = model, config.EngineConfig() if cfg is None else cfg
    self.drafter = base.NoDrafter() if drafter is None else drafter
    validate.require(hasattr(self.drafter, "num_nodes"), "drafter", drafter, "a Drafter")
    self.params = base.Params(params, draft_params)
    self.stop_ids = tuple(requests.token_ids("stop_ids", stop_ids))
    self.before = before
    base.check_params(model.cfg, params, "params")
    if before is not None:
      requests.check_prefix(model.cfg, self.drafter, before, self.cfg.capacity)
    requests.check_stops(self.stop_ids, state_lib.STOP_SLOTS, model.cfg.vocab_size)
    base.check_tree_size(self.drafter.num_nodes, self.drafter.num_levels)
    is_sparse = model.cfg.sparse is not None and self.cfg.capacity >= model.cfg.sparse.dense_len
    base.check_window(model.cfg.sparse if is_sparse else None, self.drafter.num_levels)
    self._num_rows = base.num_rows(self.drafter)
    if self.cfg.capacity <= self._num_rows:
      raise ValueError(
        f"engine.capacity: found {self.cfg.capacity} tokens, expected more than the "
        f"{self._num_rows} nodes of a draft tree"
      )
    self.drafter.check(model, self.params)
    extra = max(rows_lib.SMALLEST_CHUNK, self._num_rows)
    unit = 1 if model.cfg.sparse is None else model.cfg.sparse.block_size
    # A padded chunk and a tree always fit behind.
    self._num_slots = rows_lib.slots_of(self.cfg.capacity + extra, unit, jax.default_backend())
    self._min_span = -(-self.cfg.min_span // unit) * unit  # spans are whole blocks
    self._state = state_lib.init_state(
      model, self.drafter, self.params, self.cfg.max_batch, self._num_slots
    )
    self._rows = [rows_lib.Row() for _ in range(self.cfg.max_batch)]
    self._waiting: collections.deque[rows_lib.Job] = collections.deque()
    self._pending: collections.deque[rows_lib.Answer] = collections.deque()
    self._outbox: list[Event] = []
    self._errors: collections.deque[RequestError] = collections.deque()  # one a step is raised
    self._ids = itertools.count()
    self._clock = time.perf_counter()
    self.compile_seconds = 0.0  # of all functions so far
    self.tells = jax.default_backend() == "gpu"  # rounds.Known
    self._free_mask = jnp.full((1, -(-model.cfg.vocab_size // 32)), -1, jnp.int32)

  # --- Requests -----------------------------------------------------------------------------------

  @property
  def num_free_slots(self) -> int:
    """Rows that no request has, less the requests that wait; at least 0."""
    return max(0, sum(row.job is None for row in self._rows) - len(self._waiting))

  @property
  def draft_state(self) -> Any:
    """The drafter's state by row, as it is now (read only: the next step donates it)."""
    return self._state.draft

  @property
  def has_work(self) -> bool:
    left = (self._waiting, self._pending, self._outbox, self._errors)
    return any(left) or any(row.job is not None for row in self._rows)

  def add(self, request: Request) -> int:
    """Queues a request; its events carry the id. ValueError where it can never be served."""
    prompt = requests.token_ids("prompt", request.prompt)
    check_prompt("prompt", prompt, self.model.cfg.vocab_size)
    num_own = len(prompt)
    if self.before is not None:
      prompt = [*self.before.tokens, *prompt]
    room = self.cfg.capacity - self._num_rows
    if len(prompt) > room:
      raise ValueError(
        f"prompt: found {len(prompt)} tokens, expected at most {room}: the cache's "
        f"{self.cfg.capacity} less a tree of {self._num_rows}"
      )
    own = requests.token_ids("stop_ids", request.stop_ids)
    stops = tuple(dict.fromkeys((*self.stop_ids, *own)))
    requests.check_stops(stops, state_lib.STOP_SLOTS, self.model.cfg.vocab_size)
    requests.check_options(request)
    job = rows_lib.Job(next(self._ids), dataclasses.replace(request, prompt=prompt), stops, Stats())
    job.stats.prompt_tokens = num_own
    job.limit = min(request.sampling.max_new_tokens, self.cfg.capacity - len(prompt) + 1)
    self._waiting.append(job)
    return job.id

  def cancel(self, uid: int) -> Event | None:
    """Ends a request now; its last event, or None where it is unknown or has ended."""
    self._errors = collections.deque(error for error in self._errors if error.id != uid)
    for job in list(self._waiting):
      if job.id == uid:
        self._waiting.remove(job)
        return self._finish(job, "cancelled", [], [])
    for row in self._rows:
      if row.job is not None and row.job.id == uid:
        self._state = state_lib.release(self._state, np.int32(row.job.row))
        return self._finish(row.job, "cancelled", [], [])
    return None

  # --- One step -----------------------------------------------------------------------------------

  def step(self) -> list[Event]:
    """One chunk of a waiting prompt, one dispatch of rounds for the rows that decode.

    Returns the events of the dispatch before (all that are left where nothing was dispatched). A
    request that cannot go on (`RequestError`) is ended first; the next step serves the others.
    """
    if self._errors:
      raise self._errors.popleft()
    num_before = len(self._pending)
    self._fill_one()
    live = [row.job for row in self._rows if row.job is not None and not row.job.is_filling]
    if any(job.request.constraint is not None for job in live):
      self._read(len(self._pending))
      for job in live:
        if job.request.fast_forward and job.finish_reason is None:
          self._fast_forward(job)
      live = [job for job in live if job.finish_reason is None]
      if live:
        self._constrained_round(live)
        self._read(len(self._pending))
    else:
      if any(len(job.tokens) + job.promised < job.limit for job in live):
        self._dispatch(live)
      num_new = len(self._pending) - num_before
      self._read(len(self._pending) - num_new if num_new else len(self._pending))
    events, self._outbox = self._outbox, []
    return events

  def fill(self) -> None:
    """Prefills everything that has a row, without a round in between."""
    while self._fill_one():
      pass

  # --- Inside -------------------------------------------------------------------------------------

  def _fill_one(self) -> bool:
    """Prefills a chunk of the first prompt that waits for one."""
    self._admit()
    jobs = (row.job for row in self._rows if row.job is not None)
    job = next((job for job in jobs if job.is_filling), None)
    if job is not None:
      self._prefill_chunk(job)
    return job is not None

  def _admit(self) -> None:
    """Waiting requests take free rows, those whose cache begins alike first."""
    while self._waiting:
      if all(row.job is not None for row in self._rows):
        return
      job = self._waiting.popleft()
      kind, reuse = rows_lib.kind_of(self.model.cfg, job), self.drafter.reuses_prefix
      more = (self.cfg.min_prefix, reuse, self._shrinks)
      row, source, num = rows_lib.choose_row(self._rows, job, kind, *more)
      job.row, job.num_cached, job.started = row, num, time.perf_counter()
      self._rows[row] = rows_lib.Row(job, list(job.request.prompt[:num]), kind)
      if source != row:
        copied = (self.drafter, self._state, np.int32(source), np.int32(row))
        self._state = state_lib.copy_row(*copied)
      num_before = 0 if self.before is None else self.before.length
      if num < num_before:
        stored = (self.before.k, self.before.v)
        self._state = state_lib.put_prefix(self._state, np.int32(row), *stored)
        num = job.num_cached = num_before
        self._rows[row].held = list(self.before.tokens)
      job.stats.cached_tokens = num - num_before
      settings = rows_lib.settings(job, self.model.cfg.vocab_size, num_before)
      self._state = state_lib.admit(self._state, np.int32(row), settings)

  def _span(self, num_slots: int) -> int:
    return rows_lib.span_of(num_slots, self._min_span, self._num_slots)

  def _chunk_size(self, start: int, rest: int) -> int:
    return rows_lib.chunk_of(start, rest, self.cfg.chunk_size, self._num_slots)

  def _prefill_chunk(self, job: rows_lib.Job) -> None:
    prompt, start = job.request.prompt, job.num_cached
    size = self._chunk_size(start, len(prompt) - start)
    num = min(size, len(prompt) - start)
    is_last = start + num == len(prompt)
    tokens_1C = np.zeros((1, size), np.int32)
    tokens_1C[0, :num] = prompt[start : start + num]
    mask_1W = self._free_mask
    if is_last and job.request.constraint is not None:
      mask_1W = np.zeros(self._free_mask.shape, np.int32)
      with self._blaming(job):
        job.request.constraint.fill_mask(mask_1W[0])
      self._check_mask(mask_1W[0], job)
    args = (
      *(tokens_1C, np.int32(job.row), np.int32(num), np.int32(len(prompt))),
      *(np.int32(NO_TOKEN if is_last else prompt[start + num]), mask_1W),
    )
    end = start + size
    if self._rows[job.row].is_sparse:  # reads few keys of any span: one program for all chunks
      end = max(end, len(prompt))
    # A chunk takes no part of the branches of sampling. Without that of dense attention in every
    # layer a third less is compiled; long prompts have programs of their own, by their spans.
    known = rounds_lib.Known(is_long=self._is_long(len(prompt)))
    static = dict(span=self._span(end), known=known)
    answer = self._call(rounds_lib.prefill, [job], *args, **static)
    job.num_cached += num
    self._rows[job.row].held += prompt[start : start + num]
    if is_last:
      self._await(rows_lib.Answer(answer, [job], 0))

  def _dispatch(self, live: list[rows_lib.Job]) -> None:
    rounds, A = self.cfg.rounds_per_dispatch, self.drafter.num_levels + 1
    # Answers under way may have made a row longer than the host knows.
    ahead = sum(p.rounds for p in self._pending) * A
    length = max(len(job.request.prompt) + len(job.tokens) for job in live) + ahead
    span = self._span(length + rounds * A + self._num_rows)
    known = self._known(live, min(len(job.request.prompt) + len(job.tokens) for job in live))
    first, num = self._window(live)
    static = dict(span=span, rounds=rounds, known=known)
    args, static = programs.of_rows(static, first, num, len(self._rows))
    answer = self._call(rounds_lib.run, live, *args, **static)
    self._await(rows_lib.Answer(answer, self._jobs_by_row(live)[first : first + num], rounds))

  def _window(self, live: list[rows_lib.Job]) -> tuple[int, int]:
    """(first, number) of the rows of a round."""
    num = len(self._rows)
    return rows_lib.window([job.row for job in live], num) if self._shrinks else (0, num)

  def _known(self, jobs: list[rows_lib.Job], length: int) -> rounds_lib.Known:
    """`length`: tokens of the shortest sequence. Off a GPU branches are free, programs are not."""
    if not self.tells:
      return rounds_lib.Known()
    is_bare = all(rows_lib.is_bare(job.request) for job in jobs)
    return rounds_lib.Known(is_bare, self._is_long(length))

  def _is_long(self, length: int) -> bool:
    sparse = self.model.cfg.sparse
    return sparse is not None and length >= sparse.dense_len

  def _constrained_round(self, live: list[rows_lib.Job]) -> None:
    """Draft, look at the tree, verify: the masks of a round depend on the tokens before it."""
    length = max(len(job.request.prompt) + len(job.tokens) for job in live)
    span = self._span(length + self._num_rows)
    (first, num), num_words = self._window(live), self._free_mask.shape[1]
    rows, static = programs.of_rows(dict(span=span), first, num, len(self._rows))
    root_mask_BW = rows_lib.root_masks(live, first, num, num_words, self._blaming)
    tree = self._call(rounds_lib.draft, live, root_mask_BW, *rows, **static)
    tok_BP, mask_BPW = rows_lib.node_masks(live, tree, first, num_words, self._blaming)
    for job in live:
      self._check_mask(mask_BPW[job.row - first, 0], job)
    tree = tree.replace(tok_BP=jnp.asarray(tok_BP))
    answer = self._call(rounds_lib.verify, live, tree, mask_BPW, *rows, **static)
    self._await(rows_lib.Answer(answer, self._jobs_by_row(live)[first : first + num], 1))

  def _fast_forward(self, job: rows_lib.Job) -> None:
    """Appends what the constraint forces as one chunk: one forward for all of it."""
    length = len(job.request.prompt) + len(job.tokens) - 1  # the last token is not in the cache
    with self._blaming(job):
      forced = rows_lib.forced_tokens(job, self.model.cfg.sparse)
    if len(forced) < 2:  # a round brings as much
      return
    size = self._chunk_size(length, len(forced))
    forced = forced[:size]
    num = len(forced)
    tokens_1C, forced_C = np.zeros((1, size), np.int32), np.full((size,), NO_TOKEN, np.int32)
    tokens_1C[0, :num], forced_C[:num] = [job.tokens[-1], *forced[:-1]], forced
    args = (tokens_1C, np.int32(job.row), np.int32(num), np.int32(length + num))
    args += (np.int32(forced[-1]), self._free_mask)
    known = rounds_lib.Known(is_long=self._is_long(length + num))
    static = dict(span=self._span(length + size), known=known)  # programs of prompts
    self._call(rounds_lib.prefill, [job], *args, **static)
    so_far = np.int32(len(job.tokens) + num)
    self._state = state_lib.resume(self._state, np.int32(job.row), so_far, forced_C)
    job.stats.forced_tokens += num
    event = self._take(job, forced, [], [])
    if event is not None:
      self._outbox.append(event)

  def _await(self, answer: rows_lib.Answer) -> None:
    self._pending.append(answer)
    for job in answer.jobs:
      if job is not None:
        job.promised += max(1, answer.rounds)

  def _jobs_by_row(self, live: list[rows_lib.Job]) -> list[rows_lib.Job | None]:
    by_row = {job.row: job for job in live}
    return [by_row.get(i) for i in range(len(self._rows))]

  def _read(self, num: int) -> None:
    """Waits for the `num` oldest answers and puts their events into the outbox."""
    for _ in range(num):
      answer, jobs, num_rounds = self._pending.popleft()
      wants_top = any(job is not None and job.request.num_top_logprobs for job in jobs)
      tops = (answer.top_ids_BRAK, answer.top_logprobs_BRAK) if wants_top else ()
      tokens_BRA, logprobs_BRA, is_bad_B, *tops = jax.device_get(
        (answer.tokens_BRA, answer.logprobs_BRA, answer.is_bad_B, *tops)
      )
      now = time.perf_counter()
      seconds, self._clock = now - self._clock, now
      bad = []
      for b, job in enumerate(jobs):
        if job is None or job.finish_reason is not None:
          continue
        job.promised -= max(1, num_rounds)
        if num_rounds:
          job.stats.decode_seconds += seconds
        else:
          job.stats.prefill_seconds = now - job.started
        if is_bad_B[b]:
          bad.append(job)
          continue
        said = (tokens_BRA[b], logprobs_BRA[b], [x[b] for x in tops])
        event = self._emit(job, *said, is_prefill=num_rounds == 0)
        if event is not None:
          self._outbox.append(event)
      if bad:
        text = "found non-finite logits, expected finite (broken weights?)"
        self._errors += [self._failed(job, text) for job in bad]
        raise self._errors.popleft()

  def _failed(self, job: rows_lib.Job, text: str) -> "RequestError":
    self._state = state_lib.release(self._state, np.int32(job.row))
    self._outbox.append(self._finish(job, "cancelled", [], []))
    return RequestError(job.id, text)

  @contextlib.contextmanager
  def _blaming(self, job: rows_lib.Job) -> Iterator[None]:
    """What a constraint raises ends its request alone."""
    try:
      yield
    except Exception as error:
      raise self._failed(job, _of_constraint(error)) from error

  def _check_mask(self, mask_W: np.ndarray, job: rows_lib.Job) -> None:
    if not mask_W.any():
      raise self._failed(job, "the constraint allows no token, expected at least one")

  def _emit(
    self, job: rows_lib.Job, tokens_RA, logprobs_RA, tops_RAK, *, is_prefill: bool
  ) -> Event | None:
    counts, *said = rows_lib.said(job, tokens_RA, logprobs_RA, tops_RAK)
    if not is_prefill:
      job.stats.accepted += [n for n in counts if n]
    return self._take(job, *said)

  def _take(
    self, job: rows_lib.Job, tokens: list[int], logprobs: list[float], tops: list[Top]
  ) -> Event | None:
    """The event of new tokens, cut where the request ends."""
    reason: FinishReason | None = None
    if job.request.constraint is not None:
      try:
        tokens, is_stopped = requests.follow(job.request.constraint, tokens, job.stops)
      except Exception as error:  # raised by a later step: this one has other rows' tokens to give
        self._errors.append(self._failed(job, _of_constraint(error)))
        return None
      logprobs, tops = logprobs[: len(tokens)], tops[: len(tokens)]
      reason = "stop" if is_stopped else None
    if not tokens:
      return None
    self._rows[job.row].held += [*job.tokens[-1:], *tokens[:-1]]  # the last is not in the cache
    job.tokens += tokens
    if tokens[-1] in job.stops:
      reason = "stop"
    elif reason is None and len(job.tokens) >= job.limit:
      reason = "length"
    if reason is None:
      return Event(job.id, tokens, logprobs, top_logprobs=tops)
    if job.request.constraint is not None:
      self._state = state_lib.release(self._state, np.int32(job.row))
    return self._finish(job, reason, tokens, logprobs, tops)

  def _finish(self, job: rows_lib.Job, reason: FinishReason, tokens, logprobs, tops=()) -> Event:
    job.finish_reason = reason
    job.stats.new_tokens = len(job.tokens)
    if job.row >= 0:
      self._rows[job.row].job = None
    return Event(job.id, tokens, logprobs, reason, job.stats, list(tops))


def _of_constraint(error: Exception) -> str:
  return f"its constraint raised {type(error).__name__}: {error}"
