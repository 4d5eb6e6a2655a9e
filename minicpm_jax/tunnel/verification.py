"""Efficient verification of data (MiniCPM4 section 2.2.1, data.md 2.6).

From a checkpoint at the end of the stable stage: stage 1, the decay of the base run (shared), then
stage 2 twice, with the learning rate going on to its floor: the baseline on the default mixture,
the candidate with `share` of the rows replaced, at fixed places, by rows of the data under test.
All other rows, the optimiser state and the schedule are equal. Where the report leaves the two
stages open, this is our reading; steps and schedules are fields.

At small scale accuracy is noise: bits per byte (of gold answers and held-out good text) decide. A
delta is positive where the candidate is better. ScalingBench loss is a set of its own elsewhere.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io, run_config
from minicpm_jax.config import validate
from minicpm_jax.core import files
from minicpm_jax.data import mixture, sources
from minicpm_jax.models import transformer
from minicpm_jax.text import tokenizer as tokenizer_lib
from minicpm_jax.train import loop
from minicpm_jax.tunnel import likelihood

Decision = Literal["accept", "reject", "undecided"]
Metric = Literal["bits_per_byte", "accuracy", "accuracy_per_byte"]
ScoresBySet = Mapping[str, likelihood.Scores]


class VerificationError(ValueError):
  """A verification that would not compare data; names the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationConfig:
  """One candidate against the default mixture."""

  checkpoints: tuple[str, ...]  # 'workdir@step', last stable step; several = seeds of the base run
  candidate: config.SourceConfig
  share: float = 0.3  # of stage 2's rows
  stage1_steps: int = 0
  stage2_steps: int = 100
  default: tuple[tuple[str, float], ...] | None = None  # None: the base run's mixture at the step
  stage1_schedule: config.ScheduleConfig | None = None  # None: one decay over both stages
  stage2_schedule: config.ScheduleConfig | None = None
  max_epochs: float = 4.0  # of the candidate
  decide_by: Metric = "bits_per_byte"
  num_draws: int = 10_000  # of the bootstrap
  confidence: float = 0.95
  seed: int = 0  # of the bootstrap

  def __post_init__(self):
    validate.require_hints(self, "")
    if not self.checkpoints:
      raise VerificationError("checkpoints: found none, expected at least one 'workdir@step'")
    if not 0 < self.share <= 1:
      raise VerificationError(f"share: found {self.share}, expected in (0, 1]")
    if self.stage1_steps < 0 or self.stage2_steps < 1:
      raise VerificationError(
        f"stage1_steps, stage2_steps: found {self.stage1_steps}, {self.stage2_steps}, expected "
        ">= 0 and >= 1"
      )
    if not 0 < self.confidence < 1 or self.num_draws < 1:
      raise VerificationError("confidence, num_draws: expected in (0, 1) and >= 1")
    if not self.max_epochs > 0 or self.seed < 0:
      raise VerificationError(
        f"max_epochs, seed: found {self.max_epochs}, {self.seed}, expected > 0 and >= 0"
      )


# --- Runs ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Runs:
  """Configs of the shared stage 1 (None without steps), the baseline and the candidate."""

  start_step: int
  stage1: config.TrainConfig | None
  baseline: config.TrainConfig
  candidate: config.TrainConfig


def plan(cfg: VerificationConfig, checkpoint: str, workdir: str | os.PathLike[str]) -> Runs:
  """The runs that branch from one checkpoint; candidate and baseline differ in `replace` only."""
  base_workdir, step = run_config.split_step(checkpoint)
  base = run_config.read(base_workdir, config.TrainConfig)
  start = orbax_io.latest_step(base_workdir) if step is None else step
  middle, stop = start + cfg.stage1_steps, start + cfg.stage1_steps + cfg.stage2_steps
  weights = cfg.default or mixture.phase_at(base.data.phases, start).weights
  past = tuple(p for p in base.data.phases if p.start_step < start)
  phases = (*past, config.PhaseConfig(name="stage1", start_step=start, weights=weights))
  names = {s.name for s in base.data.sources}
  if cfg.candidate.name in names:
    raise VerificationError(
      f"candidate.name: found {cfg.candidate.name!r}, expected another name than {sorted(names)}"
    )
  shared = dataclasses.replace(
    base,
    init_from=None,
    branch_from=f"{base_workdir}@{start}",
    num_steps=stop,
    eval_sources=(),
    checkpoint=dataclasses.replace(base.checkpoint, every_steps=0, keep_steps=()),
  )

  def decay():
    return _decay(base.optim.schedule, start, stop)

  def run(name, branch_from, num_steps, schedule, run_phases, run_sources=base.data.sources):
    return dataclasses.replace(
      shared,
      name=f"verify-{name}",
      branch_from=branch_from,
      num_steps=num_steps,
      optim=dataclasses.replace(base.optim, schedule=schedule),
      data=dataclasses.replace(base.data, sources=run_sources, phases=run_phases),
    )

  stage1, branch = None, shared.branch_from
  if cfg.stage1_steps:
    stage1 = run("stage1", branch, middle, cfg.stage1_schedule or decay(), phases)
    branch = f"{pathlib.Path(workdir) / 'stage1'}@{middle}"
    past = phases
  schedule = cfg.stage2_schedule or decay()
  phase = config.PhaseConfig(name="stage2", start_step=middle, weights=weights)
  replaced = dataclasses.replace(phase, replace=(cfg.candidate.name, cfg.share))
  with_candidate = (*base.data.sources, cfg.candidate)
  return Runs(
    start,
    stage1,
    run("baseline", branch, stop, schedule, (*past, phase)),
    run("candidate", branch, stop, schedule, (*past, replaced), with_candidate),
  )


