"""Optimiser and learning-rate schedule configuration (training.md sections 1 and 4)."""

import dataclasses
from typing import Literal

from minicpm_jax.config.model import DTypeName
from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """Learning rate as a function of the step; all lengths in optimiser steps.

  wsd: linear warm-up, flat until `warmup_steps + stable_steps`, then `decay_steps` of decay.
  cosine: half cosine from peak to `min_ratio` over `total_steps`; cosine_loop repeats it.
  """

  kind: Literal["wsd", "cosine", "cosine_loop", "constant"] = "wsd"
  warmup_steps: int = 100
  stable_steps: int = 0
  decay_steps: int = 0
  decay_shape: Literal["exp_half_life", "exp_to", "linear_to", "one_minus_sqrt"] = "exp_to"
  half_life_steps: int = 5000  # exp_half_life: h (MiniCPM section 6.2: 5000 steps)
  min_ratio: float = 0.1  # end of decay / peak (exp_to, linear_to, one_minus_sqrt, cosine)

  def __post_init__(self):
    require_hints(self, "schedule.")
    for name in ("warmup_steps", "stable_steps", "decay_steps"):
      require(getattr(self, name) >= 0, f"schedule.{name}", getattr(self, name), "steps >= 0")
    require(self.half_life_steps > 0, "schedule.half_life_steps", self.half_life_steps, "> 0")
    require(0 <= self.min_ratio <= 1, "schedule.min_ratio", self.min_ratio, "a ratio in [0, 1]")
    if self.decay_shape == "exp_to":
      require(self.min_ratio > 0, "schedule.min_ratio", self.min_ratio, "> 0 for exp_to")

  @property
  def total_steps(self) -> int:
    return self.warmup_steps + self.stable_steps + self.decay_steps

  @property
  def decay_start(self) -> int:
    return self.warmup_steps + self.stable_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """AdamW with the muP rules. Decay, betas and clip are a public run script's, not the paper's."""

  peak_lr: float = 0.01  # base lr; matrices get peak_lr / width_ratio under muP
  schedule: ScheduleConfig = ScheduleConfig()
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_coupling: Literal["lr", "independent"] = "lr"  # is the decay multiplied by the lr?
  clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
  mup: bool = True  # per-leaf lr / width_ratio for matrices (by role)
  moment_dtype: DTypeName = "f32"  # storage of Adam's first moment
  frozen: tuple[str, ...] = ()  # regexes of parameter paths that are not updated

  def __post_init__(self):
    require_hints(self, "optim.")
    for name in ("peak_lr", "eps"):
      require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "> 0")
    for name in ("b1", "b2"):
      require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
    for name in ("weight_decay", "clip_norm"):
      require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), ">= 0")
