"""Config of `experiments.distill_draft` from its flags."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import build_fr_index
from minicpm_jax import config
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import convert
from minicpm_jax.models import draft as draft_lib

PEAK_LR = {"eagle": 3e-5, "minicpm": 3e-5, "eagle3": 5e-5}  # EAGLE's, for 800k steps
PEAK_LR["bita"] = 3e-2  # BiTA's, cosine, batches of 128 x 2048 tokens


def folder(path: str) -> pathlib.Path:
  return pathlib.Path(path).absolute()


def make_config(values: flags.FlagValues, target: config.ModelConfig) -> config.DistillConfig:
  """EAGLE's recipe for this target and these sources."""
  return distill_config(
    target,
    values.target,
    values.kind,
    values.data,
    values.steps,
    draft_vocab=values.draft_vocab,
    from_mtp=values.from_mtp,
    init_from=values.init_from,
    window=values.window,
    int4=values.int4,
    ternary=values.ternary,
    needs_data=not values.prompts,
  )


def distill_config(
  target: config.ModelConfig,
  target_path: str,
  kind: str,
  data: Sequence[str],
  steps: int,
  *,
  draft_vocab: str | None = None,
  from_mtp: bool = False,
  init_from: str | None = None,
  window: int = 0,
  int4: int = 0,
  ternary: int = 0,
  needs_data: bool = True,
) -> config.DistillConfig:
  """A DistillConfig with linear warm-up (1/400 of the steps, at least 20) and linear decay.

  needs_data: whether `data` must name a source to train on (else one is put in later).
  """
  if kind == "bita" and (draft_vocab is not None or from_mtp or window or int4 or ternary):
    raise ValueError(
      "--draft_vocab, --from_mtp, --window, --int4, --ternary: found one with --kind=bita, which "
      "has no layer"
    )
  if int4 and ternary:
    raise ValueError(f"--int4, --ternary: found {int4} and {ternary}, expected one of them")
  changes: dict[str, Any] = {"window_size": window}
  if draft_vocab is not None:
    changes["draft_vocab_size"] = build_fr_index.size_of(draft_vocab, target.vocab_size)
  if kind == "bita":
    draft = bita_lib.for_target(target)
  elif from_mtp:
    draft = dataclasses.replace(convert.mtp_draft_config(target), **changes)
  else:
    draft = draft_lib.for_target(target, kind, **changes)
  if int4 or ternary:
    scheme = "int4" if int4 else "ternary"
    draft = draft_lib.quantized(draft, int4 or ternary, scheme=scheme)
  warmup = min(max(steps // 400, 20), max(steps // 4, 1))
  is_bita = kind == "bita"
  schedule = config.ScheduleConfig(
    kind="cosine" if is_bita else "wsd",
    warmup_steps=warmup,
    decay_steps=steps - warmup,
    decay_shape="linear_to",
    min_ratio=0.0,
  )
  clip_norm = 1.0 if is_bita else 0.0  # the others are clipped element by element
  optim = config.OptimConfig(
    peak_lr=PEAK_LR[kind], schedule=schedule, clip_norm=clip_norm, weight_decay=0.0, mup=False
  )
  more = dict(grad_clip_value=0.0, eval_depth=draft.num_masks) if is_bita else {}
  found, weights, held_out = [], [], []
  for text in data:
    name, sep, rest = text.partition(":")
    path, _, weight = rest.partition(":")
    if not name or not sep or not path:
      raise ValueError(f"--data: found {text!r}, expected NAME:PATH[:WEIGHT|:eval]")
    found.append(config.SourceConfig(name=name, path=path))
    if weight == "eval":
      held_out.append(name)
    else:
      weights.append((name, float(weight or 1)))
  if not weights and needs_data:
    raise ValueError(f"--data: found {list(data)}, expected at least one source to train on")
  return config.DistillConfig(
    target=target_path,
    draft=draft,
    optim=optim,
    data=config.DataConfig(
      sources=tuple(found),
      phases=(config.PhaseConfig(weights=tuple(weights)),) if weights else (),
      seq_len=min(2048, target.max_position),
      batch_size=4,
    ),
    init_from=init_from,
    from_mtp=from_mtp,
    num_steps=steps,
    log_every=max(steps // 40, 1),
    eval_every=max(steps // 10, 1),
    eval_sources=tuple(held_out),
    checkpoint=config.CheckpointConfig(every_steps=max(steps // 5, 1)),
    **more,
  )
