"""The long-prompt benchmark on a nano model: what is recorded, kept and refused."""

import json

import pytest

from experiments import _results, bench_long_prompt


def test_rows_of_an_equal_setting_are_kept(tmp_path):
  key = {"model": "m.gguf", "chunk": 64, "jax": "1"}
  rows = [{"side": "sparse", "prompt": 8, "x": 1}, {"side": "dense", "prompt": 8, "x": 2}]
  stored = {"environment": {"jax": "1"}, "model": "m.gguf", "chunk": 64, "rows": rows}
  path = tmp_path / "r.json"
  assert _results.recorded(path, key) == []
  path.write_text(json.dumps(stored))
  assert _results.recorded(path, key) == rows
  assert _results.recorded(path, key | {"jax": "2"}) == []


@pytest.mark.parametrize(
  "flag, text", [("--sides=fast", "--sides: found ['fast']"), ("--tokens=3", "tokens")]
)
def test_bad_flags(flag, text, capsys, tmp_path):
  assert bench_long_prompt.main(["x", "--model=none.gguf", flag, f"--output={tmp_path}"]) == 1
  assert text in capsys.readouterr().err and not list(tmp_path.iterdir())
