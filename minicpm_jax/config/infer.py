"""Configuration of sampling and of the decode engine."""

import dataclasses
import json
import math
from typing import Any

from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """Order: repetition penalty, temperature, top_k, top_p, min_p. temperature 0 is greedy.

  A greedy choice heeds the penalty alone.
  """

  repetition_penalty: float = 1.0  # of tokens in prompt and output; 1 = off
  temperature: float = 0.0
  top_k: int = 0  # 0 = off
  top_p: float = 1.0
  min_p: float = 0.0
  max_new_tokens: int = 256
  seed: int = 0

  def __post_init__(self):
    require_hints(self, "sampling.")
    penalty = self.repetition_penalty
    require(0 < penalty < math.inf, "sampling.repetition_penalty", penalty, "a number > 0")
    temperature = self.temperature
    require(0 <= temperature < math.inf, "sampling.temperature", temperature, "a number >= 0")
    require(0 <= self.top_k < 2**31, "sampling.top_k", self.top_k, "0..2^31 - 1")
    require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")
    require(0 <= self.min_p <= 1, "sampling.min_p", self.min_p, "in [0, 1]")
    limit = self.max_new_tokens
    require(0 < limit <= 2**30, "sampling.max_new_tokens", limit, "1..2^30")
    require(-(2**63) <= self.seed < 2**63, "sampling.seed", self.seed, "a number of 64 bits")

  @classmethod
  def from_hf(cls, generation: str | dict[str, Any], **fields: Any) -> "SamplingConfig":
    """What a generation_config.json (or its text) asks for, as transformers' `generate` reads it.

    Without do_sample that is greedy, with the penalty. With it a top_k that the file does not name
    is transformers' 50, not off; -1 and 0 are off. Lengths and the other keys are not read.
    `fields` go over the file.
    """
    hf = json.loads(generation) if isinstance(generation, str) else generation
    hf = {key: value for key, value in hf.items() if value is not None}
    file = "generation_config.json"
    is_sampled = hf.get("do_sample", False)
    require(isinstance(is_sampled, bool), f"{file}: do_sample", is_sampled, "true or false")
    found = {"repetition_penalty": hf.get("repetition_penalty", 1.0)}
    if is_sampled:
      defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
      found |= {name: hf.get(name, default) for name, default in defaults.items()}
      found["top_k"] = 0 if found["top_k"] == -1 else found["top_k"]
    for name, value in found.items():
      is_number = isinstance(value, int if name == "top_k" else int | float)
      require(is_number and not isinstance(value, bool), f"{file}: {name}", value, "a number")
      found[name] = value if name == "top_k" else float(value)
    try:
      cls(**found)
    except ValueError as error:
      raise ValueError(f"{file}: {error}") from error
    return cls(**(found | fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes of the decode engine; all static, so one compile each (inference.md 1-3)."""

  capacity: int = 4096  # tokens of prompt and output together, a row
  max_batch: int = 1  # rows that decode together
  chunk_size: int = 512  # tokens of one prefill forward; the rest of a prompt goes in smaller ones
  rounds_per_dispatch: int = 1  # rounds between two answers to the host
  min_span: int = 256  # cache slots read at least; doubled until they hold the longest row
  shrinks: bool = False  # rounds of the live rows alone: programs of 1, 2, 4, ... rows
  min_prefix: int = 32  # tokens; shorter common prefixes are not copied. -1 = no prompt cache

  def __post_init__(self):
    require_hints(self, "engine.")
    require(self.capacity >= 2, "engine.capacity", self.capacity, "tokens >= 2")
    require(self.max_batch >= 1, "engine.max_batch", self.max_batch, "rows >= 1")
    require(self.chunk_size >= 16, "engine.chunk_size", self.chunk_size, "tokens >= 16")
    rounds = self.rounds_per_dispatch
    require(1 <= rounds <= 64, "engine.rounds_per_dispatch", rounds, "1..64")
    require(self.min_span >= 16, "engine.min_span", self.min_span, "slots >= 16")
    require(self.min_prefix >= -1, "engine.min_prefix", self.min_prefix, "-1 or tokens >= 0")
