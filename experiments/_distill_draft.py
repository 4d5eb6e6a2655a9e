"""Config of `experiments.distill_draft` from its flags, and text that the target writes itself."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import build_fr_index
from minicpm_jax import config
from minicpm_jax.data import documents, shards, sources
from minicpm_jax.infer import generate
from minicpm_jax.models import convert
from minicpm_jax.models import draft as draft_lib

PEAK_LR = {"eagle": 3e-5, "minicpm": 3e-5, "eagle3": 5e-5}  # EAGLE's, for 800k steps
PROMPT_TOKENS = 32  # of a document, before the target goes on
GENERATE_BATCH = 64


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
) -> config.DistillConfig:
  """A DistillConfig with linear warm-up (1/400 of the steps, at least 20) and linear decay."""
  changes: dict[str, Any] = {"window_size": window}
  if draft_vocab is not None:
    changes["draft_vocab_size"] = build_fr_index.size_of(draft_vocab, target.vocab_size)
  if from_mtp:
    draft = dataclasses.replace(convert.mtp_draft_config(target), **changes)
  else:
    draft = draft_lib.for_target(target, kind, **changes)
  if int4:
    draft = draft_lib.quantized(draft, int4)
  warmup = min(max(steps // 400, 20), max(steps // 4, 1))
  schedule = config.ScheduleConfig(
    warmup_steps=warmup, decay_steps=steps - warmup, decay_shape="linear_to", min_ratio=0.0
  )
  optim = config.OptimConfig(
    peak_lr=PEAK_LR[kind], schedule=schedule, clip_norm=0.0, weight_decay=0.0, mup=False
  )
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
  if not weights:
    raise ValueError(f"--data: found {list(data)}, expected at least one source to train on")
  return config.DistillConfig(
    target=target_path,
    draft=draft,
    optim=optim,
    data=config.DataConfig(
      sources=tuple(found),
      phases=(config.PhaseConfig(weights=tuple(weights)),),
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
  )


class _Ids:
  """A tokenizer whose text is token ids: generated tokens go into shards as they are."""

  bos_id = eos_id = pad_id = chat_template = None
  stop_ids, add_bos = (), False

  def __init__(self, vocab_size: int):
    self.vocab_size, self.special_tokens = vocab_size, {}

  def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    return " ".join(map(str, ids))

  def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = True) -> bytes:
    return self.decode(ids).encode()

  def save(self, folder: Any) -> None:
    (pathlib.Path(folder) / "ids").write_text(f"{self.vocab_size}")


def regenerate(
  cfg: config.DistillConfig, target: Any, workdir: pathlib.Path, values: flags.FlagValues
) -> config.DistillConfig:
  """`cfg` on documents that the target wrote, kept in WORKDIR/generated."""
  sampling = config.SamplingConfig(
    temperature=values.regenerate_temperature, max_new_tokens=values.regenerate_tokens
  )
  held_out = [s for s in cfg.data.sources if s.name in cfg.eval_sources]
  made, tested = (workdir / "generated" / name for name in ("train", "heldout"))
  trained = [s.path for s in cfg.data.sources if s.name not in cfg.eval_sources]
  write_generated(made, target, trained, values.regenerate, sampling)
  write_generated(tested, target, [s.path for s in held_out] or trained, 64, sampling, seed=1)
  entries = {"generated": made, "generated_heldout": tested}
  data = dataclasses.replace(
    cfg.data,
    sources=(
      *held_out,
      *(config.SourceConfig(name=name, path=str(path)) for name, path in entries.items()),
    ),
    phases=(config.PhaseConfig(weights=(("generated", 1.0),)),),
  )
  return dataclasses.replace(cfg, data=data, eval_sources=(*cfg.eval_sources, "generated_heldout"))


def write_generated(
  out: pathlib.Path,
  target: Any,
  paths: Sequence[str],
  num_documents: int,
  sampling: config.SamplingConfig,
  *,
  seed: int = 0,
) -> None:
  """A shard folder of beginnings of documents that the target has gone on with; kept if there."""
  if (out / shards.INDEX_FILE).exists():
    return
  model, params, tok = target
  model, params = generate.for_decoding(model, params)
  stops = () if tok is None else tok.stop_ids
  prompts = list(beginnings(paths, num_documents, seed))
  texts = []
  for first in range(0, len(prompts), GENERATE_BATCH):
    some = prompts[first : first + GENERATE_BATCH]
    answer = generate.generate(model, params, some, sampling, stop_ids=stops)
    texts += [" ".join(map(str, (*p, *t))) for p, t in zip(some, answer.tokens, strict=True)]
    print(f"{out}: {len(texts)} of {len(prompts)} documents", flush=True)
  ids = _Ids(model.cfg.vocab_size)
  shards.prepare(documents.from_texts(texts), out, name=out.name, tokenizer=ids, add_eos=False)


def beginnings(paths: Sequence[str], num: int, seed: int) -> Iterator[list[int]]:
  """The first tokens of `num` documents, taken in turns from the sources in a shuffled order."""
  opened = [sources.open_source(f"source{i}", path) for i, path in enumerate(paths)]
  orders = [iter(np.random.default_rng(seed).permutation(len(s))) for s in opened]
  count = 0
  while count < num:
    any_left = False
    for source, order in zip(opened, orders, strict=True):
      index = next((i for i in order if len(source[int(i)]) >= PROMPT_TOKENS), None)
      if index is None or count == num:
        continue
      any_left, count = True, count + 1
      yield [int(t) for t in source[int(index)][:PROMPT_TOKENS]]
    if not any_left:
      return
