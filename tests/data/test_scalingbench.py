"""ScalingBench items from real rows and from the user's file."""

import json

import pytest

from minicpm_jax.data import documents, scalingbench

ROWS = {
  "math": [{"id": "m0", "question": "1+1? ", "solution": "One and one is two.", "answer": "2"}],
  "mbpp": [{"id": "p0", "prompt": "Add.", "code": "def f(a): return a\n\n", "tests": ["assert f"]}],
  "eval": [{"id": "h0", "prompt": "def g():\n", "canonical_solution": "  return 1\n"}],
  "mc": [{"id": "c0", "question": "Sky?", "choices": ["blue", "green"], "label": 0}],
}


def write(tmp_path, name):
  path = tmp_path / f"{name}.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
  return path


def test_builders_write_input_and_target(tmp_path):
  (item,) = scalingbench.from_solutions(write(tmp_path, "math"), "math")
  assert item.input + item.target == (
    "Question: 1+1?\nAnswer: One and one is two.\nThe answer is 2."
  )
  assert (item.label, item.has_reasoning) == ("2", True)
  assert item.target_bytes == len(item.target)
  (program,) = scalingbench.from_programs(write(tmp_path, "mbpp"), "mbpp")
  assert program.input == '"""\nAdd.\nassert f\n"""\n' and program.target == "def f(a): return a\n"
  (code,) = scalingbench.from_programs(write(tmp_path, "eval"), "humaneval")
  assert code.input + code.target == "def g():\n  return 1\n"


def test_choices_with_and_without_a_generator(tmp_path):
  path = write(tmp_path, "mc")
  (plain,) = scalingbench.from_choices(path, "mc")
  assert (plain.target, plain.has_reasoning, plain.gold) == (" blue", False, 0)
  assert plain.choices == (" blue", " green")
  seen = []

  def generate(prompt):
    seen.append(prompt)
    return " Light scatters. "

  (told,) = scalingbench.from_choices(path, "mc", generate=generate)
  assert told.target == " Light scatters.\nThe answer is blue." and told.has_reasoning
  assert "Sky?" in seen[0] and "blue" in seen[0]
  with pytest.raises(documents.CorpusError, match="no text"):
    scalingbench.from_choices(path, "mc", generate=lambda prompt: " ")


def test_files_round_trip(tmp_path):
  items = scalingbench.from_choices(write(tmp_path, "mc"), "mc")
  items += scalingbench.from_solutions(write(tmp_path, "math"), "math")
  scalingbench.write(tmp_path / "items.jsonl", items)
  assert scalingbench.read(tmp_path / "items.jsonl") == items
  (tmp_path / "mine.jsonl").write_text('{"input": "a", "target": "b"}\n\n')
  (mine,) = scalingbench.read(tmp_path / "mine.jsonl")
  assert (mine.task, mine.id, mine.input, mine.target) == ("mine", "1", "a", "b")


@pytest.mark.parametrize(
  "line, match",
  [
    ("{", "line 1: not JSON"),
    ('{"input": "a"}', r"expected also \['target'\]"),
    ('{"input": "a", "target": 3}', "target: found int"),
    ('{"input": "", "target": "b"}', "input: found nothing"),
    ('{"input": "a", "target": "b", "choices": ["b"], "gold": 4}', "gold: found 4"),
    ("[1]", "found list"),
    ("", "found no item"),
  ],
)
def test_bad_files_are_named(tmp_path, line, match):
  (tmp_path / "x.jsonl").write_text(line + "\n")
  with pytest.raises(documents.CorpusError, match=match):
    scalingbench.read(tmp_path / "x.jsonl")


def test_real_panels(shared_dir):
  items = scalingbench.build(shared_dir / "data" / "mini", limit=5)
  tasks = [item.task for item in items]
  assert set(tasks) == {"mmlu", "agieval", "gsm8k", "math", "mbpp", "humaneval"}
  assert all(tasks.count(task) == 5 for task in set(tasks))
  for item in items:
    assert item.has_reasoning == (item.task not in ("mmlu", "agieval"))
    assert not item.choices or item.choices[item.gold].strip() == item.label
  with pytest.raises(documents.CorpusError, match="found none of"):
    scalingbench.build(shared_dir / "specs")
