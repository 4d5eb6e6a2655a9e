"""What is run: run descriptions, a family of small models, grids, trunks with branches.

A plan is a list of `RunSpec`. Runs that differ only in learning rate, schedule, muP constants,
seed or data end up in one compiled program (`run.Runner`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from minicpm_jax import config
from minicpm_jax.config.validate import require, require_hints
from minicpm_jax.tunnel import corpus as corpus_lib

Number = float | int
Mode = Literal["matrix", "vector", "sp"]
MODES: tuple[Mode, ...] = ("matrix", "vector", "sp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
  """One small run; equal specs give equal results."""

  name: str
  model: config.ModelConfig
  optim: config.OptimConfig
  num_steps: int
  batch_size: int = 16  # rows a step
  seq_len: int = 64  # tokens a row
  seed: int = 0  # initialisation
  data_seed: int = 0
  phases: tuple[config.PhaseConfig, ...] = dataclasses.field(
    default_factory=corpus_lib.default_phases
  )
  branch_from: tuple[str, int] | None = None  # (name of another run, one of its save_steps)
  eval_steps: tuple[int, ...] = ()  # the last step is always evaluated
  save_steps: tuple[int, ...] = ()  # steps whose whole state is kept

  def __post_init__(self):
    require_hints(self, "", least=0)
    require(bool(self.name) and "/" not in self.name, "name", self.name, "a file name")
    for name in ("num_steps", "batch_size", "seq_len"):
      require(getattr(self, name) > 0, name, getattr(self, name), "an integer > 0")
    for name in ("eval_steps", "save_steps"):
      steps = getattr(self, name)
      ok = all(self.first_step < s <= self.num_steps for s in steps)
      require(ok, name, steps, f"steps in ({self.first_step}, {self.num_steps}]")
    require(bool(self.phases), "phases", self.phases, "at least one phase")

  @property
  def first_step(self) -> int:
    return 0 if self.branch_from is None else self.branch_from[1]

  @property
  def tokens(self) -> int:
    """Tokens seen at the end, those of the trunk included."""
    return self.num_steps * self.batch_size * self.seq_len

  def weights_at(self, step: int) -> tuple[tuple[str, float], ...]:
    """The mixture of the update that follows `step`."""
    return [p for p in self.phases if p.start_step <= step][-1].weights


# --- Models --------------------------------------------------------------------------------------


def small_model(
  width: int,
  mode: Mode = "matrix",
  *,
  num_layers: int = 2,
  head_dim: int = 16,
  vocab_size: int = 128,
  max_position: int = 64,
  base_width: int = 32,
  scale_emb: Number = 12.0,
  scale_depth: Number = 1.4,
  init_std: float = 0.1,
) -> config.ModelConfig:
  """The family of training.md 13.1: MHA, F = 2.5 D, tied; `sp` has all multipliers 1, std 0.02."""
  require(width % head_dim == 0, "width", width, f"a multiple of head_dim {head_dim}")
  require(mode in MODES, "mode", mode, f"one of {MODES}")
  heads = width // head_dim
  mup: dict[str, Any] = {"init_std": 0.02}
  if mode != "sp":
    mup = {
      "init_std": init_std,
      "scale_emb": scale_emb,
      "scale_depth": scale_depth,
      "dim_model_base": base_width,
      "mup_embedding": mode,
    }
  return config.ModelConfig(
    name=f"w{width}_{mode}",
    vocab_size=vocab_size,
    model_dim=width,
    mlp_dim=width * 5 // 2,
    num_layers=num_layers,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    max_position=max_position,
    **mup,
  )


def num_params(model: config.ModelConfig) -> int:
  """Non-embedding parameters N of a dense model (norms included, a tied head not)."""
  attention = 2 * model.model_dim * model.head_dim * (model.num_heads + model.num_kv_heads)
  layer = attention + 3 * model.model_dim * model.mlp_dim + 2 * model.model_dim
  return model.num_layers * layer + model.model_dim


# --- Grids ---------------------------------------------------------------------------------------


def grid(
  make: Callable[..., RunSpec], axes: Mapping[str, Sequence[Any]], **fixed: Any
) -> list[RunSpec]:
  """`make(**point, **fixed)` at every point of the product of `axes`; names must differ."""
  empty = [name for name, values in axes.items() if not len(values)]
  require(not empty, "axes", empty, "at least one value on every axis")
  points = itertools.product(*axes.values())
  specs = [make(**dict(zip(axes, point, strict=True)), **fixed) for point in points]
  names = [spec.name for spec in specs]
  twice = sorted({name for name in names if names.count(name) > 1})
  require(not twice, "name", twice, "a name for every point of the grid")
  return specs


def log_grid(center: Number, factor: Number, count: int) -> tuple[float, ...]:
  """`count` values around `center`, each `factor` times the one before."""
  require(center > 0 and factor > 1, "center, factor", (center, factor), "center > 0, factor > 1")
  require(count >= 1, "count", count, "at least 1")
  return tuple(center * factor ** (i - (count - 1) / 2) for i in range(count))


# --- WSD -----------------------------------------------------------------------------------------


def schedule(
  num_steps: int,
  *,
  decay_share: Number = 0.1,
  warmup_steps: int = 20,
  shape: str = "exp_to",
  min_ratio: Number = 0.03,
) -> config.ScheduleConfig:
  """WSD whose decay takes `decay_share` of `num_steps` (at least one step; 0: constant)."""
  require(0 <= decay_share < 1, "decay_share", decay_share, "in [0, 1)")
  decay = max(1, round(decay_share * num_steps)) if decay_share else 0
  warmup = min(warmup_steps, num_steps - decay)
  return config.ScheduleConfig(
    kind="wsd",
    warmup_steps=warmup,
    stable_steps=num_steps - warmup - decay,
    decay_steps=decay,
    decay_shape=shape,
    min_ratio=min_ratio,
  )


def trunk_and_branches(
  trunk: RunSpec, branches: Mapping[str, config.ScheduleConfig]
) -> list[RunSpec]:
  """The stable run and its decays: WSD at several horizons for the price of one long run.

  `branches` names a WSD schedule each; the run starts from the trunk's checkpoint at its decay
  start and ends with the decay. `trunk.num_steps` grows to the latest start, and its saves to all.
  """
  warmup = trunk.optim.schedule.warmup_steps
  specs, starts = [], set(trunk.save_steps)
  for name, sched in branches.items():
    require(
      sched.kind == "wsd" and sched.warmup_steps == warmup and sched.decay_steps > 0,
      f"branches[{name}]",
      sched,
      f"WSD with a decay and the trunk's {warmup} warm-up steps",
    )
    starts.add(sched.decay_start)
    specs.append(
      dataclasses.replace(
        trunk,
        name=f"{trunk.name}-{name}",
        optim=dataclasses.replace(trunk.optim, schedule=sched),
        num_steps=sched.total_steps,
        branch_from=(trunk.name, sched.decay_start),
        eval_steps=(),
        save_steps=(),
      )
    )
  num_steps = max([trunk.num_steps, *starts])
  stable = dataclasses.replace(
    trunk.optim.schedule, kind="wsd", stable_steps=num_steps - warmup, decay_steps=0
  )
  whole = dataclasses.replace(
    trunk,
    num_steps=num_steps,
    optim=dataclasses.replace(trunk.optim, schedule=stable),
    save_steps=tuple(sorted(starts)),
  )
  return [whole, *specs]


def steps_for(tokens: Number, *, batch_size: int, seq_len: int) -> int:
  """Whole steps that see at least `tokens` tokens."""
  for name, value in (("tokens", tokens), ("batch_size", batch_size), ("seq_len", seq_len)):
    require(0 < value < math.inf, name, value, "a number > 0")
  return math.ceil(tokens / (batch_size * seq_len))


# --- The large run -------------------------------------------------------------------------------


def large_run(
  base: config.TrainConfig,
  *,
  tokens: Number,
  peak_lr: Number,
  batch_tokens: Number,
  decay_share: Number = 0.1,
  warmup_steps: int | None = None,
  constants: Mapping[str, Number] | None = None,
) -> config.TrainConfig:
  """`base` (model, mixture, mesh) with what the tunnel found: rate, batch, WSD length, constants.

  The batch is rounded to a multiple of 16 rows. `constants` are fields of the model (init_std,
  scale_emb, scale_depth, dim_model_base). Phases after the first start with the decay.
  """
  require(tokens > 0, "tokens", tokens, "> 0")
  require(0 < decay_share < 1, "decay_share", decay_share, "in (0, 1)")
  allowed = ("init_std", "scale_emb", "scale_depth", "dim_model_base")
  unknown = sorted(set(constants or {}) - set(allowed))
  require(not unknown, "constants", unknown, f"some of {allowed}")
  data, old = base.data, base.optim.schedule
  rows = max(1, round(batch_tokens / data.seq_len / 16)) * 16
  num_steps = steps_for(tokens, batch_size=rows, seq_len=data.seq_len)
  warmup = min(old.warmup_steps if warmup_steps is None else warmup_steps, num_steps // 10)
  decay = max(1, round(decay_share * num_steps))
  require(num_steps - warmup - decay > 0, "tokens", tokens, f"more than a few steps of {rows} rows")
  sched = dataclasses.replace(
    old,
    kind="wsd",
    warmup_steps=warmup,
    stable_steps=num_steps - warmup - decay,
    decay_steps=decay,
    decay_shape="exp_to",
    min_ratio=old.min_ratio or 0.1,
  )
  phases = [
    dataclasses.replace(phase, start_step=0 if i == 0 else sched.decay_start)
    for i, phase in enumerate(data.phases[:2])
  ]
  require(len(data.phases) <= 2, "data.phases", len(data.phases), "at most a stable and a decay")
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, **(constants or {})),
    optim=dataclasses.replace(base.optim, peak_lr=peak_lr, schedule=sched),
    data=dataclasses.replace(data, batch_size=rows, phases=tuple(phases)),
    checkpoint=dataclasses.replace(base.checkpoint, keep_steps=(sched.decay_start,)),
    num_steps=num_steps,
  )
