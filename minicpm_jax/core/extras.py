"""Optional packages: one error text that names the extra to install."""

import importlib
import types


def require_extra(package: str, *, extra: str) -> types.ModuleType:
  """Imports an optional package, or raises ImportError naming the extra that brings it."""
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise ImportError(
      f"{package} is needed here and not installed: pip install 'minicpm_jax[{extra}]'"
    ) from error
