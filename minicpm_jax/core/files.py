"""Files that are whole or not there: written under a temporary name, then renamed."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

PREFIX = ".tmp-"  # of temporary names; what a killed process leaves behind begins with it


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A temporary name beside `path`, with its suffix, that becomes `path` when the block ends.

  Missing folders are made. If the block raises, what it wrote goes and a file at `path` stays.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{PREFIX}{os.getpid()}-{path.name}")
  try:
    yield partial
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """The file `path`, whole or not at all; text in UTF-8."""
  with replacing(path) as partial:
    partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> None:
  """`as_json` in UTF-8, whole or not at all; lone surrogates as JSON's escapes."""
  write(path, (as_json(value, indent=indent) + "\n").encode(errors="backslashreplace"))


def as_json(
  value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
  """`json.dumps` of what every reader takes: numbers that are not finite become null."""
  options = dict(indent=indent, default=default, ensure_ascii=False)
  return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
