"""Two-stage training to low bits: which part of a run is quantised, and with what schedule."""

import dataclasses

from minicpm_jax.config.optim import OptimConfig, ScheduleConfig
from minicpm_jax.config.quant import QuantConfig, SchemeName
from minicpm_jax.config.train import TrainConfig
from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class QATConfig:
  """The second stage of MiniCPM4 section 3.3: the last `share` of a WSD run's steps is quantised.

  40% (twice the decay stage of 20%) comes close to quantising from the start. Whether Adam's
  moments survive the switch is not stated; they start from zero unless `keep_moments`.
  """

  scheme: SchemeName = "ternary"
  g: int = -1  # input channels that share a scale; -1 = one scale per output channel
  quant: QuantConfig | None = None  # instead of scheme and g, with everything else
  share: float = 0.4  # of the run's steps, (0, 1]
  start_step: int | None = None  # steps of the first stage, instead of `share`
  lr_peak: float = 5e-3  # base rate of the quantised stage (BitCPM-CANN found 1e-2 better)
  rewarmup_steps: int = 100  # linear from 0 at the switch, which the paper calls critical; 0 = none
  decay_start: int | None = None  # step of the whole run; None = where its schedule has it
  keep_moments: bool = False

  def __post_init__(self):
    require_hints(self, "qat.")
    require(0 < self.share <= 1, "qat.share", self.share, "in (0, 1]")
    require(self.lr_peak > 0, "qat.lr_peak", self.lr_peak, "> 0")
    require(self.rewarmup_steps >= 0, "qat.rewarmup_steps", self.rewarmup_steps, "steps >= 0")
    for name in ("start_step", "decay_start"):
      value = getattr(self, name)
      require(value is None or value >= 0, f"qat.{name}", value, "None or a step >= 0")
    own = (self.scheme, self.g)
    require(self.quant is None or own == ("ternary", -1), "qat.scheme, qat.g", own, "none by quant")
    self.weights  # noqa: B018  (refuses scheme and g)

  @property
  def weights(self) -> QuantConfig:
    """What the second stage trains under."""
    return self.quant or QuantConfig(scheme=self.scheme, group_size=self.g)

  def switch_step(self, num_steps: int) -> int:
    """Steps of the first stage of a run of `num_steps`."""
    if self.start_step is None:
      return num_steps - max(1, round(self.share * num_steps))
    ok = self.start_step < num_steps
    require(ok, "qat.start_step", self.start_step, f"a step below the run's {num_steps}")
    return self.start_step

  def whole_schedule(self, schedule: ScheduleConfig, num_steps: int) -> ScheduleConfig:
    """The schedule of both stages together, with `decay_start` applied."""
    if self.decay_start is None:
      return schedule
    warmup = schedule.warmup_steps
    ok = warmup <= self.decay_start <= num_steps
    require(ok, "qat.decay_start", self.decay_start, f"a step in {warmup}..{num_steps}")
    lengths = dict(stable_steps=self.decay_start - warmup, decay_steps=num_steps - self.decay_start)
    return dataclasses.replace(schedule, **lengths)


def qat_stages(
  cfg: TrainConfig, qat: QATConfig, *, first_workdir: str
) -> tuple[TrainConfig, TrainConfig]:
  """(first stage, quantised stage) of the run `cfg`, which together take its steps.

  The first keeps cfg's schedule and ends at the switch. The second starts from the weights that
  the first left in `first_workdir`, at step 0 of a fresh schedule: re-warm-up, what is left of the
  stable stage, the decay. Where the switch lies inside the decay, the second goes on from the
  fraction that the decay had reached. Its data are drawn in another order (data.seed + 1).
  """
  schedule, ratio = second_schedule(cfg.optim.schedule, qat, cfg.num_steps)
  optim = dataclasses.replace(cfg.optim, peak_lr=qat.lr_peak * ratio, schedule=schedule)
  return _two_stages(cfg, qat, optim, first_workdir)


