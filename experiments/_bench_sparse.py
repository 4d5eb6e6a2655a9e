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
from minicpm_jax.nn import kv, sparse_attention, sparse_cache, sparse_tree
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


def measure_nodes(length: int, num_nodes: int, repeats: int, setting: dict) -> dict:
  """A draft tree behind `length` tokens: medians of its nodes together, of one, of all dense.

  Inputs are iid normal: the nodes' lists unite to many more blocks than those of a text's.
  """
  rng = np.random.default_rng(0)
  N, K, H = setting["num_heads"], setting["num_kv_heads"], setting["head_dim"]
  cfg = SparseAttentionConfig(lse="coarse", dense_len=-1)
  slots = -(-(length + num_nodes) // cfg.block_size) * cfg.block_size
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  k, v = normal(1, slots, K, H), normal(1, slots, K, H)
  levels = {level: sparse_attention.compress(k, cfg, level) for level in sparse_cache.LEVELS}
  cache = kv.LayerCache(k=k, v=v, length=jnp.full((1,), length, jnp.int32), **levels)
  depth = np.arange(num_nodes, dtype=np.int32)[None] // 2  # a chain of pairs: the first goes on
  anc = (np.arange(num_nodes)[:, None] > np.arange(num_nodes)) & (np.arange(num_nodes) % 2 == 0)
  anc = (anc & (depth[0][:, None] > depth[0]))[None] | np.eye(num_nodes, dtype=bool)

  def sparse(q, arrays, depth, anc):
    cache = kv.LayerCache(**arrays)
    own = slice(length, length + q.shape[1])
    new = cache.k[:, own], cache.v[:, own]
    grid = sparse_tree.TreeGrid(cache.length, depth, anc, all_dense=False)
    return sparse_tree.attend_tree(q, *new, q, cache, cfg, grid)

  def dense(q, arrays, depth, anc):
    past = jnp.ones((1, q.shape[1], length), bool)
    rest = jnp.zeros((1, q.shape[1], slots - length - q.shape[1]), bool)
    mask_BTS = jnp.concatenate((past, anc, rest), axis=2)
    return jax.nn.dot_product_attention(q, arrays["k"], arrays["v"], mask=mask_BTS[:, None])

  arrays = {name: getattr(cache, name) for name in ("k", "v", "length", *levels)}
  q = normal(1, num_nodes, N, H)
  args = {"nodes": (q, arrays, depth, anc), "one": (q[:, :1], arrays, depth[:, :1], anc[:, :1, :1])}
  args["dense nodes"] = args["nodes"]
  ready, row = {}, {"length": length, "num_nodes": num_nodes, "load": round(os.getloadavg()[0], 2)}
  for name, arrays in args.items():
    form = jax.jit(dense if name.startswith("dense") else sparse).lower(*arrays).compile()
    row[f"{name} temp_mib"] = form.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready(form(*arrays))
    ready[name] = form
  runs = {name: [] for name in ready}
  for _ in range(repeats):
    for name, form in ready.items():
      runs[name].append(timed(form, *args[name]))
  for name, times in runs.items():
    wall, cpu = (1e3 * statistics.median(kind) for kind in zip(*times, strict=True))
    row |= {f"{name} wall_ms": wall, f"{name} cpu_ms": cpu}
  return row


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
