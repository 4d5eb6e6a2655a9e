"""Time of sparse against dense attention over sequence length, forward, one layer.

  python -m experiments.bench_sparse                       8k to 64k, one key head of MiniCPM4-8B
  python -m experiments.bench_sparse --threads=1           on one core
  python -m experiments.bench_sparse --lengths=65536       adds runs to what is recorded
  python -m experiments.bench_sparse --lengths=8192,16384 --num_heads=32 --num_kv_heads=2
  python -m experiments.bench_sparse --nodes=12 --num_heads=9 --num_kv_heads=3 --head_dim=64

Sparse is `nn.sparse_attention.infllm_attention` (MiniCPM4's sizes, coarse normaliser), dense is
`pallas_kernels.flash`. Inputs are iid normal: neighbouring queries share no more blocks than by
chance, the worst case for sharing work. Repeats alternate; the median counts. Beside
wall time stands the CPU time of the process, which other jobs on the machine disturb less. Memory
is the compiler's count of temporaries, also for a 32k prefill of a whole layer of MiniCPM4-8B.
Writes OUT/sparse_<device>[_1_core].json and .png after every run; runs recorded there with equal
heads, versions and device count too, so that a busy machine can be measured in pieces.

With --nodes: a draft tree of so many behind each length, against one node and against dense
attention of all of them; OUT/sparse_nodes_<device>[_1_core].json, medians, written anew.
"""

import json
import os
import pathlib
import platform
import sys

import jax
from absl import flags

from experiments import _bench_sparse as bench
from experiments import _command, _results
from minicpm_jax.core import files

VALUES = flags.FlagValues()  # own set: other scripts have flags of the same names
LENGTHS = flags.DEFINE_list(
  "lengths", ["8192", "16384", "32768", "65536"], "Tokens.", flag_values=VALUES
)
REPEATS = flags.DEFINE_integer(
  "repeats", 3, "Timed runs each; one at 64k and beyond.", flag_values=VALUES
)
NUM_HEADS = flags.DEFINE_integer(
  "num_heads", 16, "Query heads (MiniCPM4-8B: 32).", flag_values=VALUES
)
NUM_KV_HEADS = flags.DEFINE_integer(
  "num_kv_heads", 1, "Key heads (MiniCPM4-8B: 2).", flag_values=VALUES
)
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Width of a head.", flag_values=VALUES)
THREADS = flags.DEFINE_integer("threads", 0, "CPU cores; 0 = all.", flag_values=VALUES)
NODES = flags.DEFINE_integer(
  "nodes", 0, "Of a draft tree; 0 = a prompt.", lower_bound=0, flag_values=VALUES
)
OUT = flags.DEFINE_string(
  "out", "benchmarks/results", "Folder of the JSON and the picture.", flag_values=VALUES
)


def _run() -> None:
  lengths = _command.integers(VALUES, "lengths")
  if THREADS.value and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: THREADS.value])
  device = jax.devices()[0]
  cores = f"_{THREADS.value}_core" if THREADS.value else ""
  kind = "sparse_nodes" if NODES.value else "sparse"
  path = pathlib.Path(OUT.value) / f"{kind}_{device.platform}{cores}.json"
  setting = {
    "device": device.device_kind,
    "num_cpus": THREADS.value or os.cpu_count(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "num_heads": NUM_HEADS.value,
    "num_kv_heads": NUM_KV_HEADS.value,
    "head_dim": HEAD_DIM.value,
  }
  if NODES.value:
    measured = []
    for length in lengths:
      measured.append(bench.measure_nodes(length, NODES.value, 10 * REPEATS.value, setting))
      print(json.dumps(measured[-1]), flush=True)
    files.write_json(path, setting | {"rows": measured})
    return
  rows = {row["length"]: row for row in _results.recorded(path, setting)}
  memory = bench.layer_memory()
  print(json.dumps(memory), flush=True)
  for length in lengths:
    repeats = 1 if length >= 65536 else REPEATS.value
    for row in bench.measure(length, repeats, setting, rows.get(length)):
      rows[length] = row
      print(json.dumps({k: v for k, v in row.items() if k != "runs"}), flush=True)
      ordered = [rows[n] for n in sorted(rows)]
      files.write_json(path, setting | {"prefill_of_a_layer": memory, "rows": ordered})
      bench.draw(ordered, path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  sys.exit(main())
