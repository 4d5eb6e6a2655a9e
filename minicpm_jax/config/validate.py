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

_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}
_WORDS |= {type(None): "None"}


def require(ok: Any, field: str, found: Any, expected: str) -> None:
  """Raises ValueError naming the field, what was found and what was expected, unless `ok` is true
  (numpy's truth too)."""
  if not ok:
    raise ValueError(f"{field}: found {found!r}, expected {expected}")


def require_hints(cfg: Any, prefix: str, *, least: float | int | None = None) -> None:
  """Refuses what the type hint of a field does not allow, NaN, and numbers below `least`.

  Goes into tuples, and makes them of lists (JSON has no others), so that a config has a hash. An
  array of one number (not bfloat16) passes for a float, a path for a text.
  """
  for name, hint in _hints(type(cfg)).items():
    value = getattr(cfg, name)
    require(_fits(hint, value), f"{prefix}{name}", value, _spelled(hint))
    if least is not None and _fits(float, value):
      require(value >= least, f"{prefix}{name}", value, f"a number >= {least}")
    if tuple in map(typing.get_origin, (hint, *typing.get_args(hint))) and value is not None:
      object.__setattr__(cfg, name, _as_tuple(value))


def _as_tuple(value: Any) -> Any:
  return tuple(map(_as_tuple, value)) if isinstance(value, tuple | list) else value


def _spelled(hint: Any) -> str:
  """What a hint expects, in words where there are some."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint in _WORDS:
    return _WORDS[hint]
  if origin is typing.Literal:
    return f"one of {args}"
  if origin in (typing.Union, types.UnionType):
    if all(part is type(None) or typing.get_origin(part) is typing.Literal for part in args):
      return f"one of {tuple(v for part in args for v in typing.get_args(part) or (None,))}"
    return " or ".join(map(_spelled, args))
  return (hint.__name__ if isinstance(hint, type) and not args else str(hint)).replace(
    "typing.", ""
  )


def _fits(hint: Any, value: Any) -> bool:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint in (int, float, bool):
    return _is_of(hint, value) and bool(value == value)  # NaN is not equal to itself
  if hint is str:
    return isinstance(value, str | os.PathLike)
  if origin is typing.Literal:
    return any(value is v or (_fits(type(v), value) and value == v) for v in args)
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
