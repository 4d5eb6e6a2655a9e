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
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import rng, types
from minicpm_jax.infer import requests
from minicpm_jax.infer import rounds as rounds_lib
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import transformer
from minicpm_jax.quant import prefix as prefix_lib

NO_TOKEN = rounds_lib.NO_TOKEN
SMALLEST_CHUNK = 16
TokenConstraint, Request, Stats = requests.TokenConstraint, requests.Request, requests.Stats
Event, Generation, RequestError = requests.Event, requests.Generation, requests.RequestError
FinishReason, check_prompt = requests.FinishReason, requests.check_prompt


@dataclasses.dataclass
class _Job:
  """A request on its way."""

  id: int
  request: Request
  stops: tuple[int, ...]
  stats: Stats
  row: int = -1
  num_cached: int = 0  # prompt tokens in the cache
  tokens: list[int] = dataclasses.field(default_factory=list)
  finish_reason: FinishReason | None = None
  started: float = 0.0
  limit: int = 0
  promised: int = 0  # tokens that rounds under way will bring at least


@dataclasses.dataclass
class _Row:
  """What the host knows of a row of the cache."""

  job: _Job | None = None
  held: list[int] = dataclasses.field(default_factory=list)  # tokens whose keys are in the cache
  kind: Any = None  # rotation and dense/sparse mode that these keys were made in


class _Answer(NamedTuple):
  """An answer under way: what it holds of which request of each row."""

  answer: rounds_lib.Answer
  jobs: list[_Job | None]
  rounds: int  # 0 = the first token, out of the prefill


