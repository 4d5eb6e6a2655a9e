"""Commands in pages and docstrings exist, with their flags; so do the files that pages name."""

import ast
import fnmatch
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", "benchmarks/README.md", "CONTRIBUTING.md"]
CODE = [
  str(path.relative_to(ROOT))
  for folder in ("experiments", "configs")
  for path in sorted((ROOT / folder).glob("*.py"))
]
COMMANDS = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}


def _pieces(name: str) -> list[str]:
  """What may be a command, each on one line: code spans, fenced lines, lines of docstrings."""
  text = (ROOT / name).read_text()
  if name.endswith(".py"):
    text = (ast.get_docstring(ast.parse(text)) or "").replace("\\\n", " ")
    return [line for line in text.split("\n") if "python -m experiments." in line]
  fences = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
  spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
  lines = "\n".join(fences).replace("\\\n", " ").split("\n")
  return [" ".join(piece.split()) for piece in lines + spans]


def _commands(name: str) -> list[tuple[str, list[str]]]:
  """(command, names of flags) of every `python -m experiments.COMMAND ...` or `COMMAND ...`."""
  found = []
  for piece in _pieces(name):
    piece = piece.split(" # ")[0]
    match = re.search(r"python -m experiments\.(\w+)(.*)", piece) or re.match(r"(\w+)(.*)", piece)
    if match and ("python -m experiments." in piece or match[1] in COMMANDS):
      found.append((match[1], re.findall(r"(?<=\s)--(\w+)", match[2])))
  return found


def test_commands_are_found():
  assert ("bench_train", ["suite", "sizes", "repeats"]) in _commands("benchmarks/README.md")
  assert ("serve", ["model", "draft_kind"]) in _commands("README.md")
  assert "pretrain" in [command for command, _ in _commands("configs/minicpm4_0p5b.py")]


@pytest.mark.parametrize("name", PAGES + CODE)
def test_commands_exist(name):
  for command, names in _commands(name):
    assert command in COMMANDS, f"{name}: no experiments/{command}.py"
    if command == "fetch_model":  # the one without absl
      continue
    known = set(importlib.import_module(f"experiments.{command}").VALUES)
    unknown = {n for n in names if n not in known and n.removeprefix("no") not in known} - {"help"}
    assert not unknown, f"{name}: {command} has no flags {sorted(unknown)}"


@pytest.mark.parametrize("name", PAGES)
def test_files_exist(name):
  text = (ROOT / name).read_text()
  spans = re.findall(r"`([^`\s]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
  for span in spans:
    if re.fullmatch(
      r"(?:minicpm_jax|pallas_kernels|experiments|configs|tests|benchmarks)/[\w./]+", span
    ):
      assert (ROOT / span).exists(), f"{name}: no {span}"
    elif name.startswith("benchmarks") and re.fullmatch(r"\w+\.(?:json|png)", span):
      assert (ROOT / "benchmarks/results" / span).exists() or span == "config.json", span


def test_every_result_is_explained():
  """A recorded file that no page names is one that nobody can read or repeat."""
  text = "".join((ROOT / name).read_text() for name in PAGES)
  for before, names, after in re.findall(r"(\w+)\{([\w,]+)\}(\w*)", text):  # a_{b,c}.json
    text += "".join(f" {before}{one}{after}" for one in names.split(","))
  globs = re.findall(r"\w+_\*\w*\.json", text)
  for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
    named = path.stem in text or any(fnmatch.fnmatch(path.name, glob) for glob in globs)
    assert named, f"{path.name}: named in none of {PAGES}"
