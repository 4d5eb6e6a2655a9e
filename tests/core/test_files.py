"""Files that are whole or not there, and pictures."""

import json
import os
import pathlib
import struct

import numpy as np
import pytest

from minicpm_jax.core import files, pictures


def test_a_file_appears_when_the_block_ends(tmp_path):
  path = tmp_path / "new" / "folder" / "a.txt"
  with files.replacing(path) as partial:
    partial.write_text("whole")
    assert partial.parent == path.parent and partial.suffix == ".txt" and not path.exists()
  assert os.listdir(path.parent) == ["a.txt"] and path.read_text() == "whole"


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with pytest.raises(error):
    with files.replacing(path) as partial:
      partial.write_text("half")
      raise error
  assert os.listdir(tmp_path) == ["a.txt"] and path.read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    with files.replacing(tmp_path / "a.txt"):
      pass
  assert os.listdir(tmp_path) == []


def test_text_bytes_and_json(tmp_path):
  files.write(tmp_path / "a", "über")
  files.write(tmp_path / "b", b"\x00\xff")
  value = {"ü": [1, 2.5, None], "a file's name": "\udcff"}
  files.write_json(tmp_path / "c.json", value)
  assert (tmp_path / "a").read_bytes() == "über".encode()
  assert (tmp_path / "b").read_bytes() == b"\x00\xff"
  text = (tmp_path / "c.json").read_text(encoding="utf-8")
  assert json.loads(text) == value and "ü" in text and text.endswith("}\n")


def strictly(text):
  return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_numbers_that_are_not_finite_are_null(tmp_path):
  nan, inf = float("nan"), float("inf")
  value = {"loss": nan, "rows": [{"x": (1.5, -inf)}, np.float64(inf)], "n": 3, "is": True}
  files.write_json(tmp_path / "a.json", value)
  expected = {"loss": None, "rows": [{"x": [1.5, None]}, None], "n": 3, "is": True}
  assert strictly((tmp_path / "a.json").read_text()) == expected
  assert strictly(files.as_json(value)) == expected and "\n" not in files.as_json(value)
  assert strictly(files.as_json({"p": tmp_path, "x": nan}, default=str))["p"] == str(tmp_path)


def test_recorded_results_are_json():
  paths = sorted((pathlib.Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"))
  assert paths
  for path in paths:
    strictly(path.read_text())


def test_pictures_have_the_size_asked_for_and_touch_no_global_state(tmp_path):
  pytest.importorskip("matplotlib")
  figure, axes = pictures.figure(3, width=2, height=1.5, sharey=True)
  axes[0].plot([1, 2])
  pictures.save(figure, tmp_path / "new" / "a.png", dpi=50)
  header = (tmp_path / "new" / "a.png").read_bytes()[:24]
  assert header[:8] == b"\x89PNG\r\n\x1a\n"
  assert struct.unpack(">II", header[16:]) == (3 * 2 * 50, 75)
  assert axes[1].get_ylim() == axes[0].get_ylim() != (0, 1)
