"""The runs of `experiments.qat_study`: one small model on bytes, many quantised last stages.

Every arm of a seed sees the same rows in the same order and starts from the same stable-stage run,
which is made once. Losses are held-out nats a byte on the same windows for all arms.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.align import distill
from minicpm_jax.config import qat as qat_config
from minicpm_jax.data import python_corpus
from minicpm_jax.models import transformer, zoo
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib

CHUNK = 20  # steps a compiled call
TEACHER = 2  # times as wide, trained for as many steps in full precision


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of quantised training with moments and a schedule of its own, decayed to its end.

  share: its steps, in lengths of the whole full-precision run. cost_of: instead, as many steps as
  cost what these together do, (share, is taught) each.
  """

  share: float = 0.0
  is_taught: bool = False
  cost_of: tuple[tuple[float, bool], ...] = ()


@dataclasses.dataclass(frozen=True)
class Arm:
  """A run of the study: the last `share` of the steps under `quant`."""

  name: str
  share: float
  quant: config.QuantConfig | None
  peak_lr: float = 5e-3
  rewarmup: float = 0.05  # of the whole run's steps; 0 = none
  keep_moments: bool = False
  distilled: float = 0.0  # last part of the quantised steps that has the teacher's loss
  stages: tuple[Stage, ...] = ()  # from the switch on, instead of the last `share`


@dataclasses.dataclass(frozen=True)
class Size:
  """Model and run: 20% decay, batch of `rows` x `length` bytes."""

  steps: int = 400
  rows: int = 16
  length: int = 128
  dim: int = 64
  layers: int = 4
  eval_windows: int = 512

  def model(self, quant: config.QuantConfig | None) -> config.ModelConfig:
    return zoo.nano(
      vocab_size=256,
      model_dim=self.dim,
      mlp_dim=3 * self.dim,
      num_layers=self.layers,
      num_heads=self.dim // 16,
      num_kv_heads=2,
      head_dim=16,
      max_position=self.length,
      quant=quant,
    )

  def train(self) -> config.TrainConfig:
    """The whole run in full precision (base rate 1e-2, WSD: 5% warm-up, 20% decay)."""
    warmup, decay = self.steps // 20, self.steps // 5
    schedule = config.ScheduleConfig(
      warmup_steps=warmup, stable_steps=self.steps - warmup - decay, decay_steps=decay
    )
    optim = config.OptimConfig(peak_lr=0.01, schedule=schedule)
    return config.TrainConfig(model=self.model(None), optim=optim, num_steps=self.steps)

  def teachers(self) -> "Size":
    return dataclasses.replace(self, dim=TEACHER * self.dim)

  def steps_of(self, stage: Stage) -> int:
    """Cost of a step, by parameters: 6 operations a token and parameter, 2 for the teacher's."""
    own, teachers = (zoo.param_counts(s.model(None)).total for s in (self, self.teachers()))
    cost, share = {False: 6 * own, True: 6 * own + 2 * teachers}, stage.share
    if stage.cost_of:
      share = sum(part * cost[taught] for part, taught in stage.cost_of) / cost[stage.is_taught]
    return round(share * self.steps)


def ternary(group_size: int = -1, scheme: str = "ternary") -> config.QuantConfig:
  return config.QuantConfig(scheme=scheme, group_size=group_size)


SHARES = (0.1, 0.2, 0.4, 0.6, 1.0)


