"""Which source gives the next row: exact shares, decided by counts alone (data.md section 8).

Rows of packed tokens are mixed, not documents, so shares of rows are shares of tokens. The choice
is global over hosts; `deal` hands the rows of one step out to the hosts.
"""

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


def phase_at(phases: Sequence[data_config.PhaseConfig], step: int) -> data_config.PhaseConfig:
  """The phase that batch `step` (0-based) belongs to."""
  return [phase for phase in phases if phase.start_step <= step][-1]
