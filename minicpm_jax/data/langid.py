"""Language identification with py3langid (offline: the model is inside the wheel)."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import ClassVar

from minicpm_jax.config import validate
from minicpm_jax.core import extras
from minicpm_jax.data.documents import Doc, Dropped

# py3langid shares the probability of standard written Chinese between zh and Wu or Cantonese
# (60:40 on Wikipedia), so these count as zh.
_SAME = {"wuu": "zh", "yue": "zh"}
_NUM_RANKED = 5


@functools.cache
def _identifier():
  module = extras.require_extra("py3langid.langid", extra="data")
  return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def identify(text: str, *, max_chars: int = 4000) -> tuple[str, float]:
  """(ISO 639-1 code, probability) of the first `max_chars` characters."""
  scores = {}
  for lang, score in _identifier().rank(text[:max_chars])[:_NUM_RANKED]:
    lang = _SAME.get(lang, lang)
    scores[lang] = scores.get(lang, 0.0) + score
  best = max(scores, key=scores.__getitem__)
  return best, scores[best]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageFilter:
  """Sets `Doc.lang`; drops other languages and uncertain documents (threshold of datatrove)."""

  name: ClassVar[str] = "language"
  languages: tuple[str, ...] = ("en", "zh")  # empty: keep every language
  min_score: float = 0.65
  max_chars: int = 4000
  trust_given: bool = False  # keep a language that the document already carries

  def __post_init__(self):
    validate.require_hints(self, "language.", least=0)

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    for doc in docs:
      if self.trust_given and doc.lang:
        lang, score = doc.lang, 1.0
      else:
        lang, score = identify(doc.text, max_chars=self.max_chars)
      detail = f"{lang} {score:.3f}"
      if self.languages and lang not in self.languages:
        yield Dropped(doc.id, "other_language", detail)
      elif score < self.min_score:
        yield Dropped(doc.id, "uncertain_language", detail)
      else:
        yield dataclasses.replace(doc, lang=lang)
