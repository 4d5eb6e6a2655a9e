"""Time of sparse against dense attention over sequence length, forward, one layer.

  python -m experiments.bench_sparse                       8k to 64k, one key head of MiniCPM4-8B
  python -m experiments.bench_sparse --lengths=8192,16384 --num_heads=32 --num_kv_heads=2

Sparse is `nn.sparse_attention.infllm_attention` (MiniCPM4's sizes, coarse normaliser), dense is
`pallas_kernels.flash`. Inputs are iid normal: neighbouring queries share no more blocks than by
chance, the worst case for sharing work. Repeats alternate; the median counts. Beside
wall time stands the CPU time of the process, which other jobs on the machine disturb less. Writes
benchmarks/results/sparse_<device>.json and .png. Memory is the compiler's count of temporaries.
"""

import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.core import extras
from minicpm_jax.nn import sparse_attention
from pallas_kernels.flash import api as flash

LENGTHS = flags.DEFINE_list("lengths", ["8192", "16384", "32768", "65536"], "Tokens.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs each; one at 64k and beyond.")
NUM_HEADS = flags.DEFINE_integer("num_heads", 16, "Query heads (MiniCPM4-8B: 32).")
NUM_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 1, "Key heads (MiniCPM4-8B: 2).")
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Width of a head.")
OUT = flags.DEFINE_string("out", "benchmarks/results", "Folder of the JSON and the picture.")


def compiled(function, q, k, v):
  """(callable, MiB of temporaries)."""
  ready = jax.jit(function).lower(q, k, v).compile()
  return ready, ready.memory_analysis().temp_size_in_bytes / 2**20


def timed(function, *args) -> tuple[float, float]:
  """(wall, CPU) seconds of one run."""
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - wall, time.process_time() - cpu


def measure(length: int, repeats: int) -> dict:
  """Medians of one length; the runs alternate."""
  rng = np.random.default_rng(0)
  heads = (NUM_HEADS.value, NUM_KV_HEADS.value, NUM_KV_HEADS.value)
  q, k, v = (
    jnp.asarray(rng.normal(size=(1, length, n, HEAD_DIM.value)), jnp.float32) for n in heads
  )
  cfg = SparseAttentionConfig(lse="coarse", dense_len=-1)
  forms = {
    "dense": lambda q, k, v: flash.flash_attention(q, k, v),
    "sparse": lambda q, k, v: sparse_attention.infllm_attention(q, k, v, cfg),
  }
  ready = {name: compiled(form, q, k, v) for name, form in forms.items()}
  runs = {name: [] for name in forms}
  for _ in range(repeats):
    for name, (form, _) in ready.items():
      runs[name].append(timed(form, q, k, v))
  row = {"length": length, "repeats": repeats}
  for name, pairs in runs.items():
    row[f"{name}_wall_s"], row[f"{name}_cpu_s"] = map(statistics.median, zip(*pairs, strict=True))
    row[f"{name}_temp_mib"] = ready[name][1]
  row["speedup_wall"] = row["dense_wall_s"] / row["sparse_wall_s"]
  row["speedup_cpu"] = row["dense_cpu_s"] / row["sparse_cpu_s"]
  return row


def draw(rows: list[dict], path: pathlib.Path) -> None:
  pyplot = extras.require_extra("matplotlib.pyplot", extra="plot")
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
  lengths = [row["length"] for row in rows]
  for name, mark in (("dense", "o-"), ("sparse", "s-")):
    left.loglog(lengths, [row[f"{name}_cpu_s"] for row in rows], mark, label=f"{name}, CPU time")
    left.loglog(lengths, [row[f"{name}_wall_s"] for row in rows], mark[0] + ":", label="wall")
  left.set(xlabel="tokens", ylabel="seconds a forward")
  right.plot(lengths, [row["speedup_cpu"] for row in rows], "o-", label="CPU time")
  right.plot(lengths, [row["speedup_wall"] for row in rows], "o:", label="wall")
  right.axhline(1, color="gray", linewidth=0.5)
  right.set(xscale="log", xlabel="tokens", ylabel="dense / sparse", ylim=(0, None))
  for axis in (left, right):
    axis.legend(fontsize=8)
    axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main(argv) -> None:
  del argv
  device = jax.devices()[0]
  folder = pathlib.Path(OUT.value)
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for length in map(int, LENGTHS.value):
    rows.append(measure(length, 1 if length >= 65536 else REPEATS.value))
    print(json.dumps(rows[-1]), flush=True)
    result = {
      "device": device.device_kind,
      "jax": jax.__version__,
      "num_heads": NUM_HEADS.value,
      "num_kv_heads": NUM_KV_HEADS.value,
      "head_dim": HEAD_DIM.value,
      "rows": rows,
    }
    path = folder / f"sparse_{device.platform}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
