"""Iteration of the classifier (data.md 2.5): what it infers trains the next one, until verification
gains less than `eps`.

Round r trains C_r and scores a fresh raw sample U_r. The classes of round r + 1 are seeds plus the
documents of U_r scored at least `hi` or at most `lo`. A class has at most `mult` times as many
documents as it has seeds, and at least half of it are original seeds, so it cannot drift away.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from minicpm_jax.config import validate
from minicpm_jax.data import classifier, seeds
from minicpm_jax.data.documents import Doc


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig:
  """Parameters of the iteration; not stated in the report, ours."""

  hi: float = 0.9  # inferred positives: score >= hi
  lo: float = 0.1  # inferred negatives: score <= lo
  mult: float = 1.0  # size of a class / number of its seeds
  eps: float = 0.1  # stop below this verification gain, points
  max_rounds: int = 3
  seed: int = 0

  def __post_init__(self):
    validate.require_hints(self, "rounds.", least=0)
    if not 0 <= self.lo < self.hi <= 1:
      raise ValueError(f"rounds.lo, hi: found {self.lo}, {self.hi}, expected 0 <= lo < hi <= 1")
    if not 0 < self.mult < math.inf or self.max_rounds < 1:
      raise ValueError(
        f"rounds.mult, max_rounds: found {self.mult}, {self.max_rounds}, expected > 0 and >= 1"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
  """What happened in one round."""

  number: int
  positives: int
  negatives: int
  inferred_positives: int
  inferred_negatives: int
  dev: classifier.Evaluation
  num_fresh: int
  keep_rate: float | None  # on U_r; None when there is no fresh text left
  agreement: float | None  # share of U_r on which C_r and C_{r-1} decide alike
  value: float  # verification, points
  gain: float | None  # over the round before


@dataclasses.dataclass(frozen=True)
class Result:
  """All rounds; `best` indexes the one whose classifier stands."""

  rounds: tuple[Round, ...]
  classifiers: tuple[classifier.Classifier, ...]
  best: int
  stopped: str  # "gain", "max_rounds" or "no_fresh_text"

  @property
  def classifier(self) -> classifier.Classifier:
    return self.classifiers[self.best]


def run(
  positives: Sequence[Doc],
  negatives: Sequence[Doc],
  *,
  fresh: Callable[[int], Iterable[Doc]],
  train: Callable[[Sequence[Doc], Sequence[Doc]], classifier.Classifier],
  dev_rows: Sequence[classifier.Row],
  verify: Callable[[classifier.Classifier, int], float],
  cfg: RoundsConfig,
  on_round: Callable[[Round], None] | None = None,
) -> Result:
  """Rounds until the gain in `verify` is below `eps`, `max_rounds` are done or text runs out.

  `fresh(r)` gives U_r; documents of earlier rounds, seeds and dev rows must not be in it (ids seen
  before are left out). `verify(C_r, r)` is the costly check, in points: a downstream accuracy or
  any number that grows with quality. `dev_rows` stay the same in all rounds.
  """
  _check_seeds(positives, negatives)
  seen = {doc.id for doc in [*positives, *negatives]}
  found, models, previous = [], [], None
  inferred: tuple[list[Doc], list[Doc]] = ([], [])
  while True:
    number = len(found)
    classes, counts = [], []
    for own, new in zip((positives, negatives), inferred, strict=True):
      docs, count = mix(own, new, cfg)
      classes.append(docs)
      counts.append(count)
    model = train(*classes)
    sample = _unseen(fresh(number), seen)
    scores = model.score_batch([doc.text for doc in sample])
    kept = scores >= classifier.THRESHOLD
    agreement = None
    if previous is not None and sample:
      before = previous.score_batch([doc.text for doc in sample]) >= classifier.THRESHOLD
      agreement = float((before == kept).mean())
    value = verify(model, number)
    this = Round(
      number=number,
      positives=len(classes[0]),
      negatives=len(classes[1]),
      inferred_positives=counts[0],
      inferred_negatives=counts[1],
      dev=classifier.evaluate(model, dev_rows),
      num_fresh=len(sample),
      keep_rate=float(kept.mean()) if sample else None,
      agreement=agreement,
      value=value,
      gain=value - found[-1].value if found else None,
    )
    found.append(this)
    models.append(model)
    if on_round is not None:
      on_round(this)
    if reason := stop_reason(found, cfg):
      best = max(range(len(found)), key=lambda r: (found[r].value, -r))
      return Result(tuple(found), tuple(models), best, reason)
    inferred = (
      [doc for doc, score in zip(sample, scores, strict=True) if score >= cfg.hi],
      [doc for doc, score in zip(sample, scores, strict=True) if score <= cfg.lo],
    )
    previous = model


def stop_reason(found: Sequence[Round], cfg: RoundsConfig) -> str | None:
  """Why no further round follows the last of `found`; None: go on."""
  last = found[-1]
  if last.gain is not None and last.gain < cfg.eps:
    return "gain"
  if len(found) >= cfg.max_rounds:
    return "max_rounds"
  return None if last.num_fresh else "no_fresh_text"


def mix(own: Sequence[Doc], new: Sequence[Doc], cfg: RoundsConfig) -> tuple[list[Doc], int]:
  """(a class of the next round, the number of inferred documents in it).

  At most mult * len(own) documents, of which inferred ones are at most half; both parts are
  uniform samples.
  """
  cap = max(round(cfg.mult * len(own)), 1)
  count = min(len(new), cap // 2, len(own))
  chosen = seeds.hash_order(own, cfg.seed)[: cap - count]
  return chosen + seeds.hash_order(new, cfg.seed)[:count], count


def _check_seeds(positives: Sequence[Doc], negatives: Sequence[Doc]) -> None:
  ids = {doc.id for doc in positives} & {doc.id for doc in negatives}
  if ids:
    raise ValueError(f"seeds: found {len(ids)} ids in both classes ({min(ids)}), expected none")


def _unseen(docs: Iterable[Doc], seen: set[str]) -> list[Doc]:
  """Documents with new ids, whose ids are then old."""
  out = []
  for doc in docs:
    if doc.id not in seen:
      seen.add(doc.id)
      out.append(doc)
  return out
