"""What the recipes share: the published numbers of training.md and the `:arg` grammar.

`get_config("tiny,steps=100")`: comma-separated words,
  tiny       the model at test size (zoo.tiny), rows of 32 tokens, 8 rows, 20 steps, float32;
  steps=N    the whole schedule, phases included, compressed to N steps;
  NAME=TEXT  any other word with "=" is a field, as with --set (model.num_layers=4).
"""

import dataclasses

from minicpm_jax import config
from minicpm_jax.models import zoo

ROWS_4M = 960  # x 4096 tokens = 3.93M tokens a step (MiniCPM section 6.2)

# MiniCPM Fig. 11, read from the figure; "other" are OpenWebMath, arXiv, peS2o, wikis, ...
MINICPM_STABLE = {
  "common_crawl_zh": 0.25,
  "code": 0.25,
  "dolma": 0.24,
  "c4": 0.15,
  "pile": 0.08,
  "other": 0.03,
}
# The shares of the decay mixture are not legible in the paper: 30% of instruction data is ours.
MINICPM_DECAY = {name: 0.7 * w for name, w in MINICPM_STABLE.items()} | {
  "ultrachat": 0.08,
  "slimorca": 0.07,
  "oss_instruct": 0.05,
  "evol_instruct": 0.05,
  "sft_inhouse": 0.05,
}
# MiniCPM4 prints no mixture: web data filtered by UltraClean, code, maths; the shares are ours.
MINICPM4_STABLE = {"ultrafineweb_en": 0.5, "ultrafineweb_zh": 0.2, "code": 0.2, "math": 0.1}
MINICPM4_DECAY = {name: 0.7 * w for name, w in MINICPM4_STABLE.items()} | {"sft": 0.3}
# "Long" sources are books, wikis and papers in rows of their own.
MINICPM_LONG = {"long": 0.44} | {name: 0.56 * w for name, w in MINICPM_DECAY.items()}
MINICPM4_LONG = {"long": 0.5} | {name: 0.5 * w for name, w in MINICPM4_DECAY.items()}


def large(**overrides) -> dict:
  """Model fields of a real-size run: compute in bfloat16, full remat, padded vocabulary."""
  return {"dtype": "bf16", "remat": "full", "vocab_multiple": 128, **overrides}


def wsd(
  *,
  decay_start: int,
  decay_steps: int,
  warmup_steps: int = 100,
  shape: str = "exp_to",
  min_ratio: float = 0.1,
) -> config.ScheduleConfig:
  """WSD by the step at which the decay starts (the checkpoint that branches start from)."""
  return config.ScheduleConfig(
    kind="wsd",
    warmup_steps=warmup_steps,
    stable_steps=decay_start - warmup_steps,
    decay_steps=decay_steps,
    decay_shape=shape,
    min_ratio=min_ratio,
  )


def minicpm_wsd() -> config.ScheduleConfig:
  """0.99T tokens stable, 110B of decay with half-life 5000 steps (MiniCPM section 6.2)."""
  return wsd(decay_start=252_000, decay_steps=28_000, shape="exp_half_life")


def minicpm4_wsd(*, decay_start: int, decay_steps: int) -> config.ScheduleConfig:
  """Warm-up and exponential decay to 5% as MiniCPM-SALA reports for the same model."""
  return wsd(decay_start=decay_start, decay_steps=decay_steps, warmup_steps=2000, min_ratio=0.05)


def data(
  phases: dict[str, dict[str, float]], decay_start: int, *, rows: int, seq_len: int = 4096
) -> config.DataConfig:
  """Sources are placeholders `data/NAME` (--data replaces them); phase 2 starts with the decay."""
  names = sorted({name for weights in phases.values() for name in weights})
  starts = (0, decay_start)
  return config.DataConfig(
    sources=tuple(config.SourceConfig(name=n, path=f"data/{n}") for n in names),
    phases=tuple(
      config.PhaseConfig(name=name, start_step=start, weights=tuple(weights.items()))
      for (name, weights), start in zip(phases.items(), starts, strict=False)
    ),
    seq_len=seq_len,
    batch_size=rows,
  )


def recipe(
  name: str,
  model: config.ModelConfig,
  *,
  peak_lr: float,
  schedule: config.ScheduleConfig,
  phases: dict[str, dict[str, float]],
  rows: int = ROWS_4M,
  seq_len: int = 4096,
  **overrides,
) -> config.TrainConfig:
  """A pretraining run of `schedule.total_steps` steps, parameters sharded over all devices."""
  tokens = rows * seq_len
  return config.TrainConfig(
    name=name,
    model=model,
    optim=config.OptimConfig(peak_lr=peak_lr, schedule=schedule),
    data=data(phases, schedule.decay_start, rows=rows, seq_len=seq_len),
    mesh=config.MeshConfig(dp=1, fsdp=-1),
    checkpoint=config.CheckpointConfig(
      keep_steps=(schedule.decay_start,), keep_every_tokens=max(tokens * 1000, 100_000_000_000)
    ),
    num_steps=schedule.total_steps,
    **overrides,
  )


