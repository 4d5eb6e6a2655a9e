"""Errors of reading and writing checkpoint folders; all are ValueErrors that name what is wrong."""


class CheckpointError(ValueError):
  """A checkpoint folder, file or tensor that is not what it should be."""


class ConfigError(CheckpointError):
  """A config.json that this project cannot or must not interpret."""


class QuantizedCheckpointError(CheckpointError):
  """A quantised checkpoint given to the plain loader."""


class MissingFileError(CheckpointError, FileNotFoundError):
  """A file that the folder should hold and does not."""

  def __str__(self) -> str:
    return str(self.args[0])
