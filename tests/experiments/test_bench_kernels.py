"""bench_kernels: the plan names real cases, rows are kept by case, failures are told."""

import functools
import importlib
import json

import jax
import pytest

from experiments import bench_kernels
from pallas_kernels.common import bench
from pallas_kernels.ternary_gemm import bench as ternary_bench
from pallas_kernels.ternary_gemm import cases as ternary_cases
from pallas_kernels.w4a16_gemm import bench as packed_bench


@pytest.fixture(autouse=True)
def few_layers(monkeypatch):
  monkeypatch.setattr(packed_bench, "MAX_LAYERS", 2)  # of a program: 64 take seconds to compile


TERNARY = [
  "bench_kernels",
  "--ops=ternary_gemm",
  "--implementation=xla",
  "--cases=tiny_groups",
  "--repeats=1",
]


def test_the_plan_names_cases_that_the_benches_have(monkeypatch):
  class Accepted(Exception):
    pass

  parse = bench.arguments

  def accepted(*args):
    parse(*args)  # leaves the process for a case that is not there
    raise Accepted

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(bench, "arguments", accepted)
  for op, runs in bench_kernels.PLAN.items():
    main = importlib.import_module(f"pallas_kernels.{op}.bench").main
    for implementation, cases in runs:
      with pytest.raises(Accepted):
        main([f"--implementation={implementation}", f"--cases={cases}"])
    with pytest.raises(SystemExit):
      main(["--implementation=triton", "--cases=none"])


def test_rows_replace_those_of_the_same_case_and_others_stay(tmp_path, monkeypatch, capsys):
  main = functools.partial(ternary_bench.main, shapes=ternary_cases.TINY)
  monkeypatch.setattr(ternary_bench, "main", main)
  (tmp_path / "kernels_cpu.json").write_text(
    json.dumps(
      dict(
        rows=[
          dict(op="ternary_gemm", case="tiny_groups", implementation="xla", seconds=-1.0),
          dict(op="other", case="c", implementation="xla", seconds=2.0),
        ]
      )
    )
  )
  assert bench_kernels.main([*TERNARY, f"--output={tmp_path}"]) == 0
  rows = {r["op"]: r for r in json.loads((tmp_path / "kernels_cpu.json").read_text())["rows"]}
  assert rows["other"]["seconds"] == 2.0 and rows["ternary_gemm"]["seconds"] > 0
  assert rows["ternary_gemm"]["command"] == (
    "python -m pallas_kernels.ternary_gemm.bench --implementation=xla --cases=tiny_groups "
    "--repeats=1"
  )


def test_a_bench_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
  def fails(argv):
    raise RuntimeError("out of shared memory\nmore")

  monkeypatch.setitem(bench_kernels.PLAN, "ternary_gemm", [("xla", "a"), ("xla", "tiny_groups")])
  good = functools.partial(ternary_bench.main, shapes=ternary_cases.TINY)
  mains = iter([fails, good])
  monkeypatch.setattr(ternary_bench, "main", lambda argv: next(mains)(argv))
  assert bench_kernels.main(["x", "--ops=ternary_gemm", "--repeats=1", f"--output={tmp_path}"]) == 1
  assert "ternary_gemm xla: RuntimeError: out of shared memory" in capsys.readouterr().err
  assert len(json.loads((tmp_path / "kernels_cpu.json").read_text())["rows"]) == 1


@pytest.mark.parametrize(
  "args, found",
  [
    (["--ops=flash"], "--ops: found ['flash']"),
    (["--cases=a"], "--implementation, --cases"),
    (["--cases=a", "--implementation=xla"], "--ops: found"),
    ([], "no accelerator"),
  ],
)
def test_bad_flags_are_one_line(args, found, capsys, tmp_path):
  assert bench_kernels.main(["x", *args, f"--output={tmp_path}"]) == 1
  assert found in capsys.readouterr().err and not list(tmp_path.iterdir())
