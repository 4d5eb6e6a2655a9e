"""What goes into the engine and what comes out of it: requests, events, statistics."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from minicpm_jax import config
from minicpm_jax.config import validate
from minicpm_jax.models import cache
from minicpm_jax.quant import prefix

Top = Sequence[tuple[int, float]]  # the likeliest tokens of a place and their log-probabilities
MAX_TOP = 20
FinishReason = Literal["stop", "length", "cancelled"]


@runtime_checkable
class TokenConstraint(Protocol):
  """What may be said next; follows one output (infer/constrained.py has llguidance's).

  For `Request.fast_forward` it also has `forced_tokens() -> list[int]`, the only way to go on.
  """

  def fill_mask(self, row: np.ndarray) -> None:
    """Writes int32 [ceil(V / 32)]: bit i % 32 of word i // 32 is 1 where token i may follow."""

  def consume(self, token: int) -> bool:
    """Goes on behind a token; False, and nothing changes, where it is not allowed."""

  def rollback(self, num: int) -> None:
    """Forgets the last `num` tokens."""

  def is_accepting(self) -> bool: ...

  def is_stopped(self) -> bool:
    """Nothing may follow."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt. stop_ids are added to the engine's; `constraint` belongs to this request alone.

  fast_forward: tokens that the constraint forces are appended as one chunk, without sampling. The
  law changes where several cuts of the forced text into tokens are allowed, so it is off unless
  asked for (inference.md 16).
  """

  prompt: Sequence[int]
  sampling: config.SamplingConfig = config.SamplingConfig()
  stop_ids: Sequence[int] = ()
  constraint: TokenConstraint | None = None
  want_logprobs: bool = False
  num_top_logprobs: int = 0  # with want_logprobs, at most MAX_TOP
  fast_forward: bool = False


@dataclasses.dataclass
class Stats:
  """Counts and times of one request; compilation is apart and never inside a rate."""

  prompt_tokens: int = 0
  cached_tokens: int = 0  # of the prompt, taken from an earlier request
  new_tokens: int = 0
  forced_tokens: int = 0  # of the new ones, appended without sampling
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0  # from the first token to the last; other rows decode meanwhile
  compile_seconds: float = 0.0
  accepted: list[int] = dataclasses.field(default_factory=list)  # tokens of every round

  @property
  def mean_accepted(self) -> float:
    """Mean accept length: tokens a round, the first token (of the prefill) excluded."""
    return sum(self.accepted) / len(self.accepted) if self.accepted else 0.0


@dataclasses.dataclass(frozen=True)
class Event:
  """Tokens of one request out of one step. logprobs: of the bare model, where asked for."""

  id: int
  tokens: list[int]
  logprobs: list[float]
  finish_reason: FinishReason | None = None
  stats: Stats | None = None  # with the last event
  top_logprobs: list[Top] = dataclasses.field(default_factory=list)  # where asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """New tokens of every prompt, the stop token included; log-probabilities of the bare model."""

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[FinishReason]
  stats: list[Stats] = dataclasses.field(default_factory=list)
  top_logprobs: list[list[Top]] = dataclasses.field(default_factory=list)


class RequestError(ValueError):
  """One request cannot go on; `id` says which. It has been ended."""

  def __init__(self, uid: int, text: str):
    super().__init__(f"request {uid}: {text}")
    self.id = uid


def check_prefix(cfg: config.ModelConfig, drafter: Any, before: prefix.Prefix, room: int) -> None:
  """ValueError where requests cannot start with the prefix's stored keys and values."""
  prefix.check(before, cfg.num_layers, cache.widths(cfg))
  if drafter.num_nodes > 1:
    raise ValueError("before: found a drafter, expected plain decoding behind prefix tokens")
  if cfg.rope.kind in ("dynamic", "longrope") or cfg.sparse is not None:
    raise ValueError(
      f"before: found rope.kind {cfg.rope.kind!r} and sparse {cfg.sparse is not None}, expected "
      "keys that do not change with the length, and dense attention (sparse=None)"
    )
  if before.length >= room:
    raise ValueError(f"before: found {before.length} tokens, expected less than capacity {room}")


def token_ids(name: str, ids: Any) -> list[int]:
  """A list, tuple, iterator or array of ids as Python's integers; ValueError for anything else."""
  try:
    ids_N = np.asarray(ids if hasattr(ids, "shape") else list(ids))
  except (TypeError, ValueError):
    ids_N = None
  if ids_N is not None and not ids_N.size and ids_N.ndim == 1:
    return []
  if ids_N is None or ids_N.ndim != 1 or not np.issubdtype(ids_N.dtype, np.integer):
    raise ValueError(f"{name}: found {ids!r:.80}, expected a list of token ids")
  return ids_N.tolist()


def check_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> None:
  """ValueError for an empty prompt and for ids outside the vocabulary."""
  if not len(prompt):
    raise ValueError(f"{name}: found no token, expected at least one (a BOS will do)")
  low, high = min(prompt), max(prompt)
  if low < 0 or high >= vocab_size:
    found = low if low < 0 else high
    raise ValueError(f"{name}: found token {found}, expected 0..{vocab_size - 1}")


def check_stops(stops: Sequence[int], most: int, vocab_size: int) -> None:
  """ValueError for more stop ids than a row has room for, and for ids that no token can be."""
  if len(stops) > most:
    raise ValueError(f"stop_ids: found {len(stops)}, expected at most {most}")
  for token in stops:
    if not 0 <= token < vocab_size:
      raise ValueError(f"stop_ids: found {token}, expected tokens of 0..{vocab_size - 1}")


def check_options(request: Request) -> None:
  """ValueError for options out of range and those that exclude each other."""
  sampling, num_top = request.sampling, request.num_top_logprobs
  is_one = isinstance(sampling, config.SamplingConfig)
  validate.require(is_one, "sampling", sampling, "a SamplingConfig")
  for name in ("want_logprobs", "fast_forward"):
    value = getattr(request, name)
    validate.require(isinstance(value, bool | np.bool_), name, value, "True or False")
  is_count = isinstance(num_top, numbers.Integral) and not isinstance(num_top, bool)
  validate.require(is_count, "num_top_logprobs", num_top, "an integer")
  is_known = request.constraint is None or isinstance(request.constraint, TokenConstraint)
  validate.require(is_known, "constraint", request.constraint, "a TokenConstraint")
  if not 0 <= request.num_top_logprobs <= (MAX_TOP if request.want_logprobs else 0):
    raise ValueError(
      f"num_top_logprobs: found {request.num_top_logprobs}, expected 0..{MAX_TOP}, and 0 without "
      "want_logprobs"
    )
  if request.fast_forward and not hasattr(request.constraint, "forced_tokens"):
    raise ValueError(
      "fast_forward: found no constraint that knows what it forces, expected one with "
      "forced_tokens()"
    )
  if request.fast_forward and request.want_logprobs:
    raise ValueError("fast_forward: found with want_logprobs, but forced tokens are not measured")


def follow(
  constraint: TokenConstraint, tokens: list[int], stops: tuple[int, ...]
) -> tuple[list[int], bool]:
  """(tokens up to the one that ends the constraint, whether it has ended)."""
  for i, token in enumerate(tokens):
    constraint.consume(token)
    if constraint.is_stopped() or token in stops:
      return tokens[: i + 1], True
  return tokens, False