def _two_stages(
  cfg: TrainConfig, qat: QATConfig, optim: OptimConfig, first_workdir: str
) -> tuple[TrainConfig, TrainConfig]:
  """`qat_stages` whose second stage has the optimiser `optim`."""
  start, schedule = qat.switch_step(cfg.num_steps), optim.schedule
  require(start > 0, "qat.share", qat.share, "less than 1 for two stages (train cfg itself)")
  whole = qat.whole_schedule(cfg.optim.schedule, cfg.num_steps)
  first = dataclasses.replace(
    cfg,
    name=f"{cfg.name}_dense",
    num_steps=start,
    optim=dataclasses.replace(cfg.optim, schedule=whole),
    checkpoint=dataclasses.replace(cfg.checkpoint, keep_steps=(start,)),
  )
  second = dataclasses.replace(
    cfg,
    name=f"{cfg.name}_{qat.weights.scheme}",
    model=dataclasses.replace(cfg.model, quant=qat.weights),
    optim=optim,
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
  """(schedule of the quantised stage, factor of its peak rate) for a WSD run of `num_steps`.

  The decay keeps its place in the whole run, also where that is shorter or longer than `whole`.
  """
  require(whole.kind == "wsd", "optim.schedule.kind", whole.kind, "wsd")
  whole, start = qat.whole_schedule(whole, num_steps), qat.switch_step(num_steps)
  left = num_steps - start
  warmup = qat.rewarmup_steps if start > 0 else whole.warmup_steps
  require(warmup <= left, "qat.rewarmup_steps", warmup, f"at most the stage's {left} steps")
  # End of the decay in steps of the stage; without a decay the stable stage goes on.
  end = whole.total_steps - start if whole.decay_steps else left
  least = max(warmup, 1)  # at the end of a decay nothing of it is left to go on with
  expected = f"at least {start + least}, where the quantised stage has warmed up"
  require(end >= least, "optim.schedule: total steps", whole.total_steps, expected)
  decay = min(whole.decay_steps, end - warmup)
  done = max(0, start - whole.decay_start) / whole.decay_steps if whole.decay_steps else 0.0
  ratio, min_ratio = 1.0, whole.min_ratio
  if done > 0:
    shape, expected = (
      whole.decay_shape,
      "another to switch in the decay (its rest has no such form)",
    )
    require(shape != "one_minus_sqrt", "optim.schedule.decay_shape", shape, expected)
    if shape == "exp_to":
      ratio, min_ratio = whole.min_ratio**done, whole.min_ratio ** (1 - done)
    elif shape == "linear_to":
      ratio = 1 - (1 - whole.min_ratio) * done
      min_ratio = whole.min_ratio / ratio
    else:
      ratio = 0.5 ** (done * whole.decay_steps / whole.half_life_steps)
  schedule = dataclasses.replace(
    whole,
    warmup_steps=warmup,
    stable_steps=end - warmup - decay,
    decay_steps=decay,
    min_ratio=min_ratio,
  )
  return schedule, ratio


def int4_stages(
  cfg: TrainConfig,
  *,
  first_workdir: str,
  group_size: int = 128,
  decay_share: float = 0.02,
  export_ready_step: int = 0,
) -> tuple[TrainConfig, ...]:
  """(first stage, int4 stage) of the WSD run `cfg`, or with (.., int4 stage, export-ready stage).

  4-bit weights need little training (quantization.md 3; no recipe is published): the last
  `decay_share` of the decay's steps, at a tenth of the stable stage's rate, flat, moments fresh.
  From `export_ready_step` of them on, scales are rounded to float16 before codes are taken, so that
  a GPTQ file holds what was trained; 0 = from the switch.
  """
  whole = cfg.optim.schedule
  require(whole.kind == "wsd", "optim.schedule.kind", whole.kind, "wsd")
  require(0 < decay_share <= 1, "decay_share", decay_share, "in (0, 1]")
  require(whole.decay_steps > 0, "optim.schedule.decay_steps", whole.decay_steps, "a decay")
  steps = max(1, round(decay_share * whole.decay_steps))
  ok = 0 <= export_ready_step < steps
  require(ok, "export_ready_step", export_ready_step, f"a step below the int4 stage's {steps}")
  start = cfg.num_steps - steps
  flat = dataclasses.replace(
    cfg.optim,
    peak_lr=cfg.optim.peak_lr / 10,
    schedule=ScheduleConfig(kind="constant", warmup_steps=0, stable_steps=steps),
  )
  first, second = _two_stages(cfg, QATConfig(start_step=start), flat, first_workdir)

  def stage(name: str, scale_dtype: str, **more) -> TrainConfig:
    quant = QuantConfig(scheme="int4", group_size=group_size, scale_dtype=scale_dtype)
    model = dataclasses.replace(cfg.model, quant=quant)
    name = f"{cfg.name}_{name}"
    checkpoint = dataclasses.replace(second.checkpoint, keep_steps=())
    more = dict(optim=flat, checkpoint=checkpoint) | more
    return dataclasses.replace(second, name=name, model=model, **more)

  if export_ready_step == 0:
    return first, stage("int4", "f16", num_steps=steps)
  free = stage("int4", "f32", num_steps=export_ready_step)
  free = dataclasses.replace(
    free, checkpoint=dataclasses.replace(free.checkpoint, keep_steps=(export_ready_step,))
  )
  at = f"{first_workdir}_int4@{export_ready_step}"
  ready = stage("int4_export", "f16", num_steps=steps - export_ready_step, init_from=at)
  data = dataclasses.replace(ready.data, seed=ready.data.seed + 1)
  return first, free, dataclasses.replace(ready, keep_moments=True, data=data)


def _shifted(cfg: TrainConfig, start: int) -> tuple:
  """cfg's data phases as the second stage counts steps: the one that holds at `start` is first."""
  phases = [
    dataclasses.replace(phase, start_step=max(0, phase.start_step - start))
    for phase in cfg.data.phases
  ]
  last_at_zero = max((i for i, p in enumerate(phases) if p.start_step == 0), default=0)
  return tuple(phases[last_at_zero:])