class Engine:
  """Continuous batching over `cfg.max_batch` rows; see the module docstring.

  `model` and `params` as they are to run: on a CPU pass them through `generate.for_decoding` first.
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
    self.model, self.cfg = model, config.EngineConfig() if cfg is None else cfg
    self.drafter = base.NoDrafter() if drafter is None else drafter
    self.params = base.Params(params, draft_params)
    self.stop_ids, self.before = tuple(stop_ids), before
    if before is not None:
      requests.check_prefix(model.cfg, self.drafter, before, self.cfg.capacity)
    base.check_tree_size(self.drafter.num_nodes, self.drafter.num_levels)
    if self.cfg.capacity <= self.drafter.num_nodes:
      raise ValueError(
        f"engine.capacity: found {self.cfg.capacity} tokens, expected more than the "
        f"{self.drafter.num_nodes} nodes of a draft tree"
      )
    self.drafter.check(model, self.params)
    extra = max(SMALLEST_CHUNK, self.drafter.num_nodes)
    unit = 1 if model.cfg.sparse is None else model.cfg.sparse.block_size
    # A padded chunk and a tree always fit behind.
    self._num_slots = -(-(self.cfg.capacity + extra) // unit) * unit
    self._state = rounds_lib.init_state(
      model, self.drafter, self.params, self.cfg.max_batch, self._num_slots
    )
    self._rows = [_Row() for _ in range(self.cfg.max_batch)]
    self._waiting: collections.deque[_Job] = collections.deque()
    self._pending: collections.deque[_Answer] = collections.deque()
    self._outbox: list[Event] = []
    self._errors: collections.deque[RequestError] = collections.deque()  # one a step is raised
    self._ids = itertools.count()
    self._clock = time.perf_counter()
    self.compile_seconds = 0.0  # of all functions so far
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
    prompt = list(map(int, request.prompt))
    check_prompt("prompt", prompt, self.model.cfg.vocab_size)
    num_own = len(prompt)
    if self.before is not None:
      prompt = [*self.before.tokens, *prompt]
    room = self.cfg.capacity - self.drafter.num_nodes
    if len(prompt) > room:
      raise ValueError(
        f"prompt: found {len(prompt)} tokens, expected at most {room}: the cache's "
        f"{self.cfg.capacity} less a tree of {self.drafter.num_nodes}"
      )
    stops = tuple(dict.fromkeys((*self.stop_ids, *map(int, request.stop_ids))))
    if len(stops) > rounds_lib.STOP_SLOTS:
      raise ValueError(f"stop_ids: found {len(stops)}, expected at most {rounds_lib.STOP_SLOTS}")
    job = _Job(next(self._ids), dataclasses.replace(request, prompt=prompt), stops, Stats())
    job.stats.prompt_tokens = num_own
    job.limit = min(request.sampling.max_new_tokens, self.cfg.capacity - len(prompt) + 1)
    self._waiting.append(job)
    return job.id

  def add_all(self, requests: Sequence[Request]) -> list[int]:
    """Queues all of them, or none where one can never be served."""
    uids = []
    try:
      for request in requests:
        uids.append(self.add(request))
    except BaseException:
      for uid in uids:
        self.cancel(uid)
      raise
    return uids

  def cancel(self, uid: int) -> Event | None:
    """Ends a request now; its last event, or None where it is unknown or has ended."""
    self._errors = collections.deque(error for error in self._errors if error.id != uid)
    for job in list(self._waiting):
      if job.id == uid:
        self._waiting.remove(job)
        return self._finish(job, "cancelled", [], [])
    for row in self._rows:
      if row.job is not None and row.job.id == uid:
        self._state = rounds_lib.release(self._state, np.int32(row.job.row))
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
    live = [row.job for row in self._rows if row.job is not None and not self._is_filling(row.job)]
    if any(job.request.constraint is not None for job in live):
      self._read(len(self._pending))
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

  def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
    """Events of these requests as they come; ids count from the first request's (the iterator
    closed early cancels what is left)."""
    uids = set(self.add_all(requests))
    try:
      while uids:
        for event in self.step():
          if event.id in uids:
            if event.finish_reason is not None:
              uids.discard(event.id)
            yield event
    finally:
      for uid in uids:
        self.cancel(uid)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: config.SamplingConfig | None = None,
    *,
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    want_logprobs: bool = False,
  ) -> Generation:
    """Decodes prompts to the end. `seeds` gives every prompt its own noise."""
    sampling = config.SamplingConfig() if sampling is None else sampling
    seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
      raise ValueError(
        f"seeds: found {len(seeds)}, expected one for each of {len(prompts)} prompts"
      )
    requests = [
      Request(prompt, dataclasses.replace(sampling, seed=seed), stop_ids, None, want_logprobs)
      for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return self.collect(requests)

  def collect(self, requests: Sequence[Request]) -> Generation:
    """Runs requests to the end, in their order; where one fails, all of them are cancelled."""
    uids = self.add_all(requests)
    tokens = {uid: [] for uid in uids}
    logprobs = {uid: [] for uid in uids}
    ends: dict[int, Event] = {}
    try:
      while len(ends) < len(uids):
        for event in self.step():
          if event.id in tokens:
            tokens[event.id] += event.tokens
            logprobs[event.id] += event.logprobs
            if event.finish_reason is not None:
              ends[event.id] = event
    finally:
      for uid in uids:
        self.cancel(uid)  # nothing where it has ended
    return Generation(
      tokens=[tokens[uid] for uid in uids],
      logprobs=[logprobs[uid] for uid in uids],
      finish_reason=[ends[uid].finish_reason for uid in uids],
      stats=[ends[uid].stats for uid in uids],
    )

  # --- Inside -------------------------------------------------------------------------------------

  def _fill_one(self) -> bool:
    """Prefills a chunk of the first prompt that waits for one."""
    self._admit()
    job = next((row.job for row in self._rows if self._is_filling(row.job)), None)
    if job is not None:
      self._prefill_chunk(job)
    return job is not None

  @staticmethod
  def _is_filling(job: _Job | None) -> bool:
    return job is not None and job.num_cached < len(job.request.prompt)

  def _kind(self, job: _Job) -> Any:
    """Keys are reused only where they were made with the same rotation and attention."""
    cfg, total = self.model.cfg, len(job.request.prompt)
    rotation = None
    if cfg.rope.kind == "longrope":
      rotation = self._rope_length(job) > cfg.rope.original_max_position
    elif cfg.rope.kind == "dynamic":
      rotation = max(self._rope_length(job), cfg.max_position)
    return rotation, cfg.sparse is not None and total >= cfg.sparse.dense_len

  @staticmethod
  def _rope_length(job: _Job) -> int:
    return len(job.request.prompt) + job.request.sampling.max_new_tokens

  def _admit(self) -> None:
    """Waiting requests take free rows, those whose cache begins alike first."""
    while self._waiting:
      free = [i for i, row in enumerate(self._rows) if row.job is None]
      if not free:
        return
      job = self._waiting.popleft()
      row, source, num = self._choose_row(free, job)
      job.row, job.num_cached, job.started = row, num, time.perf_counter()
      self._rows[row] = _Row(job, list(job.request.prompt[:num]), self._kind(job))
      if source != row:
        copied = (self.drafter, self._state, np.int32(source), np.int32(row))
        self._state = rounds_lib.copy_row(*copied)
      if self.before is not None and num < self.before.length:
        stored = (self.before.k, self.before.v)
        self._state = rounds_lib.put_prefix(self._state, np.int32(row), *stored)
        num = job.num_cached = self.before.length
        self._rows[row].held = list(self.before.tokens)
      job.stats.cached_tokens = num - (0 if self.before is None else self.before.length)
      self._state = rounds_lib.admit(self._state, np.int32(row), self._settings(job))

  def _choose_row(self, free: list[int], job: _Job) -> tuple[int, int, int]:
    """(row, row to continue, tokens of it). One token less than the common prefix is reused: the
    state of a draft at the last one depends on the token that follows."""
    prompt, kind = job.request.prompt, self._kind(job)

    def common(index: int) -> int:
      row = self._rows[index]
      if self.cfg.min_prefix < 0 or row.kind != kind or not self.drafter.reuses_prefix:
        return 0
      pairs = zip(row.held, prompt, strict=False)
      num = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row.held), len(prompt)))
      return max(0, num - 1)

    own = max(free, key=lambda i: (common(i), -len(self._rows[i].held)))
    best = max(range(len(self._rows)), key=common)
    if common(best) >= common(own) + max(1, self.cfg.min_prefix):
      own = min(free, key=lambda i: len(self._rows[i].held))
      return own, best, common(best)
    num = common(own)
    return own, own, num if num >= self.cfg.min_prefix else 0

  def _settings(self, job: _Job) -> rounds_lib.RowSettings:
    sampling = job.request.sampling
    stops_E = np.full(rounds_lib.STOP_SLOTS, NO_TOKEN, np.int32)
    stops_E[: len(job.stops)] = job.stops
    seen_V = np.zeros(self.model.cfg.vocab_size, bool)
    seen_V[job.request.prompt[0 if self.before is None else self.before.length :]] = True
    one = lambda value, dtype: np.full((1,), value, dtype)  # noqa: E731
    return rounds_lib.RowSettings(
      start=np.int32(job.num_cached),
      limit=np.int32(job.limit),
      stops_E=stops_E,
      rope_length=np.int32(self._rope_length(job)),
      seen_V=seen_V,
      wants_logprobs=np.bool_(job.request.want_logprobs),
      sampling=sampling_lib.SamplingState(
        key_B=rng.key(sampling.seed, "sampling")[None],
        temperature_B=one(sampling.temperature, np.float32),
        top_k_B=one(sampling.top_k, np.int32),
        top_p_B=one(sampling.top_p, np.float32),
        min_p_B=one(sampling.min_p, np.float32),
        penalty_B=one(sampling.repetition_penalty, np.float32),
      ),
    )

  def _span(self, num_slots: int) -> int:
    span = self.cfg.min_span
    while span < num_slots:
      span *= 2
    return min(span, self._num_slots)

  def _chunk_size(self, start: int, rest: int) -> int:
    """The largest chunk while the prompt fills it, then the smallest that holds the rest."""
    size, sizes = self.cfg.chunk_size, []
    while size >= SMALLEST_CHUNK:
      sizes.append(size)
      size //= 4
    sizes.append(SMALLEST_CHUNK)
    fitting = [s for s in sizes if start + s <= self._num_slots]
    holding = [s for s in fitting if s >= rest]
    return min(holding) if holding else max(fitting)

  def _prefill_chunk(self, job: _Job) -> None:
    prompt, start = job.request.prompt, job.num_cached
    size = self._chunk_size(start, len(prompt) - start)
    num = min(size, len(prompt) - start)
    is_last = start + num == len(prompt)
    tokens_1C = np.zeros((1, size), np.int32)
    tokens_1C[0, :num] = prompt[start : start + num]
    mask_1W = self._free_mask
    if is_last and job.request.constraint is not None:
      mask_1W = np.zeros(self._free_mask.shape, np.int32)
      job.request.constraint.fill_mask(mask_1W[0])
      self._check_mask(mask_1W[0], job)
    args = (
      *(tokens_1C, np.int32(job.row), np.int32(num), np.int32(len(prompt))),
      *(np.int32(NO_TOKEN if is_last else prompt[start + num]), mask_1W),
    )
    answer = self._call(rounds_lib.prefill, [job], *args, span=self._span(start + size))
    job.num_cached += num
    self._rows[job.row].held += prompt[start : start + num]
    if is_last:
      self._await(_Answer(answer, [job], 0))

  def _dispatch(self, live: list[_Job]) -> None:
    rounds, A = self.cfg.rounds_per_dispatch, self.drafter.num_levels + 1
    # Answers under way may have made a row longer than the host knows.
    ahead = sum(p.rounds for p in self._pending) * A
    length = max(len(job.request.prompt) + len(job.tokens) for job in live) + ahead
    span = self._span(length + rounds * A + self.drafter.num_nodes)
    answer = self._call(rounds_lib.run, live, span=span, rounds=rounds)
    self._await(_Answer(answer, self._jobs_by_row(live), rounds))

  def _constrained_round(self, live: list[_Job]) -> None:
    """Draft, look at the tree, verify: the masks of a round depend on the tokens before it."""
    length = max(len(job.request.prompt) + len(job.tokens) for job in live)
    span = self._span(length + self.drafter.num_nodes)
    tree, self._state = rounds_lib.draft(self.drafter, self.params, self._state, span=span)
    tok_BP, parent_BP = np.array(tree.tok_BP), np.asarray(tree.parent_BP)
    mask_BPW = np.full((*tok_BP.shape, self._free_mask.shape[1]), -1, np.int32)
    for job in live:
      if job.request.constraint is not None:
        b, mask_PW = job.row, np.zeros(mask_BPW.shape[1:], np.int32)
        tok_BP[b] = tree_lib.walk(job.request.constraint, tok_BP[b], parent_BP[b], mask_PW)
        self._check_mask(mask_PW[0], job)
        mask_BPW[b] = mask_PW
    tree = tree.replace(tok_BP=jnp.asarray(tok_BP))
    answer = self._call(rounds_lib.verify, live, tree, mask_BPW, span=span)
    self._await(_Answer(answer, self._jobs_by_row(live), 1))

  def _await(self, answer: _Answer) -> None:
    self._pending.append(answer)
    for job in answer.jobs:
      if job is not None:
        job.promised += max(1, answer.rounds)

  def _jobs_by_row(self, live: list[_Job]) -> list[_Job | None]:
    by_row = {job.row: job for job in live}
    return [by_row.get(i) for i in range(len(self._rows))]

  def _call(self, function: Any, jobs: list[_Job], *args: Any, **static: Any) -> Any:
    """Runs a function of the state; what it compiles first is timed apart."""
    head = (self.model, self.drafter, self.params, self._state)
    shapes = tuple(getattr(x, "shape", None) for x in args)
    key = (function.__name__, self.model, self.drafter, shapes, tuple(static.items()))
    key += (self.cfg.max_batch, self._num_slots)
    if key not in _COMPILED:
      begin = time.perf_counter()
      function.lower(*head, *args, **static).compile()
      _COMPILED.add(key)
      seconds = time.perf_counter() - begin
      self._clock += seconds
      self.compile_seconds += seconds
      for job in jobs:
        job.stats.compile_seconds += seconds
        job.started += seconds
    self._state, answer = function(*head, *args, **static)
    return answer

  def _read(self, num: int) -> None:
    """Waits for the `num` oldest answers and puts their events into the outbox."""
    for _ in range(num):
      answer, jobs, num_rounds = self._pending.popleft()
      tokens_BRA, logprobs_BRA, is_bad_B = jax.device_get(
        (answer.tokens_BRA, answer.logprobs_BRA, answer.is_bad_B)
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
        event = self._emit(job, tokens_BRA[b], logprobs_BRA[b], is_prefill=num_rounds == 0)
        if event is not None:
          self._outbox.append(event)
      if bad:
        text = "found non-finite logits, expected finite (broken weights?)"
        self._errors += [self._failed(job, text) for job in bad]
        raise self._errors.popleft()

  def _failed(self, job: _Job, text: str) -> "RequestError":
    self._state = rounds_lib.release(self._state, np.int32(job.row))
    self._outbox.append(self._finish(job, "cancelled", [], []))
    return RequestError(job.id, text)

  def _check_mask(self, mask_W: np.ndarray, job: _Job) -> None:
    if not mask_W.any():
      raise self._failed(job, "the constraint allows no token, expected at least one")

  def _emit(self, job: _Job, tokens_RA, logprobs_RA, *, is_prefill: bool) -> Event | None:
    is_token_RA = tokens_RA != NO_TOKEN
    counts = is_token_RA.sum(axis=1)
    if not is_prefill:
      job.stats.accepted += [int(n) for n in counts if n]
    tokens = [int(t) for t in tokens_RA[is_token_RA]]
    logprobs = [float(x) for x in logprobs_RA[is_token_RA]] if job.request.want_logprobs else []
    reason: FinishReason | None = None
    if job.request.constraint is not None:
      tokens, is_stopped = _follow(job.request.constraint, tokens, job.stops)
      logprobs = logprobs[: len(tokens)]
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
      return Event(job.id, tokens, logprobs)
    if job.request.constraint is not None:
      self._state = rounds_lib.release(self._state, np.int32(job.row))
    return self._finish(job, reason, tokens, logprobs)

  def _finish(self, job: _Job, reason: FinishReason, tokens, logprobs) -> Event:
    job.finish_reason = reason
    job.stats.new_tokens = len(job.tokens)
    if job.row >= 0:
      self._rows[job.row].job = None
    return Event(job.id, tokens, logprobs, reason, job.stats)


_COMPILED: set[Any] = set()


def _follow(
  constraint: TokenConstraint, tokens: list[int], stops: tuple[int, ...]
) -> tuple[list[int], bool]:
  """(tokens up to the one that ends the constraint, whether it has ended)."""
  for i, token in enumerate(tokens):
    constraint.consume(token)
    if constraint.is_stopped() or token in stops:
      return tokens[: i + 1], True
  return tokens, False
