"""The long-prompt benchmark on a nano model: what is recorded, kept and refused."""

import json

import pytest

from experiments import bench_long_prompt


def test_rows_are_kept_by_side_and_prompt(tmp_path):
  key = {"model": "m.gguf", "chunk": 64, "jax": "1"}
  rows = [{"side": "sparse", "prompt": 8, "x": 1}, {"side": "dense", "prompt": 8, "x": 2}]
  stored = {"environment": {"jax": "1"}, "model": "m.gguf", "chunk": 64, "rows": rows}
  path = tmp_path / "r.json"
  assert bench_long_prompt._recorded(path, key) == {}
  path.write_text(json.dumps(stored))
  found = bench_long_prompt._recorded(path, key)
  assert found == {("sparse", 8): rows[0], ("dense", 8): rows[1]}
  assert bench_long_prompt._recorded(path, key | {"jax": "2"}) == {}


@pytest.mark.parametrize(
  "flag, text", [("--sides=fast", "--sides: found ['fast']"), ("--tokens=3", "tokens")]
)
def test_bad_flags(flag, text, capsys, tmp_path):
  assert bench_long_prompt.main(["x", "--model=none.gguf", flag, f"--output={tmp_path}"]) == 1
  assert text in capsys.readouterr().err and not list(tmp_path.iterdir())
