"""Rows of the engine's cache: which request goes where, and what it sets there (inference.md 2-3).

Functions of host data alone: a `Job` is a request on its way, a `Row` what the host knows of a row.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minicpm_jax import config
from minicpm_jax.infer import answers, requests
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.infer import state as state_lib
from minicpm_jax.infer import tree as tree_lib

SLOTS = 1024  # XLA's GPU products pad, which copies, values of another number of slots
SMALLEST_CHUNK = 16


@dataclasses.dataclass
class Job:
  """A request on its way."""

  id: int
  request: requests.Request
  stops: tuple[int, ...]
  stats: requests.Stats
  row: int = -1
  num_cached: int = 0  # prompt tokens in the cache
  tokens: list[int] = dataclasses.field(default_factory=list)
  finish_reason: requests.FinishReason | None = None
  started: float = 0.0
  limit: int = 0
  promised: int = 0  # tokens that rounds under way will bring at least

  @property
  def is_filling(self) -> bool:
    return self.num_cached < len(self.request.prompt)

  @property
  def rope_length(self) -> int:
    """Length that LongRoPE and dynamic NTK scale for."""
    return len(self.request.prompt) + self.request.sampling.max_new_tokens


@dataclasses.dataclass
class Row:
  """What the host knows of a row of the cache."""

  job: Job | None = None
  held: list[int] = dataclasses.field(default_factory=list)  # tokens whose keys are in the cache
  kind: Any = None  # rotation and dense/sparse mode that these keys were made in

  @property
  def is_sparse(self) -> bool:
    return self.kind is not None and self.kind[1]


def kind_of(cfg: config.ModelConfig, job: Job) -> Any:
  """Keys are reused only where they were made with the same rotation and attention."""
  total = len(job.request.prompt)
  rotation = None
  if cfg.rope.kind == "longrope":
    rotation = job.rope_length > cfg.rope.original_max_position
  elif cfg.rope.kind == "dynamic":
    rotation = max(job.rope_length, cfg.max_position)
  return rotation, cfg.sparse is not None and total >= cfg.sparse.dense_len


def window(rows: Sequence[int], most: int) -> tuple[int, int]:
  """(first, number) of the rows that rounds work on: 1, 2, 4, ... with all `rows` among them."""
  first, size = min(rows), 1
  while size < max(rows) - first + 1:
    size *= 2
  size = min(size, most)
  return min(first, most - size), size


def window_sizes(most: int) -> list[int]:
  """Numbers of rows that `window` may give."""
  return sorted({window([0, i], most)[1] for i in range(most)})


def choose_row(
  rows: Sequence[Row],
  job: Job,
  kind: Any,
  min_prefix: int,
  can_reuse: bool,
  is_close: bool = False,
) -> tuple[int, int, int]:
  """(row, row to continue, tokens of it). One token less than the common prefix is reused: the
  state of a draft at the last one depends on the token that follows.

  kind: `kind_of` the job; can_reuse: False where a draft cannot go on from a copied row; is_close:
  of rows that serve as well the one beside those at work (`window`).
  """
  prompt = job.request.prompt
  free = [i for i, row in enumerate(rows) if row.job is None]

  def common(index: int) -> int:
    row = rows[index]
    if min_prefix < 0 or row.kind != kind or not can_reuse:
      return 0
    pairs = zip(row.held, prompt, strict=False)
    num = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row.held), len(prompt)))
    return max(0, num - 1)

  def cost(index: int) -> tuple[int, int]:
    busy = [i for i, row in enumerate(rows) if row.job is not None]
    size = window([*busy, index], len(rows))[1] if is_close else 0
    return size, len(rows[index].held)

  own = min(free, key=lambda i: (-common(i), *cost(i)))
  best = max(range(len(rows)), key=common)
  if common(best) >= common(own) + max(1, min_prefix):
    own = min(free, key=cost)
    return own, best, common(best)
  num = common(own)
  return own, own, num if num >= min_prefix else 0


def is_bare(request: requests.Request) -> bool:
  """Greedy without penalty, and the likeliest tokens are not wanted: `rounds.Known`."""
  sampling = request.sampling
  is_greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
  return is_greedy and request.num_top_logprobs == 0


def settings(job: Job, vocab_size: int, num_before: int = 0) -> state_lib.RowSettings:
  """What the request sets in its row; `num_before` prefix tokens stand in front of its prompt."""
  sampling = job.request.sampling
  stops_E = np.full(state_lib.STOP_SLOTS, state_lib.NO_TOKEN, np.int32)
  stops_E[: len(job.stops)] = job.stops
  seen_V = np.zeros(vocab_size, bool)
  seen_V[job.request.prompt[num_before:]] = True
  one = lambda value, dtype: np.full((1,), value, dtype)  # noqa: E731
  return state_lib.RowSettings(
    start=np.int32(job.num_cached),
    limit=np.int32(job.limit),
    stops_E=stops_E,
    rope_length=np.int32(job.rope_length),
    seen_V=seen_V,
    wants_logprobs=np.bool_(job.request.want_logprobs),
    wants_top=np.bool_(job.request.num_top_logprobs > 0),
    seed=np.int64(sampling.seed),
    sampling=sampling_lib.SamplingState(
      key_B=None,
      temperature_B=one(sampling.temperature, np.float32),
      top_k_B=one(sampling.top_k, np.int32),
      top_p_B=one(sampling.top_p, np.float32),
      min_p_B=one(sampling.min_p, np.float32),
      penalty_B=one(sampling.repetition_penalty, np.float32),
    ),
  )


def span_of(num_slots: int, smallest: int, most: int) -> int:
  """Slots that a forward reads: a doubling of the smallest span that holds `num_slots`."""
  span = smallest
  while span < num_slots:
    span *= 2
  return min(span, most)


def slots_of(least: int, unit: int, backend: str) -> int:
  """Slots of a cache: whole units, and on a GPU whole `SLOTS`."""
  if backend == "gpu":
    unit = math.lcm(unit, SLOTS)
  return -(-least // unit) * unit


def chunk_sizes(largest: int) -> list[int]:
  """Tokens of a prefill forward: the largest, quarters of it, and the smallest."""
  sizes = []
  while largest >= SMALLEST_CHUNK:
    sizes.append(largest)
    largest //= 4
  return list(dict.fromkeys((*sizes, SMALLEST_CHUNK)))


def chunk_of(start: int, rest: int, largest: int, num_slots: int) -> int:
  """The largest chunk while the prompt fills it, then the smallest that holds the rest."""
  fitting = [s for s in chunk_sizes(largest) if start + s <= num_slots]
  holding = [s for s in fitting if s >= rest]
  return min(holding) if holding else max(fitting)


def forced_tokens(job: Job, sparse: config.SparseAttentionConfig | None) -> list[int]:
  """What the constraint forces, up to the request's end and to where attention turns sparse."""
  num = job.limit - len(job.tokens)
  length = len(job.request.prompt) + len(job.tokens) - 1  # the last token is not in the cache
  if sparse is not None and length + 1 < sparse.dense_len:
    num = min(num, sparse.dense_len - 1 - length)  # one mode for the whole chunk
  forced = job.request.constraint.forced_tokens()[:num]
  ends = [i for i, token in enumerate(forced) if token in job.stops]
  return forced[: ends[0] + 1] if ends else forced


