"""What the suites of `experiments.tunnel` share: scales, context, names, tables."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from minicpm_jax import config
from minicpm_jax.tunnel import corpus as corpus_lib
from minicpm_jax.tunnel import plan, records, run

SEQ_LEN, ROWS, HELDOUT_ROWS = 64, 16, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
  """How much is run; lengths in steps of 1024 tokens."""

  seeds: int
  mup_widths: tuple[int, ...]
  mup_lrs: tuple[float, ...]
  sp_lrs: tuple[float, ...]  # also run under the standard parameterisation
  mup_steps: int
  wsd_width: int
  wsd_lengths: tuple[int, ...]
  wsd_seeds: int
  law_widths: tuple[int, ...]
  law_lengths: tuple[int, ...]
  law_seeds: int
  bench_lengths: tuple[int, ...]  # shorter runs that only ScalingBench scores
  batch_widths: tuple[int, ...]
  batch_rows: tuple[int, ...]
  batch_tokens: int
  table_lengths: tuple[int, ...]
  table_widths: tuple[int, ...]
  stage_steps: int
  search_calls: int


SCALES = {
  "toy": Scale(
    seeds=2,
    mup_widths=(32, 64, 128),
    mup_lrs=(0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    sp_lrs=(0.0005, 0.001),
    mup_steps=300,
    wsd_width=64,
    wsd_lengths=(200, 400, 800, 1600),
    wsd_seeds=2,
    law_widths=(32, 48, 64, 96),
    law_lengths=(400, 800, 1600, 3200),
    law_seeds=2,
    bench_lengths=(12, 25, 50, 100, 200),
    batch_widths=(32, 48, 64),
    batch_rows=(1, 2, 4, 8, 16),
    batch_tokens=1_000_000,
    table_widths=(32, 64),
    table_lengths=(400, 1600),
    stage_steps=800,
    search_calls=24,
  ),
  "quick": Scale(
    seeds=2,
    mup_widths=(32, 128),
    mup_lrs=(0.004, 0.008, 0.016, 0.032),
    sp_lrs=(0.0005, 0.001, 0.002),
    mup_steps=150,
    wsd_width=32,
    wsd_lengths=(400, 800),
    wsd_seeds=2,
    law_widths=(16, 32, 48, 64),
    law_lengths=(200, 400, 800, 1600),
    law_seeds=1,
    bench_lengths=(12, 25, 50, 100),
    batch_widths=(16, 32),
    batch_rows=(1, 2, 4, 8, 16),
    batch_tokens=400_000,
    table_widths=(32, 64),
    table_lengths=(200, 400),
    stage_steps=400,
    search_calls=12,
  ),
  "tiny": Scale(  # for tests: shows that it runs, nothing else
    seeds=1,
    mup_widths=(16, 32),
    mup_lrs=(0.004, 0.016, 0.064),
    sp_lrs=(0.002,),
    mup_steps=8,
    wsd_width=16,
    wsd_lengths=(40,),
    wsd_seeds=1,
    law_widths=(16, 32, 48),
    law_lengths=(30, 40, 50),
    law_seeds=1,
    bench_lengths=(8,),
    batch_widths=(16,),
    batch_rows=(4, 8, 16),
    batch_tokens=16_384,
    table_widths=(16,),
    table_lengths=(30,),
    stage_steps=40,
    search_calls=3,
  ),
}


@dataclasses.dataclass
class Context:
  """One invocation: the scale, the text, where runs lie."""

  scale: Scale
  corpus: corpus_lib.Corpus
  workdir: pathlib.Path
  log: Callable[[str], None] = print

  def runner(self, suite: str, corpus: corpus_lib.Corpus | None = None, **rows) -> run.Runner:
    """A runner in a folder of the suite's own; held-out rows of "text", or those given."""
    corpus = corpus or self.corpus
    rows = rows or {"text": corpus.heldout_rows("text", num_rows=HELDOUT_ROWS, seq_len=SEQ_LEN)}
    return run.Runner(corpus, self.workdir / suite, rows, log=self.log)

  def model(self, width: int, mode: plan.Mode = "matrix", **more) -> config.ModelConfig:
    return plan.small_model(width, mode, vocab_size=self.corpus.vocab_size, **more)


def adam(lr: float, schedule: config.ScheduleConfig, *, is_mup: bool = True) -> config.OptimConfig:
  """Adam (0.9, 0.95), clip 1, no weight decay (training.md 13.1)."""
  return config.OptimConfig(peak_lr=lr, schedule=schedule, weight_decay=0.0, mup=is_mup)


def cosine(total: int, warmup: int = 20) -> config.ScheduleConfig:
  """Cosine(T): to 10% of the peak at T, then flat."""
  return config.ScheduleConfig(
    kind="cosine", warmup_steps=warmup, decay_steps=total - warmup, min_ratio=0.1
  )


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
  """(mean, largest - smallest) over seeds."""
  found = np.array(list(values), np.float64)
  return float(found.mean()), float(np.ptp(found))


def signed(values: Iterable[float]) -> str:
  """ "+0.0123, -0.0004": one number a seed."""
  return ", ".join(f"{v:+.4f}" for v in values)


def total_cpu(results: Iterable[records.Result]) -> float:
  return sum(result.cpu_seconds for result in results)
