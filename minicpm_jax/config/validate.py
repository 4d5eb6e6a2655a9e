"""The checks that every config uses: field, found, expected."""

import functools
import types
import typing
from typing import Any


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
