"""Rounds of the classifier: classes, stop rule, what is recorded."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.data import classifier, rounds, ultraclean
from minicpm_jax.data.documents import Doc

WORDS = ultraclean.WhitespaceSegmenter()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(own=st.integers(1, 40), new=st.integers(0, 90), mult=st.sampled_from([0.5, 1.0, 1.7, 3.0]))
def test_a_class_is_capped_and_half_of_it_are_seeds(own, new, mult):
  seeds = [Doc(id=f"s{i}", text="x") for i in range(own)]
  found = [Doc(id=f"n{i}", text="x") for i in range(new)]
  chosen, count = rounds.mix(seeds, found, rounds.RoundsConfig(mult=mult))
  assert len(chosen) <= max(round(mult * own), 1)
  assert sum(d.id[0] == "n" for d in chosen) == count <= len(chosen) / 2
  assert len({d.id for d in chosen}) == len(chosen)
  if mult == 1.0:
    assert len(chosen) == own and count == min(new, own // 2)


def iterate(planted_docs, values, **changes):
  pytest.importorskip("fasttext")
  dev = [
    *classifier.rows(planted_docs(True, 30, 9), True, WORDS),
    *classifier.rows(planted_docs(False, 30, 9), False, WORDS),
  ]
  cfg = dataclasses.replace(classifier.preset("test"), min_count=1, bucket=2000, epochs=25)
  sizes, told = [], []

  def train(positives, negatives):
    sizes.append((len(positives), len(negatives)))
    rows = [
      *classifier.rows(positives, True, WORDS),
      *classifier.rows(negatives, False, WORDS),
    ]
    return classifier.train(rows[::2] + rows[1::2], cfg, WORDS)

  result = rounds.run(
    planted_docs(True, 40),
    planted_docs(False, 40),
    fresh=lambda r: planted_docs(True, 30, 100 + r) + planted_docs(False, 60, 100 + r),
    train=train,
    dev_rows=dev,
    verify=lambda model, r: values[r],
    cfg=rounds.RoundsConfig(**changes),
    on_round=told.append,
  )
  assert tuple(told) == result.rounds
  return result, sizes


@pytest.mark.parametrize(
  "values, max_rounds, count, best, stopped",
  [
    ([50.0, 50.05, 99.0], 5, 2, 1, "gain"),  # gain 0.05 < eps: no third round
    ([50.0, 49.0], 5, 2, 0, "gain"),  # a loss: the classifier before it stands
    ([50.0, 51.0, 52.0, 53.0], 3, 3, 2, "max_rounds"),
    ([50.0, 50.1, 50.3, 50.3], 9, 4, 2, "gain"),  # a gain of eps goes on
  ],
)
def test_stop_rule(planted_docs, values, max_rounds, count, best, stopped):
  result, _ = iterate(planted_docs, values, max_rounds=max_rounds, eps=0.0999)
  assert (len(result.rounds), result.best, result.stopped) == (count, best, stopped)
  assert result.classifier is result.classifiers[best]


def test_what_is_recorded(planted_docs):
  result, sizes = iterate(planted_docs, [1.0, 2.0, 3.0])
  first, second, third = result.rounds
  assert sizes == [(40, 40)] * 3 == [(r.positives, r.negatives) for r in result.rounds]
  assert first.inferred_positives == first.inferred_negatives == 0
  assert 0 < second.inferred_positives <= 20 and second.inferred_negatives == 20
  assert first.agreement is None and third.agreement == pytest.approx(1.0, abs=0.05)
  assert first.keep_rate == pytest.approx(1 / 3, abs=0.05) and first.num_fresh == 90
  assert first.gain is None and third.gain == pytest.approx(1.0)
  assert first.dev.num_rows == 60 and first.dev.accuracy > 0.95


def test_text_is_used_once_and_its_end_stops(planted_docs):
  pytest.importorskip("fasttext")
  dev = [(True, "theorem proof"), (False, "buy cheap")]
  cfg = dataclasses.replace(classifier.preset("test"), min_count=1, bucket=2000)

  def train(positives, negatives):
    rows = [*classifier.rows(positives, True, WORDS), *classifier.rows(negatives, False, WORDS)]
    return classifier.train(rows, cfg, WORDS)

  result = rounds.run(
    planted_docs(True, 20),
    planted_docs(False, 20),
    fresh=lambda r: planted_docs(True, 10) + planted_docs(True, 5, 50),  # seeds, and the same five
    train=train,
    dev_rows=dev,
    verify=lambda model, r: float(r),
    cfg=rounds.RoundsConfig(max_rounds=5),
  )
  assert [r.num_fresh for r in result.rounds] == [5, 0] and result.stopped == "no_fresh_text"
  with pytest.raises(ValueError, match="found 1 ids in both classes"):
    same = planted_docs(True, 1)
    rounds.run(
      same,
      same,
      fresh=lambda r: [],
      train=train,
      dev_rows=dev,
      verify=lambda m, r: 0.0,
      cfg=rounds.RoundsConfig(),
    )
  with pytest.raises(ValueError, match="rounds.lo, hi: found 0.9, 0.1"):
    rounds.RoundsConfig(lo=0.9, hi=0.1)
