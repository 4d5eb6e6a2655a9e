"""What goes into the engine and what comes out of it: requests, events, statistics."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from minicpm_jax import config
from minicpm_jax.models import cache
from minicpm_jax.quant import prefix

FinishReason = Literal["stop", "length", "cancelled"]


@runtime_checkable
class TokenConstraint(Protocol):
  """What may be said next; follows one output (infer/constrained.py has llguidance's)."""

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
  """One prompt. stop_ids are added to the engine's; `constraint` belongs to this request alone."""

  prompt: Sequence[int]
  sampling: config.SamplingConfig = config.SamplingConfig()
  stop_ids: Sequence[int] = ()
  constraint: TokenConstraint | None = None
  want_logprobs: bool = False


@dataclasses.dataclass
class Stats:
  """Counts and times of one request; compilation is apart and never inside a rate."""

  prompt_tokens: int = 0
  cached_tokens: int = 0  # of the prompt, taken from an earlier request
  new_tokens: int = 0
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """New tokens of every prompt, the stop token included; log-probabilities of the bare model."""

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[FinishReason]
  stats: list[Stats] = dataclasses.field(default_factory=list)


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


def check_prompt(name: str, prompt: Sequence[int], vocab_size: int) -> None:
  """ValueError for an empty prompt and for ids outside the vocabulary."""
  if not len(prompt):
    raise ValueError(f"{name}: found no token, expected at least one (a BOS will do)")
  low, high = min(prompt), max(prompt)
  if low < 0 or high >= vocab_size:
    found = low if low < 0 else high
    raise ValueError(f"{name}: found token {found}, expected 0..{vocab_size - 1}")
