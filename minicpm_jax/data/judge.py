"""LLM scoring of documents on a scale of 0 to 5 (data.md 2.5, MiniCPM4 section 2.2.1).

The judge is any callable of the generator interface (data.md 6): chat prompts in, texts out. The
report keeps in-domain documents with a score above 4; its prompt is not published, this one is
ours. Prompt id, model id, score and reason stay in the document's meta.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

from minicpm_jax.config import infer as infer_config
from minicpm_jax.config import validate
from minicpm_jax.data.documents import Doc, Dropped

ChatPrompt = list[dict[str, str]]  # [{"role": ..., "content": ...}]
# The generator interface: one text for every prompt, in order.
Generate = Callable[[list[ChatPrompt], infer_config.SamplingConfig], list[str]]

PROMPT_ID = "educational-value-1"
PROMPT = """Rate the educational value of the text below with a whole number from 0 to 5.
0: no information, spam or broken text. 1: advertising or small talk with a few facts.
2: some useful facts, badly organised. 3: informative and readable, not written to teach.
4: clear, correct, mostly self-contained. 5: outstanding explanation, textbook quality.
Answer with one line "Score: N" and one line "Reason: ..." of at most 30 words.

Text:
{text}"""

_SCORE = re.compile(r"score\s*[:：]\s*\**\s*(\d+(?:\.\d+)?)", re.I)
_REASON = re.compile(r"reason\s*[:：]\s*(.+)", re.I | re.S)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
  """How documents are shown and which are kept."""

  model_id: str  # recorded with every score
  threshold: float = 4.0  # kept above it, not at it
  max_chars: int = 6000  # of a document, from its start
  batch_size: int = 16
  sampling: infer_config.SamplingConfig = infer_config.SamplingConfig(max_new_tokens=96)

  def __post_init__(self):
    validate.require_hints(self, "judge.", least=0)
    for name in ("max_chars", "batch_size"):
      validate.require(getattr(self, name) >= 1, f"judge.{name}", getattr(self, name), "at least 1")


def parse(answer: str) -> tuple[float, str] | None:
  """(score, reason) of an answer; None where there is no score in [0, 5]."""
  match = _SCORE.search(answer)
  if match is None or not 0 <= float(match[1]) <= 5:
    return None
  reason = _REASON.search(answer, match.end())
  return float(match[1]), reason[1].strip() if reason else ""


@dataclasses.dataclass(frozen=True)
class JudgeStage:
  """Asks the judge about every document and keeps those scored above the threshold.

  The score goes to meta["llm"], not to Doc.score, which is the classifier's. An answer without a
  score is a drop of its own, not a zero.
  """

  name: ClassVar[str] = "judge"
  generate: Generate
  cfg: JudgeConfig

  def __call__(self, docs: Iterable[Doc]) -> Iterator[Doc | Dropped]:
    batch = []
    for doc in docs:
      batch.append(doc)
      if len(batch) == self.cfg.batch_size:
        yield from self._judged(batch)
        batch = []
    if batch:
      yield from self._judged(batch)

  def _judged(self, docs: Sequence[Doc]) -> Iterator[Doc | Dropped]:
    prompts = [prompt(doc.text, self.cfg.max_chars) for doc in docs]
    answers = self.generate(prompts, self.cfg.sampling)
    if len(answers) != len(docs):
      raise ValueError(f"generate: found {len(answers)} answers, expected {len(docs)}")
    for doc, answer in zip(docs, answers, strict=True):
      parsed = parse(answer)
      if parsed is None:
        yield Dropped(doc.id, "no_llm_score", answer[:80])
        continue
      score, reason = parsed
      llm = {
        "prompt": PROMPT_ID,
        "model": self.cfg.model_id,
        "score": score,
        "reason": reason,
      }
      if score > self.cfg.threshold:
        yield dataclasses.replace(doc, meta=doc.meta | {"llm": llm})
      else:
        yield Dropped(doc.id, "llm_score", f"{score:g} {reason}"[:200])


def prompt(text: str, max_chars: int) -> ChatPrompt:
  """What the judge sees of one document."""
  return [{"role": "user", "content": PROMPT.replace("{text}", text[:max_chars])}]
