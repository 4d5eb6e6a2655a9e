"""The stage that scores documents with the classifiers and drops those below the threshold."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from minicpm_jax.config import validate
from minicpm_jax.data import classifier, ultraclean
from minicpm_jax.data.documents import Doc, Dropped

_LOADED: dict[tuple[str, str], classifier.Classifier] = {}  # one copy a worker process


@dataclasses.dataclass(frozen=True)
class Model:
  """A classifier file as a stage names it; the fingerprint makes a retrained one another stage."""

  lang: str  # "" = every language without a model of its own
  path: str
  fingerprint: str
  segmenter: ultraclean.Segmenter

  def load(self) -> classifier.Classifier:
    key = (self.path, self.fingerprint)
    if key not in _LOADED:
      loaded = classifier.load(self.path, self.segmenter)
      if loaded.sidecar["fingerprint"] != self.fingerprint:
        raise classifier.ClassifierError(
          f"{self.path}: fingerprint: found {loaded.sidecar['fingerprint']}, expected "
          f"{self.fingerprint} (the file was replaced after the stage was made)"
        )
      _LOADED[key] = loaded
    return _LOADED[key]


@dataclasses.dataclass(frozen=True)
class ScoreStage:
  """Puts the score on every document; keeps those of at least `threshold` (ties stay).

  Documents in a language without a model are dropped ("lang"). Picklable: a worker process reads
  each model once.
  """

  name: ClassVar[str] = "quality"
  models: tuple[Model, ...]
  threshold: float = classifier.THRESHOLD

  def __post_init__(self):
    validate.require_hints(self, "quality.", least=0)

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    models = {model.lang: model for model in self.models}
    for doc in docs:
      model = models.get(doc.lang) or models.get("")
      if model is None:
        known = ", ".join(sorted(models))
        yield Dropped(doc.id, "lang", f"found {doc.lang!r}, there are classifiers for {known}")
        continue
      loaded = model.load()
      line = ultraclean.normalise(doc.text, loaded.segmenter, max_chars=loaded.max_chars)
      score = loaded.score_line(line)
      if not line:
        yield Dropped(doc.id, "empty", "nothing is left after normalisation")
      elif score < self.threshold:
        yield Dropped(doc.id, "score", f"{score:.4f}")
      else:
        yield dataclasses.replace(doc, score=score)


def score_stage(
  paths: Mapping[str, str | os.PathLike[str]],
  segmenters: Mapping[str, ultraclean.Segmenter],
  *,
  threshold: float = classifier.THRESHOLD,
) -> ScoreStage:
  """A ScoreStage for {language: model file}; each file is loaded here once, to check it."""
  models = []
  for lang, path in sorted(paths.items()):
    model = Model(lang, os.fspath(path), classifier.fingerprint(path), segmenters[lang])
    model.load()
    models.append(model)
  return ScoreStage(tuple(models), threshold)
