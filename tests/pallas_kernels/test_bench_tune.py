"""Tuned tiles are found by device and shape; benches refuse a CPU and count their work right."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.common import bench, tune
from pallas_kernels.fp8_gemm import bench as fp8_bench
from pallas_kernels.fp8_gemm import cases as fp8_cases
from pallas_kernels.sparse_attention import bench as attention_bench
from pallas_kernels.sparse_attention import triton
from pallas_kernels.sparse_decode import bench as decode_bench
from pallas_kernels.sparse_topk import bench as topk_bench
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.ternary_gemm import bench as ternary_bench
from pallas_kernels.ternary_gemm import cases as ternary_cases
from pallas_kernels.vocab_topk import bench as vocab_bench
from pallas_kernels.vocab_topk import cases as vocab_cases
from pallas_kernels.w4a16_gemm import bench as packed_bench
from pallas_kernels.w4a16_gemm import cases as packed_cases
from pallas_kernels.w4a16_gemm import matvec
from pallas_kernels.w4a16_gemm import mosaic_gpu as packed_mosaic
from pallas_kernels.w4a16_gemm import triton as packed_triton


def test_a_saved_config_is_found_and_another_shape_is_a_miss(tmp_path, monkeypatch):
  monkeypatch.setattr(tune, "_path", lambda op: tmp_path / f"{op}.json")
  tune._table.cache_clear()
  name = tune.key(16, 128, "bfloat16")
  assert tune.lookup("op", triton.TritonConfig, name) is None
  config = triton.TritonConfig(kv_rows=32, list_stages=3)
  tune.save("op", name, config)
  assert tune.lookup("op", triton.TritonConfig, name) == config
  assert tune.lookup("op", triton.TritonConfig, tune.key(16, 64, "bfloat16")) is None
  kind = jax.devices()[0].device_kind
  assert json.loads((tmp_path / "op.json").read_text())[kind][name]["kv_rows"] == 32
  tune._table.cache_clear()


def test_the_tuner_and_the_lookup_name_one_group_alike(tmp_path, monkeypatch):
  """The tuner has the case's group size, K or -1, the lookup one row of scales."""
  monkeypatch.setattr(tune, "_path", lambda op: tmp_path / f"{op}.json")
  tune._table.cache_clear()
  K, N, like = 1024, 128, jax.ShapeDtypeStruct
  best = matvec.MatvecConfig(num_splits=2)
  tune.save("op", matvec.key(K, N, K, "bfloat16"), best)
  arrays = (like((1, K), "bfloat16"), like((K // 2, N), "uint8"), like((1, N), "float32"))
  assert matvec.config_of(*arrays, bits=4, op="op") == best
  for module in (packed_triton, packed_mosaic):
    assert module.key(4, N, K, K, "bfloat16") == module.key(4, N, K, -1, "bfloat16")
    assert module.key(4, N, K, K // 2, "bfloat16") != module.key(4, N, K, -1, "bfloat16")
  tune._table.cache_clear()


def test_search_takes_the_fastest_that_runs(capsys):
  def seconds(x):
    if x == 0:
      raise ValueError("out of shared memory")
    return abs(x - 3)

  assert tune.search([0, 1, 2, 3, 4], seconds) == 3
  assert "out of shared memory" in capsys.readouterr().out


@pytest.mark.parametrize("module", [attention_bench, topk_bench, decode_bench])
def test_benches_refuse_a_cpu(module, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["bench"])
  with pytest.raises(SystemExit):
    module.main()
  assert "no accelerator" in capsys.readouterr().err


BENCHES = {
  "w4a16_gemm": (packed_bench.main, packed_cases.TINY["tiny_groups"]),
  "ternary_gemm": (ternary_bench.main, ternary_cases.TINY["tiny_groups"]),
  "fp8_gemm": (fp8_bench.main, fp8_cases.TINY["tiny_whole"]),
  "vocab_topk": (vocab_bench.main, vocab_cases.TINY["tiny"]),
}


@pytest.mark.parametrize("op", BENCHES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_benches_print_and_write_a_row_a_case(op, device, tmp_path, monkeypatch, capsys):
  main, case = BENCHES[op]
  monkeypatch.setattr(packed_bench, "MAX_LAYERS", 2)  # of a program: 64 take seconds to compile
  implementation = "xla" if device == "cpu" else "auto"
  flags = [f"--implementation={implementation}", "--repeats=1", f"--json={tmp_path / 'rows'}"]
  monkeypatch.setattr(sys, "argv", ["bench", *flags])
  main(shapes={"one": case, "two": case})
  printed = capsys.readouterr().out.splitlines()
  suffixes = ("", "_linear", "_input_gradient") if op == "fp8_gemm" else ("",)
  names = [case + suffix for case in ("one", "two") for suffix in suffixes]
  assert [line.split()[:3] for line in printed] == [[op, x, implementation] for x in names]
  rows = json.loads((tmp_path / "rows").read_text())["rows"]
  assert [row["case"] for row in rows] == names and all(r["seconds"] > 0 for r in rows)
  if op == "fp8_gemm":
    assert all(float(line.split()[-1]) < 1e-3 for line in printed)  # the same codes, by `ref`
  if op == "vocab_topk":
    assert all(line.endswith("indices equal") for line in printed)


def test_attention_work_counts_the_visible_tokens_of_lists():
  case = dataclasses.replace(
    attention_bench.CASES["minicpm4_8b_4k"],
    num_queries=96,
    num_slots=96,
    rule=rules.Rule(kernel_size=8, kernel_stride=4, block_size=8, local_blocks=2, topk=2),
  )
  ids = np.asarray(attention_bench.lists(case, kept=6))
  assert ids.shape == (1, 2, 96, 4)
  tokens = 0
  for t in range(96):
    row = ids[0, 0, t][ids[0, 0, t] >= 0]
    assert row[-1] == t // 8 and np.all(np.diff(row) > 0) and 0 in row
    tokens += sum(1 for s in range(t + 1) if s // 8 in row)
  flops, _ = attention_bench.work(case, 2, False)
  # `work` counts full rows of W blocks; the current block is on average half filled.
  assert 0.8 * flops < 4 * 128 * 32 * tokens <= flops


def test_row_prints_rates(monkeypatch):
  monkeypatch.setattr(bench, "peaks", lambda: (1e12, 1e9))
  row = bench.Row(
    op="op", case="c", implementation="xla", seconds=1e-3, flops=5e8, bytes=1e5, dense_seconds=4e-3
  )
  text = row.printed()
  assert "1000 us" in text and "50.0 % of roofline" in text and "4.00 x dense" in text
