"""Two-stage training to low bits: which part of a run is quantised, and with what schedule."""

import dataclasses

from minicpm_jax.config.optim import ScheduleConfig
from minicpm_jax.config.quant import QuantConfig
from minicpm_jax.config.train import TrainConfig
from minicpm_jax.config.validate import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class QATConfig:
  """The second stage of MiniCPM4 section 3.3: the last `share` of a WSD run's steps is quantised.

  40% (twice the decay stage of 20%) comes close to quantising from the start. Whether Adam's
  moments survive the switch is not stated; they start from zero unless `keep_moments`.
  """

  quant: QuantConfig = QuantConfig()
  share: float = 0.4  # of the run's steps, (0, 1]
  peak_lr: float = 5e-3  # base rate of the quantised stage (BitCPM-CANN found 1e-2 better)
  rewarmup_steps: int = 100  # linear from 0 at the switch, which the paper calls critical; 0 = none
  keep_moments: bool = False

  def __post_init__(self):
    require(0 < self.share <= 1, "qat.share", self.share, "in (0, 1]")
    require(self.peak_lr > 0, "qat.peak_lr", self.peak_lr, "> 0")
    require(self.rewarmup_steps >= 0, "qat.rewarmup_steps", self.rewarmup_steps, "steps >= 0")

  def start_step(self, num_steps: int) -> int:
    """Steps of the first stage."""
    return num_steps - max(1, round(self.share * num_steps))


def qat_stages(
  cfg: TrainConfig, qat: QATConfig, *, first_workdir: str
) -> tuple[TrainConfig, TrainConfig]:
  """(first stage, quantised stage) of the run `cfg`, which together take its steps.

  The first keeps cfg's schedule and ends at the switch. The second starts from the weights that
  the first left in `first_workdir`, at step 0 of a fresh schedule: re-warm-up, what is left of the
  stable stage, the decay. Where the switch lies inside the decay, the second goes on from the
  fraction that the decay had reached. Its data are drawn in another order (data.seed + 1).
  """
  start = qat.start_step(cfg.num_steps)
  require(start > 0, "qat.share", qat.share, "less than 1 for two stages (train cfg itself)")
  first = dataclasses.replace(
    cfg,
    name=f"{cfg.name}_dense",
    num_steps=start,
    checkpoint=dataclasses.replace(cfg.checkpoint, keep_steps=(start,)),
  )
  schedule, ratio = second_schedule(cfg.optim.schedule, qat, cfg.num_steps)
  second = dataclasses.replace(
    cfg,
    name=f"{cfg.name}_{qat.quant.scheme}",
    model=dataclasses.replace(cfg.model, quant=qat.quant),
    optim=dataclasses.replace(cfg.optim, peak_lr=qat.peak_lr * ratio, schedule=schedule),
    data=dataclasses.replace(cfg.data, seed=cfg.data.seed + 1, phases=_shifted(cfg, start)),
    checkpoint=dataclasses.replace(
      cfg.checkpoint, keep_steps=(schedule.decay_start,) if schedule.decay_start else ()
    ),
    num_steps=cfg.num_steps - start,
    init_from=f"{first_workdir}@{start}",
    keep_moments=qat.keep_moments,
  )
  return first, second


def second_schedule(
  whole: ScheduleConfig, qat: QATConfig, num_steps: int
) -> tuple[ScheduleConfig, float]:
  """(schedule of the quantised stage, factor of its peak rate) for a WSD run of `num_steps`."""
  require(whole.kind == "wsd", "optim.schedule.kind", whole.kind, "wsd")
  start = qat.start_step(num_steps)
  left = num_steps - start
  warmup = qat.rewarmup_steps if start > 0 else whole.warmup_steps
  require(warmup <= left, "qat.rewarmup_steps", warmup, f"at most the stage's {left} steps")
  decay = min(whole.decay_steps, left - warmup)
  done = max(0, start - whole.decay_start) / max(1, whole.decay_steps)
  ratio, min_ratio = 1.0, whole.min_ratio
  if done > 0:
    shape = whole.decay_shape
    require(shape == "exp_to", "optim.schedule.decay_shape", shape, "exp_to to switch in the decay")
    ratio, min_ratio = whole.min_ratio**done, whole.min_ratio ** (1 - done)
  schedule = dataclasses.replace(
    whole,
    warmup_steps=warmup,
    stable_steps=left - warmup - decay,
    decay_steps=decay,
    min_ratio=min_ratio,
  )
  return schedule, ratio


def _shifted(cfg: TrainConfig, start: int) -> tuple:
  """cfg's data phases as the second stage counts steps: the one that holds at `start` is first."""
  phases = [
    dataclasses.replace(phase, start_step=max(0, phase.start_step - start))
    for phase in cfg.data.phases
  ]
  last_at_zero = max((i for i, p in enumerate(phases) if p.start_step == 0), default=0)
  return tuple(phases[last_at_zero:])