def arms_of(suite: str) -> list[Arm]:
  """The arms of one suite; arms that several suites share have one name."""
  base = Arm("ternary 40%", 0.4, ternary())
  full = Arm("full precision", 0.0, None)
  if suite == "share":
    return [full] + [Arm(f"ternary {round(100 * s)}%", s, ternary()) for s in SHARES]
  if suite == "rewarmup":
    change = dataclasses.replace
    return [
      base,
      change(base, name="no re-warm-up", rewarmup=0.0),
      change(base, name="moments kept", keep_moments=True),
      change(base, name="moments kept, no re-warm-up", keep_moments=True, rewarmup=0.0),
    ]
  if suite == "group":
    return [base] + [Arm(f"ternary g={g}", 0.4, ternary(g)) for g in (32, 16)]
  if suite == "scheme":
    names = ("five", "half", "sym", "asym")
    return [base] + [Arm(f"{s} 40%", 0.4, ternary(scheme=s)) for s in names]
  if suite == "fp8":
    none = config.QuantConfig(scheme="none", fp8=config.FP8Config())
    return [full, Arm("fp8 block", 1.0, none, peak_lr=0.01)]
  if suite == "distill":
    change = dataclasses.replace
    return [
      base,
      change(base, name="distilled throughout", distilled=1.0),
      change(base, name="decoupled distillation", distilled=0.5),
    ]
  if suite == "decoupled":
    qat, taught, end = Stage(1.2), Stage(1.2, is_taught=True), Stage(0.4, is_taught=True)
    cost = ((1.2, False), (0.4, True))  # of "QAT, then taught"
    stages = {
      "QAT": (qat,),
      "taught": (taught,),
      "QAT, then taught": (qat, end),  # decoupled
      "QAT, then QAT": (qat, Stage(0.4)),
      "taught, then taught": (taught, end),
      "QAT, equal steps": (Stage(1.6),),
      "taught, equal steps": (Stage(1.6, is_taught=True),),
      "QAT, equal cost": (Stage(cost_of=cost),),
      "taught, equal cost": (Stage(is_taught=True, cost_of=cost),),
    }
    return [dataclasses.replace(base, name=name, stages=parts) for name, parts in stages.items()]
  raise ValueError(f"suite: found {suite!r}, expected one of {SUITES}")


SUITES = ("share", "rewarmup", "group", "scheme", "fp8", "distill", "decoupled")


