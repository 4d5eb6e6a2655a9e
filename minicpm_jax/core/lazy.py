"""Packages whose modules are imported on first use, so that `import minicpm_jax` costs nothing."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exports(
  package: str, names: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """(`__getattr__`, `__dir__`) of a package: its modules, and `names`: name -> module with it."""
  names = dict(names or {})
  modules = [m.name for m in pkgutil.iter_modules(sys.modules[package].__path__)]

  def get(name: str) -> Any:
    if name in names:
      return getattr(importlib.import_module(f"{package}.{names[name]}"), name)
    if name in modules:
      return importlib.import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")

  return get, lambda: sorted({*names, *modules})
