"""One training run: model, optimiser, data, mesh, checkpoints, logging."""

import dataclasses

from minicpm_jax.config.data import DataConfig
from minicpm_jax.config.mesh import MeshConfig
from minicpm_jax.config.model import ModelConfig
from minicpm_jax.config.optim import OptimConfig
from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """What is saved and what is kept under `workdir/checkpoints`."""

  every_steps: int = 1000  # 0 = only the last step (and on SIGTERM, Ctrl-C)
  keep_last: int = 3  # newest checkpoints kept
  keep_steps: tuple[int, ...] = ()  # always kept (e.g. the last stable step)
  keep_every_tokens: int = 0  # the first checkpoint past each multiple is kept; 0 = off
  is_async: bool = True

  def __post_init__(self):
    require_hints(self, "checkpoint.")
    require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, ">= 0")
    require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, ">= 1")
    require(
      self.keep_every_tokens >= 0, "checkpoint.keep_every_tokens", self.keep_every_tokens, ">= 0"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Everything that determines a pretraining run; `workdir/config.py` rebuilds it."""

  name: str = "run"
  model: ModelConfig
  optim: OptimConfig = OptimConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  num_steps: int = 1000
  seed: int = 0  # initialisation; data order has data.seed
  grad_accum: int = 1  # micro-batches a step; batch_size must divide
  z_loss: float = 0.0  # weight of mean(logsumexp^2)
  log_every: int = 10  # steps
  source_losses: bool = False  # also log the training loss of every source, source_loss/NAME
  eval_every: int = 0  # steps; 0 = only at the end, when there is an eval source
  eval_batches: int = 8  # of every eval source; 0 = all of it
  eval_sources: tuple[str, ...] = ()  # names of data.sources that are only evaluated
  profile_steps: tuple[int, int] | None = None  # [first, last) step of a jax.profiler trace
  init_from: str | None = None  # weights only: HF folder, GGUF or Orbax workdir[@step]
  keep_moments: bool = False  # with init_from of a run: its Adam moments too (the step is 0)
  branch_from: str | None = None  # full state (Adam, data position): Orbax workdir@step
  compilation_cache: str | None = None  # folder; None = off

  def __post_init__(self):
    require_hints(self, "")
    require(self.num_steps > 0, "num_steps", self.num_steps, "> 0")
    require(self.grad_accum > 0, "grad_accum", self.grad_accum, "> 0")
    require(
      self.data.batch_size % self.grad_accum == 0,
      "grad_accum",
      self.grad_accum,
      f"a divisor of data.batch_size {self.data.batch_size}",
    )
    sparse = self.model.sparse
    if sparse is not None and self.data.seq_len >= sparse.dense_len:
      require(
        self.data.align % sparse.alignment == 0,
        "data.align",
        self.data.align,
        f"a multiple of {sparse.alignment} (model.sparse: documents start on its grid of blocks)",
      )
    require(self.log_every > 0, "log_every", self.log_every, "> 0")
    for name in ("z_loss", "eval_every", "eval_batches"):
      require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    names = [s.name for s in self.data.sources]
    for name in self.eval_sources:
      require(name in names, "eval_sources", name, f"one of {names}")
    require(
      not self.keep_moments or self.init_from is not None,
      "keep_moments",
      self.keep_moments,
      "init_from a run (branch_from keeps everything)",
    )
    require(
      self.init_from is None or self.branch_from is None,
      "branch_from",
      self.branch_from,
      "only one of init_from and branch_from",
    )
