"""Heuristic filters with their published thresholds (data.md section 3), English and Chinese.

Gopher quality (Rae et al. 2021, section A1.1), C4 (Raffel et al. 2020, section 2.2) and FineWeb
(Penedo et al. 2024); thresholds as in datatrove 0.10. Each filter is a stage for `executor.run`
and a pure function of the document. Chinese thresholds are our own: a character stands for about
half a word and 。！？ end sentences. Gopher's repetition filter is in `repetition.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

from minicpm_jax.config import validate
from minicpm_jax.data import ngrams, repetition
from minicpm_jax.data.documents import Doc, Dropped

_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_STOP_CHARS = ("的", "了", "是", "在", "和", "有", "不", "这")
_LETTER = re.compile(r"[^\W\d_]")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"""[.!?]+["')\]’”]*(?=\s|$)|[。！？]+["」』’”）]*""")
_LINE_END = (".", "?", "!", "。", "？", "！", "．", "｡", "‼", "⁇", "⁈", "⁉", "‽")
_POLICY = (
  "terms of use",
  "privacy policy",
  "cookie policy",
  "uses cookies",
  "use of cookies",
  "use cookies",
)
_POLICY_ZH = ("使用条款", "服务条款", "隐私政策", "隐私条款", "版权声明", "cookie")


class _Filter:
  """A stage that looks at one document at a time: subclasses give `check`."""

  name: ClassVar[str]

  def __post_init__(self):
    validate.require_hints(self, f"{self.name}.", least=0)

  def check(self, doc: Doc) -> Doc | Dropped:
    raise NotImplementedError

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    return map(self.check, docs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GopherQuality(_Filter):
  """Length, symbols, bullets, ellipses, letters and stop words of a document.

  Words are counted without symbols. With `by_character` every character is a word and the mean
  word length is not looked at. datatrove counts symbols as words in the share of words with a
  letter and so drops a quarter of ordinary prose; `count_symbols` does the same.
  """

  name: ClassVar[str] = "gopher_quality"
  min_words: int = 50
  max_words: int = 100_000
  min_mean_length: float = 3.0  # characters of a word
  max_mean_length: float = 10.0
  max_symbols: float = 0.1  # "#" per word; ellipses per word
  max_bullet_lines: float = 0.9
  max_ellipsis_lines: float = 0.3
  min_letter_words: float = 0.8  # share of words with a letter
  count_symbols: bool = False  # in min_letter_words
  min_stop_words: int = 2  # different ones
  stop_words: tuple[str, ...] = _STOP_WORDS
  by_character: bool = False

  @classmethod
  def chinese(cls) -> "GopherQuality":
    return cls(
      min_words=100, max_words=200_000, max_symbols=0.05, stop_words=_STOP_CHARS, by_character=True
    )

  def check(self, doc: Doc) -> Doc | Dropped:
    reason = self._reason(doc.text)
    return Dropped(doc.id, *reason) if reason else doc

  def _reason(self, text: str) -> tuple[str, str] | None:
    words = "".join(ngrams.words(text)) if self.by_character else ngrams.words(text)
    count = len(words)
    if count < max(1, self.min_words):
      return "too_few_words", str(count)
    if count > self.max_words:
      return "too_many_words", str(count)
    if not self.by_character:
      mean = sum(map(len, words)) / count
      if not self.min_mean_length <= mean <= self.max_mean_length:
        return "mean_word_length", f"{mean:.2f}"
    if text.count("#") / count > self.max_symbols:
      return "hashes", f"{text.count('#')}/{count}"
    ellipses = text.count("...") + text.count("…")
    if ellipses / count > self.max_symbols:
      return "ellipses", f"{ellipses}/{count}"
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    if bullets / len(lines) > self.max_bullet_lines:
      return "bullet_lines", f"{bullets}/{len(lines)}"
    ending = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if ending / len(lines) > self.max_ellipsis_lines:
      return "ellipsis_lines", f"{ending}/{len(lines)}"
    letters = sum(1 for w in words if w.isalpha() or _LETTER.search(w))
    total = len(ngrams.tokens(text)) if self.count_symbols else count
    if letters / total < self.min_letter_words:
      return "words_without_letters", f"{total - letters}/{total}"
    stops = len(set(self.stop_words).intersection(words))
    if stops < self.min_stop_words:
      return "stop_words", str(stops)
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4Quality(_Filter):
  """Keeps lines that read like sentences; drops pages with too few of them.

  The text of a kept document is its kept lines. C4's list of bad words is not applied.
  """

  name: ClassVar[str] = "c4_quality"
  terminal: tuple[str, ...] = (".", "?", "!", '"', "'")
  min_sentences: int = 5
  min_words: int = 3  # of a line
  max_word_chars: int = 1000  # a longer word takes its line out
  policy: tuple[str, ...] = _POLICY  # lines with one of these are taken out
  needs_terminal: bool = True
  drop_lorem_ipsum: bool = True
  drop_javascript: bool = True  # the line
  drop_curly_bracket: bool = True  # the page
  remove_citations: bool = True  # [1], [edit], [citation needed]
  by_character: bool = False  # min_words counts characters

  @classmethod
  def chinese(cls) -> "C4Quality":
    return cls(
      terminal=("。", "！", "？", "”", "」", "；", ".", "?", "!"),
      min_sentences=3,
      min_words=6,
      policy=_POLICY_ZH,
      by_character=True,
    )

  def check(self, doc: Doc) -> Doc | Dropped:
    kept, sentences = [], 0
    for line in doc.text.splitlines():
      words = line.split()
      line = line.strip()
      if len(line) > self.max_word_chars and max(map(len, words)) > self.max_word_chars:
        continue
      if self.remove_citations and "[" in line:
        line = _CITATION.sub("", line)
      if self.needs_terminal and (not line.endswith(self.terminal) or line.endswith("...")):
        continue
      if (sum(map(len, words)) if self.by_character else len(words)) < self.min_words:
        continue
      lower = line.lower()
      if self.drop_lorem_ipsum and "lorem ipsum" in lower:
        return Dropped(doc.id, "lorem_ipsum")
      if self.drop_javascript and "javascript" in lower:
        continue
      if self.drop_curly_bracket and "{" in line:
        return Dropped(doc.id, "curly_bracket")
      if any(phrase in lower for phrase in self.policy):
        continue
      sentences += max(1, len(_SENTENCE_END.findall(line)))
      kept.append(line)
    if sentences < self.min_sentences:
      return Dropped(doc.id, "too_few_sentences", str(sentences))
    return dataclasses.replace(doc, text="\n".join(kept).strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineWebQuality(_Filter):
  """Shares of punctuated, short and repeated lines, and line breaks per word."""

  name: ClassVar[str] = "fineweb_quality"
  line_end: tuple[str, ...] = _LINE_END
  min_punctuated_lines: float = 0.12
  max_short_lines: float = 0.67
  short_line: int = 30  # characters
  max_repeated_chars: float = 0.01
  max_breaks: float = 0.3  # line breaks per word
  by_character: bool = False

  @classmethod
  def chinese(cls) -> "FineWebQuality":
    return cls(short_line=15, max_breaks=0.15, by_character=True)

  def check(self, doc: Doc) -> Doc | Dropped:
    lines = [line for line in doc.text.split("\n") if line.strip()]
    if not lines:
      return Dropped(doc.id, "empty")
    share = sum(line.endswith(self.line_end) for line in lines) / len(lines)
    if share < self.min_punctuated_lines:
      return Dropped(doc.id, "unpunctuated_lines", f"{share:.3f}")
    share = sum(len(line) <= self.short_line for line in lines) / len(lines)
    if share > self.max_short_lines:
      return Dropped(doc.id, "short_lines", f"{share:.3f}")
    breaks = doc.text.count("\n")
    share = repetition.duplicates(lines)[1] / (len(doc.text) - breaks)
    if share > self.max_repeated_chars:
      return Dropped(doc.id, "repeated_lines", f"{share:.3f}")
    units = ngrams.words(doc.text) if self.by_character else ngrams.tokens(doc.text)
    count = sum(map(len, units)) if self.by_character else len(units)
    if breaks > self.max_breaks * count:
      return Dropped(doc.id, "line_breaks", f"{breaks}/{count}")
    return doc


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByLanguage:
  """Sends each document to the filters of its language; other languages to `otherwise`.

  Without a language in the document, Chinese and Japanese letters decide between zh and en.
  """

  name: ClassVar[str] = "by_language"
  filters: Mapping[str, tuple[Callable, ...]]
  otherwise: tuple[Callable, ...] = ()

  def __post_init__(self):
    validate.require_hints(self, "by_language.")

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    for doc in docs:
      lang = doc.lang or ("zh" if ngrams.is_cjk(doc.text) else "en")
      item = doc
      for stage in self.filters.get(lang.split("-")[0], self.otherwise):
        (item,) = stage([item])
        if isinstance(item, Dropped):
          name = getattr(stage, "name", type(stage).__name__)
          item = dataclasses.replace(item, reason=f"{name}:{item.reason}")
          break
      yield item


def published() -> ByLanguage:
  """Gopher quality and repetition, C4 and FineWeb for English, our variants for Chinese."""
  kinds = (GopherQuality, repetition.GopherRepetition, C4Quality, FineWebQuality)
  english, chinese = tuple(k() for k in kinds), tuple(k.chinese() for k in kinds)
  return ByLanguage(filters={"en": english, "zh": chinese}, otherwise=english)
