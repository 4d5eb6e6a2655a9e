"""Tiny models and batches shared by the tests of the training layer."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax import config

VOCAB, ROWS, SEQ = 64, 8, 32


def model_config(**changes) -> config.ModelConfig:
  base = config.ModelConfig(
    name="test",
    vocab_size=VOCAB,
    model_dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=16,
  )
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


class Tiny:
  """What the tests import: conftest files are not importable under importlib mode."""

  model_config = staticmethod(model_config)
  packed_batch = staticmethod(packed_batch)
  vocab, rows, seq = VOCAB, ROWS, SEQ


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
  return Tiny