def bitcpm4_dense(name: str, model: config.ModelConfig) -> config.TrainConfig:
  """First stage of BitCPM4: 525B tokens, base rate 1e-2, flat (nothing decays before QAT)."""
  return recipe(
    name,
    model,
    peak_lr=0.01,
    schedule=wsd(decay_start=133_500, decay_steps=0, warmup_steps=2000),
    phases={"stable": MINICPM4_STABLE},
  )


def bitcpm4_qat(name: str, dense: str, model: config.ModelConfig) -> config.TrainConfig:
  """Second stage: 350B tokens (40% of 875B) of ternary weights, half of them the decay."""
  whole = recipe(
    name,
    model,
    peak_lr=0.01,
    schedule=wsd(decay_start=178_000, decay_steps=44_500, warmup_steps=2000, min_ratio=0.05),
    phases={"stable": MINICPM4_STABLE, "decay": MINICPM4_DECAY},
  )
  qat = config.QATConfig(share=0.4, lr_peak=5e-3, rewarmup_steps=2000)
  _, second = config.qat_stages(whole, qat, first_workdir=f"runs/{dense}")
  return dataclasses.replace(second, name=name)


def apply(cfg: config.TrainConfig, arg: str) -> config.TrainConfig:
  """`cfg` after the words of `arg` (module docstring)."""
  words = [word.strip() for word in arg.split(",") if word.strip()]
  named = dict(word.split("=", 1) for word in words if "=" in word)
  bare = [word for word in words if "=" not in word]
  for word in bare:
    if word != "tiny":
      raise ValueError(f"config arg: found {word!r}, expected tiny, steps=N or FIELD=VALUE")
  if "tiny" in bare:
    cfg = _tiny(cfg)
    named.setdefault("steps", "20")
  if "steps" in named:
    text = named.pop("steps")
    if not text.isdigit() or int(text) == 0:
      raise ValueError(f"config arg: found steps={text!r}, expected an integer > 0")
    cfg = scaled(cfg, int(text))
  return config.overrides(cfg, [f"{name}={value}" for name, value in named.items()])


def scaled(cfg: config.TrainConfig, num_steps: int) -> config.TrainConfig:
  """The whole run in `num_steps`: stages, half-life and phase starts keep their shares."""
  old = cfg.optim.schedule
  share = num_steps / cfg.num_steps
  warmup = min(old.warmup_steps, max(1, num_steps // 10))
  decay = max(1, round(old.decay_steps * share)) if old.decay_steps else 0
  decay = min(decay, num_steps - warmup)
  schedule = dataclasses.replace(
    old,
    warmup_steps=warmup,
    stable_steps=num_steps - warmup - decay,
    decay_steps=decay,
    half_life_steps=max(1, round(old.half_life_steps * share)),
  )
  phases = []
  for phase in cfg.data.phases:
    is_decay = phase.start_step == old.decay_start and old.decay_steps > 0
    start = schedule.decay_start if is_decay else round(phase.start_step * share)
    phases.append(dataclasses.replace(phase, start_step=start))
  return dataclasses.replace(
    cfg,
    optim=dataclasses.replace(cfg.optim, schedule=schedule),
    data=dataclasses.replace(cfg.data, phases=tuple(phases)),
    checkpoint=dataclasses.replace(cfg.checkpoint, keep_steps=(schedule.decay_start,)),
    num_steps=num_steps,
  )


def _tiny(cfg: config.TrainConfig) -> config.TrainConfig:
  sparse = cfg.model.sparse
  if sparse is not None:  # 3 of the 4 blocks of a row
    sizes = dict(kernel_size=4, kernel_stride=2, block_size=8, window_size=8, topk=2, dense_len=-1)
    sparse = dataclasses.replace(sparse, **sizes)
  model = zoo.tiny(cfg.model, dtype="f32", remat="none", vocab_multiple=1, sparse=sparse)
  align = 1 if sparse is None else sparse.alignment
  return dataclasses.replace(
    cfg,
    name=f"tiny_{cfg.name}",
    model=model,
    data=dataclasses.replace(cfg.data, seq_len=32, batch_size=8, align=align),
    mesh=config.MeshConfig(),
    grad_accum=1,
    log_every=1,
  )
