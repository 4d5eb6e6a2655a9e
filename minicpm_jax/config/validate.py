"""The checks that every config uses: field, found, expected."""

import collections.abc
import dataclasses
import functools
import numbers
import os
import types
import typing
from typing import Any

import numpy as np


def require(ok: Any, field: str, found: Any, expected: str) -> None:
  """Raises ValueError naming the field, what was found and what was expected, unless `ok` is true
  (numpy's truth too)."""
  if not ok:
    raise ValueError(f"{field}: found {found!r}, expected {expected}")


def require_choices(cfg: Any, prefix: str) -> None:
  """Refuses a value outside the `Literal` of its field: it would fall through to some branch."""
  for name, values in _choices(type(cfg)).items():
    value = getattr(cfg, name)
    require(value in values, f"{prefix}.{name}", value, f"one of {values}")


def require_kinds(cfg: Any, prefix: str) -> None:
  """Refuses what is no number in a field of numbers (numpy's are some), no bool in one of bools.

  A bool is no number here, and None is one where the hint says so. `prefix`: "" or "engine.".
  """
  for name, (kind, is_optional) in _kinds(type(cfg)).items():
    value = getattr(cfg, name)
    if value is None and is_optional:
      continue
    expected = {int: "an integer", float: "a number", bool: "True or False"}[kind]
    require(_is_of(kind, value), f"{prefix}{name}", value, expected)


def require_hints(cfg: Any, prefix: str, *, least: float | int | None = None) -> None:
  """Refuses what the type hint of a field does not allow, NaN, and numbers below `least`.

  Goes into tuples; a list passes for a tuple, an array or a path for what it stands for.
  """
  for name, hint in _hints(type(cfg)).items():
    value = getattr(cfg, name)
    expected = str(hint.__name__ if isinstance(hint, type) else hint).replace("typing.", "")
    require(_fits(hint, value), f"{prefix}{name}", value, expected)
    if least is not None and _fits(float, value):
      require(value >= least, f"{prefix}{name}", value, f"a number >= {least}")


def _fits(hint: Any, value: Any) -> bool:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint in (int, float, bool):
    return _is_of(hint, value) and value == value  # NaN is not equal to itself
  if hint is str:
    return isinstance(value, str | os.PathLike)
  if origin is typing.Literal:
    return any(value is v or (type(value) is type(v) and value == v) for v in args)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(part, value) for part in args)
  if origin is tuple and isinstance(value, tuple | list):
    if len(args) == 2 and args[1] is Ellipsis:
      return all(_fits(args[0], part) for part in value)
    return len(args) == len(value) and all(map(_fits, args, value))
  if origin is collections.abc.Callable:
    return callable(value)
  kind = origin or hint
  return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
  """Field -> type hint, of the fields that `__init__` takes."""
  hints = typing.get_type_hints(kind)
  return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _is_of(kind: type, value: Any) -> bool:
  is_bool = isinstance(value, bool | np.bool_)
  if kind is bool or is_bool:
    return kind is bool and is_bool
  if kind is int:
    return isinstance(value, numbers.Integral)
  is_scalar = getattr(value, "shape", None) == ()  # an array of numpy or jax
  return isinstance(value, numbers.Real) or (is_scalar and np.dtype(value.dtype).kind in "iuf")


@functools.cache
def _kinds(kind: type) -> dict[str, tuple[type, bool]]:
  """Field -> (int, float or bool, whether None is allowed) of fields that hold one of these."""
  found = {}
  for name, hint in typing.get_type_hints(kind).items():
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = set(typing.get_args(hint) if is_union else (hint,))
    (part,) = parts - {type(None)} if len(parts - {type(None)}) == 1 else (None,)
    if part in (int, float, bool):
      found[name] = (part, type(None) in parts)
  return found


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
  """Field -> values that its hint allows, for hints that are a Literal (or None)."""
  found = {}
  for name, hint in typing.get_type_hints(kind).items():
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if is_union else (hint,)
    literals = [p for p in parts if typing.get_origin(p) is typing.Literal]
    if literals and len(literals) + (type(None) in parts) == len(parts):
      values = tuple(v for p in literals for v in typing.get_args(p))
      found[name] = values + ((None,) if type(None) in parts else ())
  return found
