"""Errors of reading and writing checkpoint folders; all are ValueErrors that name what is wrong."""

import contextlib
import pathlib
from collections.abc import Iterator


class CheckpointError(ValueError):
  """A checkpoint folder, file or tensor that is not what it should be."""


class ConfigError(CheckpointError):
  """A config.json that this project cannot or must not interpret."""


class QuantizedCheckpointError(CheckpointError):
  """A quantised checkpoint given to the plain loader."""


@contextlib.contextmanager
def inside(folder: pathlib.Path) -> Iterator[None]:
  """Puts the folder in front of errors that begin with the name of its config.json."""
  try:
    yield
  except CheckpointError as error:
    if str(error).startswith("config.json"):
      raise type(error)(f"{folder}/{error}") from error
    raise


class MissingFileError(CheckpointError, FileNotFoundError):
  """A file that the folder should hold and does not."""

  def __str__(self) -> str:
    return str(self.args[0])
