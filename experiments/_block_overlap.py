"""Free blocks in the lists of neighbouring queries and in their union: `block_overlap`."""

import jax
import numpy as np

from experiments import _selection_probe as selection
from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.nn import sparse_attention, sparse_grid
from pallas_kernels.sparse_attention import bench
from pallas_kernels.sparse_topk import rule as rules

NEIGHBOURS = (2, 4, 8)


def overlap(ids_KTW: np.ndarray, rule: rules.Rule, sizes=NEIGHBOURS) -> tuple[float, list[float]]:
  """(free blocks of one list, those in the union of n neighbours' lists for n in sizes), means.

  ids_KTW: block ids of T consecutive queries of K key heads, -1 = none; query t of the second half,
  t >= T / 2, is counted. ValueError where a size does not divide T / 2,
  or no block is free.
  """
  K, T, _ = ids_KTW.shape
  first = T // 2
  if bad := [n for n in sizes if (T - first) % n]:
    raise ValueError(f"length: found {T}, expected halves that {bad} queries divide")
  current = np.arange(first, T)[:, None] // rule.block_size
  ids = ids_KTW[:, first:]
  is_free = (ids >= rule.init_blocks) & (ids <= current - rule.num_local)
  if not is_free.any():
    raise ValueError(f"length: found {T} tokens and no free block, expected more tokens or topk")
  free = np.where(is_free, ids, -1)
  unions = []
  for n in sizes:
    joined = np.sort(free.reshape(K, (T - first) // n, -1), axis=-1)
    before = np.pad(joined[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    unions.append(float(((joined >= 0) & (joined != before)).sum(axis=-1).mean()))
  return float(is_free.sum(axis=-1).mean()), unions


def measure(
  cfg: config.ModelConfig,
  params: types.Params,
  tokens_BT: np.ndarray,
  sparse: config.SparseAttentionConfig,
  sizes=NEIGHBOURS,
) -> dict:
  """`overlap` of every layer, and unions as multiples of one list, over all rows.

  "by_layer": the multiple for each size in the mean of the rows; "times_one_list": their mean.
  Needs cfg.scan_layers False and no latent heads.
  """
  if cfg.mla is not None:
    raise ValueError("model.mla: found latent heads, expected keys of their own (no sparse form)")
  forward = jax.jit(lambda p, t: selection.queries_and_keys(cfg, p, t)[0])
  select = jax.jit(lambda q, k: sparse_attention.select_blocks(q, k, sparse)[0])
  rule, counts = sparse_grid.rule_of(sparse), []
  for row in tokens_BT:
    layers = forward(params, row[None])
    counts.append([overlap(np.asarray(select(q, k))[0], rule, sizes) for q, k in layers])
  free_BL = np.array([[free for free, _ in row] for row in counts])
  union_BLn = np.array([[union for _, union in row] for row in counts])
  times_Ln = (union_BLn / free_BL[..., None]).mean(axis=0)
  return {
    "length": tokens_BT.shape[1],
    "sequences": len(tokens_BT),
    "blocks": rule.num_blocks(tokens_BT.shape[1]),
    "free_blocks_of_a_list": round(float(free_BL.mean()), 3),
    "times_one_list": times_Ln.mean(axis=0).round(3).tolist(),
    "by_layer": times_Ln.round(3).tolist(),
  }


def of_bench(name: str) -> dict:
  """The same of the lists that the kernels' bench draws for one of its cases."""
  if name not in bench.CASES:
    raise ValueError(f"--case: found {name!r}, expected one of {', '.join(bench.CASES)}")
  case = bench.CASES[name]
  kept = 1 if name.endswith("_random") else bench.KEPT
  free, unions = overlap(np.asarray(bench.lists(case, kept))[0], case.rule)
  times = [round(union / free, 3) for union in unions]
  return {"case": name, "kept": kept, "free_blocks_of_a_list": free, "times_one_list": times}
