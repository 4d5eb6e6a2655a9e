"""Training input configuration: sources, phases, packing (data.md section 8)."""

import dataclasses
from typing import Literal

from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """One tokenised source: a folder that `experiments/prepare_data.py` wrote."""

  name: str
  path: str  # folder with NAME-00000-of-0000N.arrayrecord and index.json

  def __post_init__(self):
    require_hints(self, "source.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
  """From `start_step` on, rows are drawn from the sources with these weights."""

  name: str = "stable"
  start_step: int = 0
  weights: tuple[tuple[str, float], ...] = ()  # (source name, share of rows)
  replace: tuple[str, float] | None = None  # source that takes this share of all rows' places

  def __post_init__(self):
    require_hints(self, "phase.")
    require(self.start_step >= 0, "phase.start_step", self.start_step, ">= 0")
    require(len(self.weights) > 0, "phase.weights", self.weights, "at least one (source, weight)")
    for name, weight in self.weights:
      require(weight >= 0, f"phase.weights[{name}]", weight, ">= 0")
    total = sum(w for _, w in self.weights)
    require(total > 0, "phase.weights", self.weights, "a positive sum")
    if self.replace is not None:
      require(0 < self.replace[1] <= 1, "phase.replace", self.replace, "a share in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Sources are cut or packed into rows of `seq_len` tokens; `batch_size` rows a step, global."""

  sources: tuple[SourceConfig, ...] = ()
  phases: tuple[PhaseConfig, ...] = ()
  seq_len: int = 4096  # tokens a row
  batch_size: int = 8  # rows a step over all hosts and accumulation steps
  packing: Literal["concat", "best_fit"] = "concat"
  num_packing_bins: int = 16  # best_fit
  align: int = 1  # documents padded to a multiple (64 for sparse training)
  long_documents: Literal["split", "error"] = "split"  # best_fit: documents longer than a row
  shuffle: bool = True
  seed: int = 0
  num_threads: int = 2  # read threads
  num_workers: int = 0  # processes before packing; 0 = in process
  prefetch: int = 2  # batches

  def __post_init__(self):
    require_hints(self, "data.")
    for name in ("seed", "num_threads", "num_workers", "prefetch"):
      require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "an integer >= 0")
    for name in ("seq_len", "batch_size", "align", "num_packing_bins"):
      require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "an integer > 0")
    names = [s.name for s in self.sources]
    require(len(set(names)) == len(names), "data.sources", names, "unique names")
    for phase in self.phases:
      for name, _ in phase.weights:
        require(name in names, f"data.phases[{phase.name}].weights", name, f"one of {names}")
      if phase.replace is not None:
        name = phase.replace[0]
        require(name in names, f"data.phases[{phase.name}].replace", name, f"one of {names}")
    starts = [p.start_step for p in self.phases]
    if starts:
      ok = starts[0] == 0 and all(a < b for a, b in zip(starts, starts[1:], strict=False))
      require(ok, "data.phases", starts, "start_step 0 first, then strictly increasing")
    require(self.seq_len % self.align == 0, "data.seq_len", self.seq_len, "a multiple of align")