def _decay(schedule: config.ScheduleConfig, start: int, stop: int) -> config.ScheduleConfig:
  if schedule.kind != "wsd" or start < schedule.warmup_steps or start > schedule.decay_start:
    raise VerificationError(
      f"checkpoint: found step {start} of schedule {schedule.kind!r} (warm-up "
      f"{schedule.warmup_steps}, decay from {schedule.decay_start}), expected a stable step of "
      "WSD; or give stage1_schedule and stage2_schedule"
    )
  return dataclasses.replace(
    schedule, stable_steps=start - schedule.warmup_steps, decay_steps=stop - start
  )


def candidate_epochs(cfg: VerificationConfig, run: config.TrainConfig) -> float:
  """How often the candidate is read; VerificationError above `max_epochs`."""
  source = sources.open_source(cfg.candidate.name, cfg.candidate.path)
  rows = mixture.rows_by_source(run.data, run.num_steps - cfg.stage2_steps, run.num_steps)
  needed = rows.get(cfg.candidate.name, 0) * run.data.seq_len
  index = getattr(source, "index", None)  # Parquet files have none
  have = index.num_tokens if index else sum(len(source[i]) for i in range(len(source)))
  epochs = needed / have
  if epochs > cfg.max_epochs:
    raise VerificationError(
      f"candidate {cfg.candidate.name}: found {have:,} tokens, expected at least "
      f"{needed / cfg.max_epochs:,.0f} (share {cfg.share} of {cfg.stage2_steps} steps is "
      f"{needed:,} tokens, at most {cfg.max_epochs:g} epochs); use fewer steps or a smaller share"
    )
  return epochs


# --- Verification --------------------------------------------------------------------------------


def verify(
  cfg: VerificationConfig,
  workdir: str | os.PathLike[str],
  tok: tokenizer_lib.Tokenizer,
  eval_sets: Sequence[likelihood.EvalSet],
  *,
  on_run: Callable[[str], None] | None = None,
) -> dict[str, Any]:
  """Trains what is missing, evaluates, decides; writes `workdir/verification-NAME.json`.

  Runs that an earlier call finished in `workdir` are not trained again, so one baseline serves
  many candidates; another checkpoint, length or schedule wants another workdir.
  """
  workdir, began, cpu = pathlib.Path(workdir), time.monotonic(), time.process_time()
  tell = on_run or (lambda line: None)
  baseline, candidate, seeds = [], [], []
  for k, checkpoint in enumerate(cfg.checkpoints):
    folder = workdir / f"seed{k}"
    runs = plan(cfg, checkpoint, folder)
    epochs = candidate_epochs(cfg, runs.candidate)
    scorer = likelihood.Scorer(
      transformer.Transformer(runs.baseline.model), tok, seq_len=runs.baseline.data.seq_len
    )
    if runs.stage1 is not None:
      tell(f"seed {k}: stage 1, {cfg.stage1_steps} steps")
      loop.train_to_end(runs.stage1, folder / "stage1")
    row: dict[str, Any] = {
      "checkpoint": checkpoint,
      "start_step": runs.start_step,
      "candidate_epochs": epochs,
    }
    for kind, run, scores in (
      ("baseline", runs.baseline, baseline),
      ("candidate", runs.candidate, candidate),
    ):
      tell(f"seed {k}: {kind}, {cfg.stage2_steps} steps")
      name = kind if kind == "baseline" else f"candidate-{cfg.candidate.name}"
      params = loop.train_to_end(run, folder / name).state.params
      scores.append({s.name: scorer.score(params, s) for s in eval_sets})
      first = run.num_steps - cfg.stage2_steps
      rows = mixture.rows_by_source(run.data, first, run.num_steps)
      row[kind] = {
        "config_hash": orbax_io.config_hash(run),
        "tokens": {name: n * run.data.seq_len for name, n in sorted(rows.items())},
        "sets": {s.name: _summary(scores[-1][s.name], s.kind) for s in eval_sets},
      }
    one = compare([baseline[-1]], [candidate[-1]], eval_sets, cfg)
    seeds.append(row | {"delta": one["delta"], "decision": one["decision"]})
  verdict = compare(baseline, candidate, eval_sets, cfg)
  report = {
    "candidate": cfg.candidate.name,
    "config": json.loads(json.dumps(dataclasses.asdict(cfg))),
    **verdict,
    "wins": sum(row["delta"] > 0 for row in seeds),
    "num_seeds": len(seeds),
    "seeds": seeds,
    "wall_seconds": time.monotonic() - began,
    "cpu_seconds": time.process_time() - cpu,
  }
  files.write_json(workdir / f"verification-{cfg.candidate.name}.json", report)
  return report


