"""Which source gives the next row: exact shares, decided by counts alone (data.md section 8).

Rows of packed tokens are mixed, not documents, so shares of rows are shares of tokens. The choice
is global over hosts; `deal` hands the rows of one step out to the hosts.
"""

import collections
import fractions
import math
from collections.abc import Sequence

import numpy as np

from minicpm_jax.config import data as data_config


def shares(phase: data_config.PhaseConfig) -> dict[str, float]:
  """The weights of a phase as fractions; sources of weight 0 are left out."""
  total = sum(weight for _, weight in phase.weights)
  return {name: weight / total for name, weight in phase.weights if weight > 0}


def next_source(rows: dict[str, int], share: dict[str, float]) -> str:
  """The source furthest behind its share if row sum(rows) goes to it; ties to the first one.

  A source never gets more than share * rows + 1 of the first `rows` rows.
  """
  total = sum(rows.values()) + 1
  return max(share, key=lambda name: share[name] * total - rows.get(name, 0))


def deal(assignment: Sequence[str], step: int, seed: int) -> list[str]:
  """The rows of one step in a random order that all hosts agree on.

  Host h takes the h-th block of it. Without this a host could see one source only, because exact
  shares are periodic.
  """
  order = np.random.default_rng([seed, step]).permutation(len(assignment))
  return [assignment[i] for i in order]


def replaced(phase: data_config.PhaseConfig, row: int) -> str | None:
  """The source that takes the place of row `row` (0-based) of the phase, or None.

  Fixed places, evenly spread: a run with `replace` and one without read the same rows everywhere
  else (prefix-consistent streams, data.md 2.6).
  """
  if phase.replace is None:
    return None
  name, share = phase.replace
  share = fractions.Fraction(share).limit_denominator(10**6)
  return name if math.floor((row + 1) * share) > math.floor(row * share) else None


def rows_by_source(cfg: data_config.DataConfig, start: int, stop: int) -> dict[str, int]:
  """Rows of every source in batches start..stop - 1, of all hosts; reads no data."""
  counts: collections.Counter = collections.Counter()
  rows: collections.Counter = collections.Counter()
  for step in range(stop):
    phase = phase_at(cfg.phases, step)
    if phase.start_step == step:
      rows = collections.Counter()
    first, share, assignment = sum(rows.values()), shares(phase), []
    for _ in range(cfg.batch_size):
      assignment.append(next_source(rows, share))
      rows[assignment[-1]] += 1
    if step >= start:
      dealt = deal(assignment, step, cfg.seed)
      counts.update(replaced(phase, first + i) or name for i, name in enumerate(dealt))
  return dict(counts)


def phase_at(phases: Sequence[data_config.PhaseConfig], step: int) -> data_config.PhaseConfig:
  """The phase that batch `step` (0-based) belongs to."""
  begun = [phase for phase in phases if phase.start_step <= step]
  if not begun:
    raise ValueError(
      f"data.phases: found none at step {step}, expected a mixture (no training data?)"
    )
  return begun[-1]
