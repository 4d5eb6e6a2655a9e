"""What every command shares: --help, own flags, one line for bad input."""

import importlib
import pathlib

import jax.numpy as jnp
import pytest
from absl import flags

from experiments import _command

FOLDER = pathlib.Path(_command.__file__).parent
VERBS = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem != "fetch_model")


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_flag_and_bad_flags_are_one_line(verb, capsys):
  module = importlib.import_module(f"experiments.{verb}")
  with pytest.raises(SystemExit) as stop:
    module.main([verb, "--help"])
  text = capsys.readouterr().out
  assert stop.value.code == 0
  assert text.startswith(module.__doc__) and f"python -m experiments.{verb}" in text
  assert text.count("  --") >= 2
  for bad in ("--no_such_flag=1", "stray"):
    assert module.main([verb, bad]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{verb}: ") and bad.strip("-").partition("=")[0] in error
    assert len(error.splitlines()) == 1


def test_flags_are_read_afresh_and_needed_ones_named():
  values = flags.FlagValues()
  flags.DEFINE_multi_string("text", [], "Files.", flag_values=values)
  flags.DEFINE_string("model", None, "A folder.", flag_values=values)
  for _ in range(2):
    _command.parse(values, ["x", "--text=a", "--text=b", "--model=m"], "doc", ("text", "model"))
    assert values.text == ["a", "b"]
  with pytest.raises(ValueError, match="--text: found none"):
    _command.parse(values, ["x", "--model=m"], "doc", ("text", "model"))
  with pytest.raises(ValueError, match="--model: found none"):
    _command.parse(values, ["x", "--text=a"], "doc", ("text", "model"))


def test_status_is_that_of_the_work(capsys):
  assert _command.guard("a/b.py", lambda: None) == 0
  assert _command.guard("a/b.py", lambda: 3) == 3

  def bad():
    raise ValueError("field: found 1, expected 2")

  def unserved():
    raise NotImplementedError("xla: no such form")

  def broken():
    raise RuntimeError("a bug")

  def interrupted():
    raise KeyboardInterrupt

  def exhausted():
    jnp.zeros((1 << 50,), jnp.int8).block_until_ready()  # a PiB

  assert _command.guard("a/b.py", bad) == 1
  assert capsys.readouterr().err == "b: field: found 1, expected 2\n"
  assert _command.guard("a/b.py", unserved) == 1
  assert capsys.readouterr().err == "b: xla: no such form\n"
  assert _command.guard("a/b.py", interrupted) == 130
  assert capsys.readouterr().err == "b: interrupted\n"
  assert _command.guard("a/b.py", exhausted) == 1
  error = capsys.readouterr().err
  assert error.startswith("b: RESOURCE_EXHAUSTED: Out of memory") and "grad_accum" in error
  assert len(error.splitlines()) == 1
  with pytest.raises(RuntimeError, match="a bug"):
    _command.guard("a/b.py", broken)


def test_lists_of_numbers_name_their_flag():
  values = flags.FlagValues()
  flags.DEFINE_list("sizes", ["4", "8"], "Sizes.", flag_values=values)
  _command.parse(values, ["x"], "doc")
  assert _command.integers(values, "sizes") == [4, 8]
  for bad in ("a", "", "4,0", "1.5"):
    _command.parse(values, ["x", f"--sizes={bad}"], "doc")
    with pytest.raises(ValueError, match=f"--sizes: found '{bad}', expected integers >= 1"):
      _command.integers(values, "sizes")


@pytest.mark.parametrize(
  "verb, args, message",
  [
    ("quickstart", ["--steps=5"], "--steps=5: 5 is not integer >= 20"),
    ("quickstart", ["--set=model.zzz=1"], "model.zzz: ModelConfig has no field 'zzz'"),
    ("quickstart", ["--data=nowhere"], "nowhere: no such file or folder"),
    ("qat_study", ["--seeds=0"], "--seeds=0: 0 is not a positive integer"),
    ("bench_tunnel", ["--sides=zzz"], r"--sides: found ['zzz'], expected some of"),
    ("bench_sparse", ["--lengths=x"], "--lengths: found 'x', expected integers >= 1"),
    ("scalingbench", ["--chance=2"], "--chance=2"),
    ("build_fr_index", ["--vocab_size=0"], "--vocab_size=0"),
    ("generate", ["--model=m", "--prompt_file=nowhere"], "--prompt_file: nowhere: No such file"),
  ],
)
def test_bad_values_are_one_line_and_nothing_is_written(
  tmp_path, monkeypatch, capsys, verb, args, message
):
  monkeypatch.chdir(tmp_path)
  assert importlib.import_module(f"experiments.{verb}").main([verb, *args]) == 1
  error = capsys.readouterr().err
  assert error.startswith(f"{verb}: ") and message in error and len(error.splitlines()) == 1
  assert not any(tmp_path.iterdir())
