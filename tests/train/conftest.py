"""Tiny models and batches shared by the tests of the training layer."""

import dataclasses
import pathlib

import numpy as np
import pytest

from minicpm_jax import config
from tests import words

VOCAB, ROWS, SEQ = words.NumberTokenizer.vocab_size, 8, 32


def model_config(**changes) -> config.ModelConfig:
  base = words.model_config(VOCAB, scale_emb=12.0, scale_depth=1.4, dim_model_base=16)
  return dataclasses.replace(base, **changes)


def packed_batch(seed: int = 0, rows: int = ROWS, seq: int = SEQ) -> dict[str, np.ndarray]:
  """Rows of two or three documents with padding at the end; a different number of targets each."""
  rng = np.random.default_rng(seed)
  batch = {
    name: np.zeros((rows, seq), np.int32)
    for name in ("tokens", "targets", "segment_ids", "positions", "source_ids")
  }
  batch["loss_mask"] = np.zeros((rows, seq), np.float32)
  for row in range(rows):
    start = 0
    for segment in range(1, 3 + row % 2):
      length = int(rng.integers(4, 12))
      document = rng.integers(0, VOCAB, length)
      here = slice(start, start + length)
      batch["tokens"][row, here] = document
      batch["targets"][row, start : start + length - 1] = document[1:]
      batch["loss_mask"][row, start : start + length - 1] = rng.random(length - 1) < 0.8
      batch["segment_ids"][row, here] = segment
      batch["positions"][row, here] = np.arange(length)
      start += length
  batch["targets"] *= (batch["loss_mask"] > 0).astype(np.int32)
  return batch


def write_source(folder: pathlib.Path, name: str, seed: int, sizes: tuple[int, int] = (5, 60)):
  """A shard folder of 40 random documents."""
  rng = np.random.default_rng(seed)
  docs = [rng.integers(2, VOCAB, rng.integers(*sizes)) for _ in range(40)]
  return words.write_source(folder, name, map(words.text_of, docs))


@pytest.fixture(scope="session")
def train_config(tmp_path_factory) -> config.TrainConfig:
  """Six steps of WSD, sources a (stable) and a + b (decay), c held out; programs are cached."""
  folder = tmp_path_factory.mktemp("sources")
  return config.TrainConfig(
    model=model_config(),
    optim=config.OptimConfig(
      peak_lr=0.02, schedule=config.ScheduleConfig(warmup_steps=1, stable_steps=2, decay_steps=3)
    ),
    data=config.DataConfig(
      sources=tuple(write_source(folder, name, i) for i, name in enumerate("abc")),
      phases=(
        config.PhaseConfig(name="stable", weights=(("a", 1.0),)),
        config.PhaseConfig(name="decay", start_step=3, weights=(("a", 0.5), ("b", 0.5))),
      ),
      seq_len=SEQ,
      batch_size=ROWS,
    ),
    checkpoint=config.CheckpointConfig(every_steps=3),
    num_steps=6,
    log_every=1,
    compilation_cache=str(tmp_path_factory.mktemp("programs")),
  )


class Tiny:
  """What the tests import: conftest files are not importable under importlib mode."""

  model_config = staticmethod(model_config)
  packed_batch = staticmethod(packed_batch)
  vocab, rows, seq = VOCAB, ROWS, SEQ


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
  return Tiny
