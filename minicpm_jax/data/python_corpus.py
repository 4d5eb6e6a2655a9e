"""Real text that comes with every CPython: the quickstart's corpus.

Three sources: "reference" (the language reference in pydoc_data), "docstrings" (of the standard
library and of the built-in modules) and "source" (its Python files). Documents are in a fixed
order, exact duplicates left out, and split by the hash of their module or topic, so a module's
docstrings and its source fall on the same side. Tests, IDLE, tables of encodings and generated
files are left out; no installed package is read. The text depends on the Python version only.
"""

import ast
import importlib
import inspect
import pathlib
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Literal

from minicpm_jax.data import documents
from minicpm_jax.data.documents import Doc

SOURCES = ("reference", "docstrings", "source")
HELDOUT_PERMILLE = 50

_SKIPPED_TOP = frozenset(
  "antigravity distutils encodings ensurepip idlelib lib2to3 pydoc_data test turtledemo".split()
)
_SKIPPED_ANY = frozenset(("test", "tests", "idle_test", "__pycache__", "_bundled"))
_SKIPPED_FILES = frozenset(("html/entities.py", "sre_constants.py", "re/_constants.py"))
# Built into the interpreter; importing them does nothing else.
_BUILTIN_MODULES = (
  "builtins sys time itertools marshal gc _io _collections _functools _operator _sre _thread "
  "_weakref _string _symtable _stat _codecs errno faulthandler"
).split()

_C_KINDS = (
  types.BuiltinFunctionType,
  types.MethodDescriptorType,
  types.ClassMethodDescriptorType,
  types.GetSetDescriptorType,
)


def documents_of(
  source: str, split: Literal["train", "heldout", "all"] = "train", *, max_bytes: int | None = None
) -> Iterator[Doc]:
  """The documents of one of SOURCES, sorted by id; `max_bytes` stops after that much text."""
  makers = {"reference": _reference, "docstrings": _docstrings, "source": _source}
  if source not in makers:
    raise ValueError(f"source: found {source!r}, expected one of {SOURCES}")
  size = 0
  for doc in documents.deduplicate(makers[source]()):
    is_heldout = documents.is_heldout(doc.meta["key"], HELDOUT_PERMILLE)
    if split == "all" or is_heldout == (split == "heldout"):
      if max_bytes is not None and size >= max_bytes:
        return
      size += len(doc.text.encode())
      yield doc


def sizes(split: Literal["train", "heldout", "all"] = "all") -> dict[str, tuple[int, int]]:
  """(documents, UTF-8 bytes) by source."""
  found = {}
  for source in SOURCES:
    counts = [len(doc.text.encode()) for doc in documents_of(source, split)]
    found[source] = (len(counts), sum(counts))
  return found


def _doc(source: str, key: str, text: str) -> Doc:
  return Doc(id=f"python/{source}/{key}", text=text, source=source, lang="en", meta={"key": key})


def _reference() -> Iterator[Doc]:
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ImportError:
    raise documents.CorpusError(
      f"pydoc_data.topics: not part of this Python ({sys.version.split()[0]}), expected the "
      "language reference of a full CPython"
    ) from None
  for name in sorted(topics):
    yield _doc("reference", name, topics[name].strip() + "\n")


def _files() -> Iterator[tuple[str, str]]:
  """(module name, text) of the library's files, sorted by path."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  count = 0
  for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
    relative = path.relative_to(root)
    top = relative.parts[0].removesuffix(".py")
    is_ours = top in sys.stdlib_module_names and top not in _SKIPPED_TOP
    if not is_ours or _SKIPPED_ANY & set(relative.parts):
      continue
    if relative.as_posix() in _SKIPPED_FILES or top.startswith("_sysconfigdata"):
      continue
    try:
      text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
      continue
    count += 1
    if text.strip():
      yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), text
  if not count:
    raise documents.CorpusError(
      f"{root}: found no .py file, expected the source of the standard library"
    )


def _source() -> Iterator[Doc]:
  for module, text in _files():
    yield _doc("source", module, text)


def _docstrings() -> Iterator[Doc]:
  """One document a module: "name", its docstring, and so on for everything in it."""
  for module, text in _files():
    try:
      tree = ast.parse(text)
    except (SyntaxError, ValueError):
      continue
    parts = list(_parsed_docstrings(tree, module))
    if parts:
      yield _doc("docstrings", module, "\n\n".join(parts) + "\n")
  for module in _BUILTIN_MODULES:
    if module in sys.builtin_module_names:
      parts = list(_live_docstrings(importlib.import_module(module), module))
      if parts:
        yield _doc("docstrings", module, "\n\n".join(parts) + "\n")


def _parsed_docstrings(node: ast.AST, name: str) -> Iterator[str]:
  doc = ast.get_docstring(node)
  if doc and doc.strip():
    yield f"{name}\n{doc.strip()}"
  for child in node.body:
    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      yield from _parsed_docstrings(child, f"{name}.{child.name}")


def _live_docstrings(owner: types.ModuleType | type, name: str) -> Iterator[str]:
  """Docstrings of C code: only of what the interpreter itself put there, hooks left out."""
  if own := _clean(owner):
    yield f"{name}\n{own}"
  module = owner.__name__ if isinstance(owner, types.ModuleType) else None
  for key, value in sorted(vars(owner).items()):
    if isinstance(value, type) and value.__module__ == module:
      yield from _live_docstrings(value, f"{name}.{key}")
    elif isinstance(value, _C_KINDS) and not key.startswith("__") and not key.endswith("hook"):
      if text := _clean(value):
        yield f"{name}.{key}\n{text}"


def _clean(value: object) -> str:
  doc = getattr(value, "__doc__", None)
  return inspect.cleandoc(doc).strip() if isinstance(doc, str) else ""
