"""The one check that every config uses: field, found, expected."""

from typing import Any


def require(ok: bool, field: str, found: Any, expected: str) -> None:
  """Raises ValueError naming the field, what was found and what was expected."""
  if not ok:
    raise ValueError(f"{field}: found {found!r}, expected {expected}")
