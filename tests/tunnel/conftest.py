"""A tiny base run at the end of its stable stage, and sources of two kinds of token."""

import pathlib

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.train import loop
from tests import words

VOCAB, ROWS, SEQ = 48, 8, 32


class NumberTokenizer(words.NumberTokenizer):
  vocab_size = VOCAB


def counting(seed: int, count: int = 60) -> list[str]:
  """Documents in which every token is the one before plus 1: predictable."""
  rng = np.random.default_rng(seed)
  starts, sizes = rng.integers(2, VOCAB, count), rng.integers(20, 60, count)
  return [
    " ".join(str(2 + (s + i) % (VOCAB - 2)) for i in range(n))
    for s, n in zip(starts, sizes, strict=True)
  ]


def noise(seed: int, count: int = 60) -> list[str]:
  """Documents of independent uniform tokens: nothing to learn."""
  rng = np.random.default_rng(seed)
  return [" ".join(map(str, rng.integers(2, VOCAB, rng.integers(20, 60)))) for _ in range(count)]


def write(folder: pathlib.Path, name: str, texts: list[str]) -> config.SourceConfig:
  return words.write_source(folder, name, texts, NumberTokenizer())


class Planted:
  """What the tests import: conftest files are not importable under importlib mode."""

  tokenizer = NumberTokenizer
  counting, noise, write = staticmethod(counting), staticmethod(noise), staticmethod(write)
  vocab, rows, seq = VOCAB, ROWS, SEQ


@pytest.fixture(scope="session")
def planted() -> type[Planted]:
  return Planted


@pytest.fixture(scope="session")
def base_config(tmp_path_factory) -> config.TrainConfig:
  """Six stable steps on half counting, half noise; programs are cached."""
  folder = tmp_path_factory.mktemp("sources")
  made = (write(folder, "half", counting(0) + noise(1)), write(folder, "more", noise(2)))
  return config.TrainConfig(
    model=words.model_config(VOCAB, dim_model_base=16),
    optim=config.OptimConfig(
      peak_lr=0.02, schedule=config.ScheduleConfig(warmup_steps=1, stable_steps=100)
    ),
    data=config.DataConfig(
      sources=made,
      phases=(config.PhaseConfig(weights=(("half", 0.8), ("more", 0.2))),),
      seq_len=SEQ,
      batch_size=ROWS,
    ),
    checkpoint=config.CheckpointConfig(every_steps=0),
    num_steps=6,
    log_every=10,
    compilation_cache=str(tmp_path_factory.mktemp("programs")),
  )


@pytest.fixture(scope="session")
def base_run(base_config, tmp_path_factory) -> str:
  """'workdir@6' of the base run."""
  workdir = tmp_path_factory.mktemp("base")
  loop.train(base_config, workdir)
  return f"{workdir}@6"
