"""ScalingBench items: validation questions with reasoning and label as the target (data.md 9).

The score of a model is its loss on the target given the input (`tunnel.bench`). Sets that carry
human solutions need no generator; multiple-choice sets get reasoning from a `generate` callable, or
have the answer's text alone as target (`has_reasoning` False). The user's own items are JSON lines
{input, target} with optional task, id, label, choices.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from minicpm_jax.config import validate
from minicpm_jax.core import files
from minicpm_jax.data import documents
from minicpm_jax.data.documents import CorpusError

Generate = Callable[[str], str]  # prompt -> text

REASONING_PROMPT = (
  "{question}\n\nThe correct answer is: {answer}\n"
  "Explain step by step how to reach it, without repeating the question."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """`target` follows `input` directly; `choices` (whole targets) allow an accuracy."""

  task: str
  id: str
  input: str
  target: str
  label: str = ""
  has_reasoning: bool = True
  choices: tuple[str, ...] = ()  # of answers, for accuracy by likelihood; the gold one included
  gold: int = 0

  def __post_init__(self):
    for name in ("task", "id", "input", "target"):
      if not getattr(self, name):
        raise CorpusError(f"item {self.id or '?'}: {name}: found nothing, expected text")
    try:
      validate.require_hints(self, f"item {self.id}: ", least=0)
    except ValueError as error:
      raise CorpusError(str(error)) from None
    if self.choices and not 0 <= self.gold < len(self.choices):
      raise CorpusError(
        f"item {self.id}: gold: found {self.gold}, expected the number of a choice below "
        f"{len(self.choices)}"
      )

  @property
  def target_bytes(self) -> int:
    return len(self.target.encode())


# --- Builders ------------------------------------------------------------------------------------


def _rows(path: str | os.PathLike[str], needed: Sequence[str]) -> Iterator[dict]:
  for number, row in documents.json_rows(path):
    missing = [key for key in needed if key not in row]
    if missing:
      raise CorpusError(f"{path}: line {number}: found {sorted(row)}, expected also {missing}")
    yield row | {"__line__": number}


def from_solutions(path: str | os.PathLike[str], task: str) -> list[Item]:
  """Mathematics with worked solutions (GSM8K, MATH): rows {id, question, solution, answer}."""
  return [
    Item(
      task=task,
      id=str(row["id"]),
      input=f"Question: {row['question'].strip()}\nAnswer:",
      target=f" {row['solution'].strip()}\nThe answer is {row['answer']}.",
      label=str(row["answer"]),
    )
    for row in _rows(path, ("id", "question", "solution", "answer"))
  ]


def from_programs(path: str | os.PathLike[str], task: str) -> list[Item]:
  """Programs: {id, prompt, code, tests} (MBPP), {id, prompt, canonical_solution} (HumanEval)."""
  items = []
  for row in _rows(path, ("id", "prompt")):
    if "canonical_solution" in row:
      given, code = row["prompt"], row["canonical_solution"]
    elif "code" in row:
      tests = "\n".join(row.get("tests", ())[:1])
      given, code = f'"""\n{row["prompt"].strip()}\n{tests}\n"""\n', row["code"]
    else:
      raise CorpusError(
        f"{path}: line {row['__line__']}: found {sorted(row)}, expected code or canonical_solution"
      )
    items.append(Item(task=task, id=str(row["id"]), input=given, target=code.rstrip() + "\n"))
  return items


def from_choices(
  path: str | os.PathLike[str], task: str, *, generate: Generate | None = None
) -> list[Item]:
  """Multiple choice {id, question, choices, label[, passage]} (MMLU, AGIEval, ARC).

  With `generate`, the reasoning it writes for question and answer stands in front of the label.
  """
  items = []
  for row in _rows(path, ("id", "question", "choices", "label")):
    choices, gold = row["choices"], row["label"]
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
      raise CorpusError(
        f"{path}: line {row['__line__']}: label: found {gold!r}, expected the number of a choice"
      )
    passage = f"{row['passage']}\n\n" if row.get("passage") else ""
    question = f"{passage}Question: {row['question'].strip()}"
    target = f" {choices[gold]}"
    if generate is not None:
      written = generate(REASONING_PROMPT.format(question=question, answer=choices[gold])).strip()
      if not written:
        raise CorpusError(f"{path}: item {row['id']}: generate returned no text")
      target = f" {written}\nThe answer is {choices[gold]}."
    items.append(
      Item(
        task=task,
        id=str(row["id"]),
        input=f"{question}\nAnswer:",
        target=target,
        label=choices[gold],
        has_reasoning=generate is not None,
        choices=tuple(f" {choice}" for choice in choices),
        gold=gold,
      )
    )
  return items


# File of a data folder -> (task, builder); the published panels as far as their data are there.
PANELS = {
  "eval/mmlu_validation.jsonl.gz": ("mmlu", from_choices),
  "eval/agieval_mc.jsonl.gz": ("agieval", from_choices),
  "rl/gsm8k_test.jsonl.gz": ("gsm8k", from_solutions),
  "rl/math500.jsonl.gz": ("math", from_solutions),
  "rl/mbpp_test.jsonl.gz": ("mbpp", from_programs),
  "rl/humaneval.jsonl.gz": ("humaneval", from_programs),
}


def build(
  folder: str | os.PathLike[str], *, limit: int | None = None, generate: Generate | None = None
) -> list[Item]:
  """Items of all PANELS present in a data folder; `limit` items a task, first in file order."""
  items: list[Item] = []
  for name, (task, builder) in PANELS.items():
    path = pathlib.Path(folder) / name
    if not path.exists():
      continue
    if builder is from_choices and generate is not None:
      found = from_choices(path, task, generate=generate)
    else:
      found = builder(path, task)
    items += found[:limit]
  if not items:
    raise CorpusError(f"{folder}: found none of {', '.join(PANELS)}, expected at least one")
  return items


# --- Files ---------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> list[Item]:
  """A user's or a written file: JSON lines {input, target[, task, id, label, choices, gold]}."""
  items = []
  for row in _rows(path, ("input", "target")):
    line, choices = f"{path}: line {row['__line__']}", row.get("choices") or []
    kinds = {"input": str, "target": str, "choices": list, "gold": int}
    for key, value in {"choices": choices, "gold": 0, **row}.items():
      if key in kinds and not isinstance(value, kinds[key]):
        found, expected = type(value).__name__, kinds[key].__name__
        raise CorpusError(f"{line}: {key}: found {found}, expected {expected}")
    try:
      item = Item(
        task=str(row.get("task", pathlib.Path(path).name.split(".")[0])),
        id=str(row.get("id", row["__line__"])),
        input=row["input"],
        target=row["target"],
        label=str(row.get("label", "")),
        has_reasoning=bool(row.get("has_reasoning", True)),
        choices=tuple(map(str, choices)),
        gold=row.get("gold", 0),
      )
    except CorpusError as error:
      raise CorpusError(f"{line}: {error}") from None
    items.append(item)
  if not items:
    raise CorpusError(f"{path}: found no item, expected JSON lines with input and target")
  return items


def write(path: str | os.PathLike[str], items: Iterable[Item]) -> None:
  """JSON lines that `read` takes; whole or not at all."""
  with files.replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
    for item in items:
      row = dataclasses.asdict(item) | {"target_bytes": item.target_bytes}
      file.write(files.as_json(row) + "\n")