def _summary(scores: likelihood.Scores, kind: str) -> dict[str, float]:
  found = {"items": float(len(scores.nats)), "bits_per_byte": scores.bits_per_byte}
  if kind == "choice":
    found |= {
      "accuracy": float(scores.correct.mean()),
      "accuracy_per_byte": float(scores.correct_per_byte.mean()),
    }
  return found


def compare(
  baseline: Sequence[ScoresBySet],
  candidate: Sequence[ScoresBySet],
  eval_sets: Sequence[likelihood.EvalSet],
  cfg: VerificationConfig,
) -> dict[str, Any]:
  """Deltas by set and metric, interval of the mean delta by paired bootstrap, decision.

  Items are drawn anew inside each set; scores of several seeds are first averaged item by item.
  Accuracies in points (x 100); bits per byte baseline - candidate, so that positive is better.
  """
  metric = cfg.decide_by
  used = [s for s in eval_sets if metric == "bits_per_byte" or s.kind == "choice"]
  if not used:
    raise VerificationError(f"decide_by: found {metric!r}, expected an eval set that has it")
  rng = np.random.default_rng(cfg.seed)
  draws = np.zeros(cfg.num_draws)
  deltas: dict[str, dict[str, float]] = {}
  for eval_set in eval_sets:
    name = eval_set.name
    gain, weight = _gains([b[name] for b in baseline], [c[name] for c in candidate])
    metrics = list(gain) if eval_set.kind == "choice" else ["bits_per_byte"]
    deltas[name] = {m: float(gain[m].sum() / weight[m].sum()) for m in metrics}
    if eval_set in used:
      draws += bootstrap(gain[metric], weight[metric], cfg.num_draws, rng) / len(used)
  tail = 50 * (1 - cfg.confidence)
  low, high = np.percentile(draws, [tail, 100 - tail])
  return {
    "decided_by": metric,
    "delta": float(np.mean([deltas[s.name][metric] for s in used])),
    "interval": [float(low), float(high)],
    "decision": decide(float(low), float(high)),
    "deltas": deltas,
  }


def decide(low: float, high: float) -> Decision:
  """Accept when the whole interval is above 0, reject when below."""
  if low > 0:
    return "accept"
  return "reject" if high < 0 else "undecided"


def _gains(
  baseline: Sequence[likelihood.Scores], candidate: Sequence[likelihood.Scores]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Per metric: what each item adds to the delta, and its weight; delta = sum / sum."""

  def mean(scores: Sequence[likelihood.Scores], field: str) -> np.ndarray:
    return np.mean([getattr(s, field) for s in scores], axis=0)

  ones = np.ones(len(baseline[0].nats))
  gain = {"bits_per_byte": (mean(baseline, "nats") - mean(candidate, "nats")) / np.log(2)}
  weight = {"bits_per_byte": baseline[0].num_bytes}
  for metric, field in (("accuracy", "correct"), ("accuracy_per_byte", "correct_per_byte")):
    gain[metric] = 100 * (mean(candidate, field) - mean(baseline, field))
    weight[metric] = ones
  return gain, weight


def bootstrap(
  gain: np.ndarray, weight: np.ndarray, num_draws: int, rng: np.random.Generator
) -> np.ndarray:
  """float64 [num_draws]: sum(gain) / sum(weight) over items drawn with replacement."""
  out, n = np.empty(num_draws), len(gain)
  chunk = max(1, 2_000_000 // n)
  for at in range(0, num_draws, chunk):
    picked = rng.integers(0, n, (min(chunk, num_draws - at), n))
    out[at : at + len(picked)] = gain[picked].sum(axis=1) / weight[picked].sum(axis=1)
  return out
