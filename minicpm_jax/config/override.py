"""Command-line overrides of frozen configs, and their printed form.

`override(cfg, "model.num_layers", "4")` walks with `dataclasses.replace` and coerces the text by
the type hint of the field. `as_python(cfg)` prints the Python that rebuilds the config.
"""

import ast
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def override(cfg: T, path: str, text: str) -> T:
  """Returns `cfg` with the field at the dotted `path` replaced by the parsed `text`.

  Raises ValueError naming an unknown field (with the valid names) or text of the wrong type.
  """
  return _override(cfg, path.split("."), text, path)


def overrides(cfg: T, assignments: Sequence[str]) -> T:
  """Applies `a.b=text` assignments in order (the repeated `--set` flag)."""
  for assignment in assignments:
    path, sep, text = assignment.partition("=")
    if not sep:
      raise ValueError(f"--set {assignment!r}: expected FIELD=VALUE")
    cfg = override(cfg, path.strip(), text.strip())
  return cfg


def _override(cfg: Any, names: list[str], text: str, path: str) -> Any:
  name, rest = names[0], names[1:]
  if not dataclasses.is_dataclass(cfg):
    raise ValueError(f"{path}: {type(cfg).__name__} has no field {name!r}, it is a plain value")
  valid = [f.name for f in dataclasses.fields(cfg)]
  if name not in valid:
    raise ValueError(
      f"{path}: {type(cfg).__name__} has no field {name!r}; valid fields: {', '.join(valid)}"
    )
  hint = typing.get_type_hints(type(cfg))[name]
  if not rest:
    return dataclasses.replace(cfg, **{name: parse(text, hint, path)})
  child = getattr(cfg, name)
  if child is None:
    child = _default_instance(hint, path)
  return dataclasses.replace(cfg, **{name: _override(child, rest, text, path)})


def _default_instance(hint: Any, path: str) -> Any:
  for option in typing.get_args(hint):
    if dataclasses.is_dataclass(option):
      try:
        return option()
      except TypeError:
        break
  raise ValueError(f"{path}: the parent is None and has no default to start from")


def parse(text: str, hint: Any, path: str) -> Any:
  """Parses `text` as a value of the type `hint`; ValueError names `path`, found and expected."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (Union, types.UnionType):
    if type(None) in args and text.lower() in ("none", "null"):
      return None
    options = [a for a in args if a is not type(None)]
    for option in options[:-1]:
      try:
        return parse(text, option, path)
      except ValueError:
        continue
    return parse(text, options[-1], path)
  if origin is Literal:
    for value in args:
      if text == str(value):
        return value
    raise ValueError(f"{path}: found {text!r}, expected one of {', '.join(map(str, args))}")
  if hint is bool:
    if text.lower() in ("true", "1", "yes"):
      return True
    if text.lower() in ("false", "0", "no"):
      return False
    raise ValueError(f"{path}: found {text!r}, expected true or false")
  if hint is str:
    return text
  if hint in (int, float):
    try:
      return int(text.replace("_", "")) if hint is int else float(text)
    except ValueError:
      raise ValueError(f"{path}: found {text!r}, expected {hint.__name__}") from None
  if origin is tuple:
    return _parse_tuple(text, args, hint, path)
  if dataclasses.is_dataclass(hint):
    names = ", ".join(f.name for f in dataclasses.fields(hint))
    raise ValueError(f"{path}: is a group; set one of its fields: {names}")
  raise ValueError(f"{path}: values of type {hint} cannot be set from text")


def _parse_tuple(text: str, args: tuple[Any, ...], hint: Any, path: str) -> tuple[Any, ...]:
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
  if not isinstance(value, list | tuple):
    value = (value,)
  is_variadic = len(args) == 2 and args[1] is Ellipsis
  if not is_variadic and len(value) != len(args):
    raise ValueError(f"{path}: found {len(value)} values, expected {len(args)} ({hint})")
  hints = [args[0]] * len(value) if is_variadic else args
  return tuple(
    _parse_tuple(repr(v), typing.get_args(h), h, f"{path}[{i}]")
    if typing.get_origin(h) is tuple
    else parse(str(v), h, f"{path}[{i}]")
    for i, (v, h) in enumerate(zip(value, hints, strict=True))
  )


def as_python(cfg: Any) -> str:
  """Python source whose `get_config()` rebuilds `cfg`; fields at their default are left out."""
  body = _source(cfg, indent=1)
  return (
    "from minicpm_jax import config\n\n\n"
    'def get_config(arg: str = ""):\n'
    "  del arg\n"
    f"  return {body}\n"
  )


def _source(value: Any, indent: int) -> str:
  pad = "  " * (indent + 1)
  if dataclasses.is_dataclass(value):
    lines = []
    for f in dataclasses.fields(value):
      child = getattr(value, f.name)
      if f.default is not dataclasses.MISSING and child == f.default:
        continue
      lines.append(f"{pad}{f.name}={_source(child, indent + 1)},\n")
    name = f"config.{type(value).__name__}"
    return f"{name}(\n{''.join(lines)}{'  ' * indent})" if lines else f"{name}()"
  if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
    items = "".join(f"{pad}{_source(v, indent + 1)},\n" for v in value)
    return f"(\n{items}{'  ' * indent})"
  return repr(value)
