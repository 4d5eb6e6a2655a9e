"""`workdir/config.py`: written as Python, read back without running it, compared by field."""

import ast
import dataclasses
import os
import pathlib
from typing import Any

from minicpm_jax import config
from minicpm_jax.core import files

FILE_NAME = "config.py"


def write(workdir: str | os.PathLike[str], cfg: Any, *, header: str = "") -> pathlib.Path:
  """Writes `cfg` as the Python that rebuilds it; `header` lines become the module docstring."""
  path = pathlib.Path(workdir) / FILE_NAME
  docstring = '"""' + header.replace("\\", "/").replace('"""', "'''").strip() + '\n"""\n\n'
  files.write(path, (docstring if header else "") + config.as_python(cfg))
  return path


def read(workdir: str | os.PathLike[str], kind: type | None = None) -> Any:
  """The config that `write` wrote, of this class. Only literals and `config.X(field=...)` pass."""
  path = pathlib.Path(workdir) / FILE_NAME
  if not path.is_file():
    raise ValueError(f"{workdir}: found no {FILE_NAME}, expected the folder of a training run")
  try:
    tree = ast.parse(path.read_text(encoding="utf-8"))
  except SyntaxError as error:
    raise ValueError(f"{path}: line {error.lineno} is not Python: {error.msg}") from None
  except ValueError as error:  # no UTF-8, or a null byte
    raise ValueError(f"{path}: is not Python: {error}") from None
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == "get_config":
      value = node.body[-1]
      if isinstance(value, ast.Return) and value.value is not None:
        found = _evaluate(value.value, path)
        if not dataclasses.is_dataclass(found):
          raise ValueError(f"{path}: get_config: found {found!r:.60}, expected a config")
        if kind is not None and not isinstance(found, kind):
          what = " (the run of a draft; WORKDIR/draft holds it)" * hasattr(found, "draft")
          raise ValueError(f"{path}: found {type(found).__name__}{what}, expected {kind.__name__}")
        return found
  raise ValueError(f"{path}: found no get_config() that ends in a return, expected one")


def _evaluate(node: ast.expr, path: pathlib.Path) -> Any:
  if isinstance(node, ast.Constant):
    return node.value
  if isinstance(node, ast.Tuple):
    return tuple(_evaluate(item, path) for item in node.elts)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    value = _evaluate(node.operand, path)
    if isinstance(value, int | float):
      return -value
  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
    owner, name = node.func.value, node.func.attr
    cls = getattr(config, name, None) if name in config.__all__ else None
    if isinstance(owner, ast.Name) and owner.id == "config" and dataclasses.is_dataclass(cls):
      fields = {k.arg: _evaluate(k.value, path) for k in node.keywords if k.arg is not None}
      try:
        return cls(**fields)
      except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: line {node.lineno}: {error}") from None
  raise ValueError(
    f"{path}: line {node.lineno}: found {ast.unparse(node)[:80]!r}, expected a literal or "
    "config.SomeConfig(field=...)"
  )


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
  """Dotted field -> (old, new) wherever two configs differ, down to the smallest field."""
  if type(old) is not type(new) or not dataclasses.is_dataclass(old):
    return {} if old == new else {prefix: (old, new)}
  found = {}
  for field in dataclasses.fields(old):
    path = f"{prefix}.{field.name}" if prefix else field.name
    found.update(differences(getattr(old, field.name), getattr(new, field.name), path))
  return found


def split_step(path: str | os.PathLike[str]) -> tuple[pathlib.Path, int | None]:
  """'runs/a@500' -> (runs/a, 500); without @STEP the step is None (the newest)."""
  text = os.fspath(path)
  folder, sep, step = text.rpartition("@")
  return (pathlib.Path(folder), int(step)) if sep and step.isdigit() else (pathlib.Path(text), None)