class Study:
  """Compiled steps, data and the stable-stage states of one seed after another."""

  def __init__(self, size: Size):
    self.size, self.cfg = size, size.train()
    texts = {
      split: np.frombuffer(
        b"\n".join(
          doc.text.encode()
          for source in python_corpus.SOURCES
          for doc in python_corpus.documents_of(source, split)
        ),
        np.uint8,
      )
      for split in ("train", "heldout")
    }
    self.text = texts["train"]
    starts = np.linspace(0, len(texts["heldout"]) - size.length - 1, size.eval_windows).astype(int)
    self.heldout = texts["heldout"][starts[:, None] + np.arange(size.length + 1)]
    self._compiled: dict[Any, Any] = {}

  def rows(self, seed: int, first: int, last: int) -> np.ndarray:
    """[steps, rows, length + 1] bytes of steps first..last - 1, a function of seed and step."""
    out = []
    for step in range(first, last):
      rng = np.random.default_rng((seed, step))
      at = rng.integers(0, len(self.text) - self.size.length - 1, self.size.rows)
      out.append(self.text[at[:, None] + np.arange(self.size.length + 1)])
    return np.stack(out)

  def _functions(self, quant: config.QuantConfig | None):
    if quant not in self._compiled:
      cfg = self.size.model(quant)
      model = transformer.Transformer(cfg)
      optimizer = build.make_optimizer(self.cfg.optim, cfg, transformer.abstract_params(model)[0])
      step = step_lib.make_train_step(
        step_lib.make_loss_fn(model),
        step_lib.make_totals_fn(model),
        optimizer,
        weights=step_lib.quantized_weights(cfg),
      )
      evaluate = step_lib.make_eval_step(model)

      @jax.jit
      def heldout(params, rows):
        total = jax.lax.map(lambda x: evaluate(params, step_lib.whole_rows(x))["loss"], rows)
        return jnp.sum(total.sum) / jnp.sum(total.weight)

      self._compiled[quant] = model, optimizer, _chunk(step), heldout
    return self._compiled[quant]

  def _distilling(self, quant: config.QuantConfig):
    """The compiled chunk whose loss is half the data's and half the teacher's (last argument)."""
    key = ("distill", quant)
    if key not in self._compiled:
      student, optimizer, *_ = self._functions(quant)
      teacher = transformer.Transformer(self.size.teachers().model(None))
      self._compiled[key] = _chunk(distill.make_step(student, teacher, optimizer))
    return self._compiled[key]

  def teacher(self, seed: int) -> tuple[Any, float]:
    """(parameters, held-out loss) of the wider model after the whole run in full precision."""
    if ("teacher", seed) not in self._compiled:
      study = Study(self.size.teachers())
      whole = schedules.schedule_arrays(self.cfg.optim.schedule, self.cfg.optim.peak_lr)
      run = dict(seed=seed, first=0, steps=self.size.steps)
      params = study.train(study.initial(seed), None, whole, **run)[0].params
      self._compiled["teacher", seed] = params, study.heldout_loss(params, None)
    return self._compiled["teacher", seed]

  def initial(self, seed: int) -> step_lib.TrainState:
    model, optimizer, *_ = self._functions(None)
    params = transformer.init_params(model, jax.random.key(seed))
    return step_lib.TrainState(jnp.int32(0), params, optimizer.init(params))

  def train(self, state, quant, schedule, *, seed: int, first: int, steps: int, teacher=None):
    """(state, {metric: values a step}) after `steps` more steps on rows first, first + 1, ..."""
    *_, chunk, _ = self._functions(quant)
    more = () if teacher is None else (teacher,)
    if teacher is not None:
      chunk = self._distilling(quant)
    logs, done = [], 0
    while done < steps:
      n = min(CHUNK, steps - done)
      rows = self.rows(seed, first + done, first + done + n)
      state, log = chunk(state, rows, schedule, *more)
      logs.append(jax.device_get(log))
      done += n
    return state, {k: np.concatenate([log[k] for log in logs]) for k in (logs[0] if logs else {})}

  def heldout_loss(self, params, quant) -> float:
    *_, heldout = self._functions(quant)
    rows = self.heldout[: len(self.heldout) // 16 * 16].reshape(-1, 16, self.size.length + 1)
    return float(heldout(params, rows))

  def run_seed(self, arms: list[Arm], seed: int, done: Any):
    """Yields (arm, result) of every arm that `done(arm)` does not have yet, longest share last."""
    todo = [arm for arm in arms if not done(arm)]
    whole = schedules.schedule_arrays(self.cfg.optim.schedule, self.cfg.optim.peak_lr)
    state, at, losses = self.initial(seed), 0, []
    for arm in sorted(todo, key=lambda a: -a.share):
      start = self.start_of(arm)
      state, log = self.train(state, None, whole, seed=seed, first=at, steps=start - at)
      losses, at = [*losses, *log.get("loss", ())], start
      yield arm, self.finish(arm, state, start, seed) | {"first_stage": _thin(losses)}

  def start_of(self, arm: Arm) -> int:
    if arm.quant is None:
      return self.size.steps
    qat = config.QATConfig(share=arm.share, rewarmup_steps=0)
    return qat.switch_step(self.size.steps)

  def switch(self, arm: Arm, state, start: int, *, seed: int):
    """(state, result, {metric: values a step}) of the arm's own stage from step `start` on."""
    left, result = self.size.steps - start, {}
    qat = config.QATConfig(
      quant=arm.quant,
      share=arm.share,
      lr_peak=arm.peak_lr,
      rewarmup_steps=round(arm.rewarmup * self.size.steps),
      keep_moments=arm.keep_moments,
    )
    schedule, ratio = qat_config.second_schedule(self.cfg.optim.schedule, qat, self.size.steps)
    optimizer = self._functions(arm.quant)[1]
    moments = state.opt_state if arm.keep_moments else optimizer.init(state.params)
    state = step_lib.TrainState(jnp.int32(0), state.params, moments)
    result["loss_at_switch"] = self.heldout_loss(state.params, arm.quant)
    arrays = schedules.schedule_arrays(schedule, arm.peak_lr * ratio)
    taught = round(arm.distilled * left)
    stage = dict(seed=seed, first=start, steps=left - taught)
    state, log = self.train(state, arm.quant, arrays, **stage)
    if taught:
      teacher, result["teacher"] = self.teacher(seed)
      stage = dict(seed=seed, first=start + left - taught, steps=taught)
      state, more = self.train(state, arm.quant, arrays, **stage, teacher=teacher)
      log = {k: np.concatenate([log.get(k, []), more[k]]) for k in more}
    result["heldout"] = self.heldout_loss(state.params, arm.quant)
    return state, result, log

  def run_stages(self, arm: Arm, state, start: int, *, seed: int):
    """`switch` for an arm of `stages`; a first stage that several arms share is run once."""
    result = {"loss_at_switch": self.heldout_loss(state.params, arm.quant)}
    steps = [self.size.steps_of(stage) for stage in arm.stages]
    logs = []
    for i, stage in enumerate(arm.stages):
      key = (seed, arm.share, arm.quant, arm.peak_lr, arm.rewarmup, arm.stages[: i + 1])
      if key not in self._compiled:
        run = dict(seed=seed, first=start + sum(steps[:i]), steps=steps[i])
        self._compiled[key] = self._stage(arm, stage, state.params, **run)
      state, log = self._compiled[key]
      logs.append(log)
    if any(stage.is_taught for stage in arm.stages):
      result["teacher"] = self.teacher(seed)[1]
    result |= {"steps": steps, "heldout": self.heldout_loss(state.params, arm.quant)}
    return state, result, {k: np.concatenate([log[k] for log in logs]) for k in logs[0]}

  def _stage(self, arm: Arm, stage: Stage, params, *, seed: int, first: int, steps: int):
    """(state, {metric: values a step}); re-warm-up and decay are as long as an arm of 40% has."""
    whole, warmup = self.cfg.optim.schedule, round(arm.rewarmup * self.size.steps)
    stable = steps - warmup - whole.decay_steps
    schedule = dataclasses.replace(whole, warmup_steps=warmup, stable_steps=stable)
    arrays = schedules.schedule_arrays(schedule, arm.peak_lr)
    optimizer = self._functions(arm.quant)[1]
    state = step_lib.TrainState(jnp.int32(0), params, optimizer.init(params))
    teacher = self.teacher(seed)[0] if stage.is_taught else None
    run = dict(seed=seed, first=first, steps=steps, teacher=teacher)
    return self.train(state, arm.quant, arrays, **run)

  def finish(self, arm: Arm, state, start: int, seed: int) -> dict[str, Any]:
    began = time.process_time()
    if start == self.size.steps:
      result = {"heldout": self.heldout_loss(state.params, arm.quant)}
    else:
      run = self.run_stages if arm.stages else self.switch
      _, result, log = run(arm, state, start, seed=seed)
      result |= {name: _thin(values) for name, values in log.items()}
    return result | {"cpu_seconds": round(time.process_time() - began, 1)}


def _chunk(step: Any) -> Any:
  """chunk(state, rows [steps, B, T + 1], schedule, *more) -> (state, {metric: values a step})."""

  @jax.jit
  def chunk(state, rows, schedule, *more):
    def one(state, x):
      state, metrics, *_ = step(state, step_lib.whole_rows(x), schedule, *more)
      kept = {k: m.sum / m.weight for k, m in metrics.items()}
      return state, {k: kept[k] for k in ("loss", "zero_share", "flip_rate") if k in kept}

    return jax.lax.scan(one, state, rows)

  return chunk


def _thin(values: Any, num: int = 40) -> list[float]:
  """At most about `num` means of neighbouring values."""
  values = np.asarray(values, np.float64)
  width = max(1, len(values) // num)
  cut = values[: len(values) // width * width].reshape(-1, width).mean(axis=1)
  return [round(float(x), 5) for x in cut]
