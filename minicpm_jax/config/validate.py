"""The checks that every config uses: field, found, expected."""

import functools
import numbers
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


def _is_of(kind: type, value: Any) -> bool:
  is_bool = isinstance(value, bool | np.bool_)
  if kind is bool or is_bool:
    return kind is bool and is_bool
  if kind is int:
    return isinstance(value, numbers.Integral)
  is_scalar = hasattr(value, "dtype") and np.ndim(value) == 0  # an array of numpy or jax
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
