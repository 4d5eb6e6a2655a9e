"""Files that are whole or not there: written under a temporary name, then renamed."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """`value` as indented JSON in UTF-8, whole or not at all; lone surrogates as JSON's escapes."""
  text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
  write(path, text.encode(errors="backslashreplace"))
