"""Generation configuration of the plain decode loop."""

import dataclasses

from minicpm_jax.config.validate import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """Filters apply in this order: temperature, top_k, top_p, min_p. temperature 0 is greedy."""

  temperature: float = 0.0
  top_k: int = 0  # 0 = off
  top_p: float = 1.0
  min_p: float = 0.0
  max_new_tokens: int = 256
  seed: int = 0

  def __post_init__(self):
    require(self.temperature >= 0, "sampling.temperature", self.temperature, ">= 0")
    require(self.top_k >= 0, "sampling.top_k", self.top_k, ">= 0")
    require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")
    require(0 <= self.min_p < 1, "sampling.min_p", self.min_p, "in [0, 1)")
    require(self.max_new_tokens > 0, "sampling.max_new_tokens", self.max_new_tokens, "> 0")
