"""Pictures without a window or global state (the plot extra), whole or not there."""

import os
from typing import Any

from minicpm_jax.core import extras, files


def figure(
  columns: int = 1, *, width: float | int = 4.4, height: float | int = 3.4, sharey: bool = False
) -> tuple[Any, list[Any]]:
  """(matplotlib figure, its axes side by side); width and height of one of them in inches."""
  made = extras.require_extra("matplotlib.figure", extra="plot").Figure(
    figsize=(width * columns, height), layout="constrained"
  )
  return made, list(made.subplots(1, columns, squeeze=False, sharey=sharey)[0])


def save(made: Any, path: str | os.PathLike[str], dpi: int = 100) -> None:
  """The figure as the file `path`, in the format of its suffix."""
  with files.replacing(path) as partial:
    made.savefig(partial, dpi=dpi)