# --- Rounds under way ---------------------------------------------------------------------------


class Answer(NamedTuple):
  """An answer under way: what it holds of which request of each row."""

  answer: answers.Answer
  jobs: list[Job | None]
  rounds: int  # 0 = the first token, out of the prefill


Blaming = Callable[[Job], contextlib.AbstractContextManager[None]]


def root_masks(
  live: Sequence[Job], first: int, num_rows: int, num_words: int, blaming: Blaming
) -> np.ndarray:
  """int32 [B, W]: bits of the tokens that may follow the root, of num_rows rows from `first` on."""
  mask_BW = np.full((num_rows, num_words), -1, np.int32)
  for job in live:
    if job.request.constraint is not None:
      with blaming(job):
        job.request.constraint.fill_mask(mask_BW[job.row - first])
  return mask_BW


def node_masks(
  live: Sequence[Job], tree: Any, first: int, num_words: int, blaming: Blaming
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [B, P] without what constraints forbid, bits [B, P, W] of what may follow a node), of
  the tree's rows, the first of which is row `first`."""
  tok_BP, parent_BP = np.array(tree.tok_BP), np.asarray(tree.parent_BP)
  mask_BPW = np.full((*tok_BP.shape, num_words), -1, np.int32)
  for job in live:
    if (constraint := job.request.constraint) is not None:
      b = job.row - first
      tree_P = (tok_BP[b], parent_BP[b], mask_BPW[b])
      with blaming(job):
        tok_BP[b] = tree_lib.walk(constraint, *tree_P, fast_forward=job.request.fast_forward)
  return tok_BP, mask_BPW


def said(
  job: Job, tokens_RA: np.ndarray, logprobs_RA: np.ndarray, tops_RAK: Sequence[np.ndarray]
) -> tuple[list[int], list[int], list[float], list[requests.Top]]:
  """(tokens of each round, all tokens, and where asked for their logprobs, the likeliest ones)."""
  rows = tokens_RA.tolist()  # a few numbers a row and round: numpy would take ten times as long
  tokens = [t for row in rows for t in row if t != state_lib.NO_TOKEN]
  counts = [len(row) - row.count(state_lib.NO_TOKEN) for row in rows]
  is_token_RA = tokens_RA != state_lib.NO_TOKEN if job.request.want_logprobs else None
  logprobs = [] if is_token_RA is None else logprobs_RA[is_token_RA].tolist()
  tops: list[requests.Top] = []
  if num_top := job.request.num_top_logprobs:
    ids_NK, best_NK = (x[is_token_RA][:, :num_top].tolist() for x in tops_RAK)
    tops = [list(zip(*pair, strict=True)) for pair in zip(ids_NK, best_NK, strict=True)]
  return counts, tokens, logprobs, tops
