"""Stages that worker processes can import."""

import dataclasses
import os
import pathlib
import signal

from minicpm_jax.data.documents import Dropped


@dataclasses.dataclass(frozen=True)
class DropShort:
  min_chars: int = 3

  def __call__(self, docs):
    for doc in docs:
      yield doc if len(doc.text) >= self.min_chars else Dropped(doc.id, "short", str(len(doc.text)))


@dataclasses.dataclass(frozen=True)
class KillWorker:
  """Kills its process at some documents, `times` times each; `folder` remembers."""

  folder: str
  at: tuple[str, ...]
  times: int = 1

  def __call__(self, docs):
    for doc in docs:
      if doc.id in self.at:
        for attempt in range(self.times):
          marker = pathlib.Path(self.folder) / f"{doc.id}-{attempt}"
          if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
      yield doc


@dataclasses.dataclass(frozen=True)
class Lose:
  """A faulty stage: forgets one document, or yields it twice."""

  at: str
  copies: int

  def __call__(self, docs):
    for doc in docs:
      yield from [doc] * (self.copies if doc.id == self.at else 1)


@dataclasses.dataclass(frozen=True)
class Raise:
  at: str

  def __call__(self, docs):
    for doc in docs:
      if doc.id == self.at:
        raise RuntimeError(f"cannot digest {doc.id}")
      yield doc
