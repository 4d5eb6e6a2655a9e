"""What `experiments.bench_sparse` measures, keeps and draws."""

import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.core import pictures
from minicpm_jax.nn import sparse_attention
from pallas_kernels.flash import api as flash


def compiled(function, q, k, v):
  """(callable, MiB of temporaries)."""
  ready = jax.jit(function).lower(q, k, v).compile()
  return ready, ready.memory_analysis().temp_size_in_bytes / 2**20


def timed(function, *args) -> tuple[float, float]:
  """(wall, CPU) seconds of one run."""
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - wall, time.process_time() - cpu


def measure(length: int, repeats: int, setting: dict, earlier: dict | None = None):
  """The row of one length after every repeat; runs alternate, those of `earlier` count too."""
  rng = np.random.default_rng(0)
  heads = (setting["num_heads"], setting["num_kv_heads"], setting["num_kv_heads"])
  width = setting["head_dim"]
  q, k, v = (jnp.asarray(rng.normal(size=(1, length, n, width)), jnp.float32) for n in heads)
  cfg = SparseAttentionConfig(lse="coarse", dense_len=-1)
  forms = {
    "dense": lambda q, k, v: flash.flash_attention(q, k, v),
    "sparse": lambda q, k, v: sparse_attention.infllm_attention(q, k, v, cfg),
  }
  ready = {name: compiled(form, q, k, v) for name, form in forms.items()}
  runs = list(earlier["runs"]) if earlier else []
  for _ in range(repeats):
    run = {"load": round(os.getloadavg()[0], 2)}
    for name, (form, _) in ready.items():
      run[f"{name}_wall_s"], run[f"{name}_cpu_s"] = timed(form, q, k, v)
    runs.append(run)
    yield summary(length, runs) | {f"{name}_temp_mib": ready[name][1] for name in forms}


def summary(length: int, runs: list[dict]) -> dict:
  """Medians over the runs; a speedup is the median of the runs' own ratios."""
  row: dict = {"length": length, "runs": runs}
  for kind in ("wall", "cpu"):
    for name in ("dense", "sparse"):
      row[f"{name}_{kind}_s"] = statistics.median(run[f"{name}_{kind}_s"] for run in runs)
    row[f"speedup_{kind}"] = statistics.median(
      run[f"dense_{kind}_s"] / run[f"sparse_{kind}_s"] for run in runs
    )
  return row


def draw(rows: list[dict], path: pathlib.Path) -> None:
  figure, (left, right) = pictures.figure(2, width=4.5, height=3.5)
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
    axis.minorticks_off()
  pictures.save(figure, path, dpi=120)


def layer_memory() -> dict:
  """Temporaries of a 32k prefill of one layer of MiniCPM4-8B (compiled, not run)."""
  shapes = [jax.ShapeDtypeStruct((1, 32768, n, 128), jnp.float32) for n in (32, 2, 2)]
  cfg = SparseAttentionConfig(lse="coarse")
  form = jax.jit(lambda *x: sparse_attention.infllm_attention(*x, cfg))
  size = form.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  return {"length": 32768, "num_heads": 32, "num_kv_heads": 2, "temp_gib": round(size / 2**30, 3)}
