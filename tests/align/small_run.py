"""A few steps of draft training on made-up text, for the tests of runs."""

import numpy as np

from experiments import _regenerate
from minicpm_jax import config
from minicpm_jax.data import documents, shards
from minicpm_jax.models import draft as draft_lib


def source(folder, name, seed):
  rng = np.random.default_rng(seed)
  texts = [" ".join(map(str, rng.integers(0, 256, 40) ** 2 // 256)) for _ in range(20)]
  docs, ids = documents.from_texts(texts), _regenerate.Ids(256)
  shards.prepare(docs, folder / name, name=name, tokenizer=ids, add_eos=False)
  return config.SourceConfig(name=name, path=str(folder / name))


def distill(target_cfg, folder, draft_vocab_size, **changes):
  """EAGLE-3 of `target_cfg` on sources written to `folder`; `changes` go over the fields here."""
  fields = dict(
    target="in memory",
    draft=draft_lib.for_target(target_cfg, "eagle3", draft_vocab_size=draft_vocab_size),
    optim=config.OptimConfig(
      peak_lr=0.01, schedule=config.ScheduleConfig(warmup_steps=1, stable_steps=9), mup=False
    ),
    data=config.DataConfig(
      sources=(source(folder, "text", 0), source(folder, "held", 1)),
      phases=(config.PhaseConfig(weights=(("text", 1.0),)),),
      seq_len=16,
      batch_size=8,
    ),
    checkpoint=config.CheckpointConfig(every_steps=2),
    ttt_steps=2,
    eval_depth=2,
    eval_sources=("held",),
    eval_batches=1,
    eval_every=2,
    log_every=2,
    num_steps=4,
  )
  return config.DistillConfig(**fields | changes)
