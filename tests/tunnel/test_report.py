"""Reports carry every claim, shown or not, into all three files."""

import json
import re

import pytest

from minicpm_jax.core import pictures
from minicpm_jax.tunnel import report


def made() -> report.Section:
  section = report.Section("A | suite")
  section.text("Some", "words <b>.")
  section.table(("x", "y"), [(1, 0.123456), ("a|b", 12345.678)])
  section.claim("it works", True, "+0.1", "control -0.1")
  section.claim("it also works", False, "-0.2")
  section.data["values"] = [1, 2]
  return section


def test_files_say_what_was_shown(tmp_path):
  pytest.importorskip("matplotlib")
  section = made()
  figure, axes = pictures.figure(2)
  axes[0].plot([1, 2])
  section.picture("curve", figure, "A curve")
  path = report.write(tmp_path / "out", "Title", "Intro.", [section])
  text = path.read_text()
  assert "| A \\| suite | it works | shown | +0.1 | control -0.1 |" in text
  assert "| A \\| suite | it also works | NOT SHOWN | -0.2 | - |" in text
  assert "| 1 | 0.1235 |" in text and "| a\\|b | 1.235e+04 |" in text
  assert "![A curve](curve.png)" in text and (path.parent / "curve.png").read_bytes()[1:4] == b"PNG"
  page = (path.parent / "report.html").read_text()
  assert "words &lt;b&gt;." in page and "data:image/png;base64," in page
  assert len(re.findall("<tr>", page)) == 3 + 3
  data = json.loads((path.parent / "report.json").read_text())
  assert [c["is_shown"] for c in data["sections"][0]["claims"]] == [True, False]
  assert data["sections"][0]["data"] == {"values": [1, 2]}
  assert not list(path.parent.glob(".tmp-*"))


def test_a_crooked_table_is_refused():
  with pytest.raises(ValueError, match="row of 1 cells, expected 2"):
    report.Section("x").table(("a", "b"), [(1,)])
