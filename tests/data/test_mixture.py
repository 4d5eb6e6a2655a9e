"""Exact shares of rows."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax import config
from minicpm_jax.data import mixture


@settings(max_examples=25, deadline=None, derandomize=True)
@given(weights=st.lists(st.integers(0, 100), min_size=1, max_size=6).filter(any))
def test_every_prefix_has_the_shares_of_its_length(weights):
  phase = config.PhaseConfig(weights=tuple((f"s{i}", float(w)) for i, w in enumerate(weights)))
  share = mixture.shares(phase)
  assert sum(share.values()) == pytest.approx(1)
  rows = collections.Counter()
  for n in range(1, 300):
    rows[mixture.next_source(rows, share)] += 1
    for i, weight in enumerate(weights):
      assert abs(rows[f"s{i}"] - n * weight / sum(weights)) < len(weights)
      assert rows[f"s{i}"] <= n * weight / sum(weights) + 1
  assert not any(rows[f"s{i}"] for i, weight in enumerate(weights) if weight == 0)


def test_deal_is_a_permutation_that_all_hosts_share():
  assignment = ["a"] * 6 + ["b"] * 2
  first, second = mixture.deal(assignment, 3, seed=1), mixture.deal(assignment, 3, seed=1)
  assert first == second
  assert sorted(first) == assignment
  assert len({tuple(mixture.deal(assignment, step, seed=1)) for step in range(20)}) > 5


def test_phase_at():
  phases = [
    config.PhaseConfig(name=n, start_step=s, weights=(("a", 1.0),))
    for n, s in (("stable", 0), ("decay", 10))
  ]
  names = [mixture.phase_at(phases, step).name for step in (0, 9, 10, 99)]
  assert names == ["stable", "stable", "decay", "decay"]
  with pytest.raises(ValueError, match="data.phases: found none at step 3"):
    mixture.phase_at((), 3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(percent=st.integers(1, 100), rows=st.integers(1, 400))
def test_replaced_places_are_fixed_and_have_their_share(percent, rows):
  phase = config.PhaseConfig(weights=(("a", 1.0),), replace=("c", percent / 100))
  places = [mixture.replaced(phase, row) for row in range(rows)]
  assert set(places) <= {"c", None}
  assert places.count("c") == rows * percent // 100
