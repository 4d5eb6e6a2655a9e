"""Block selection on NVIDIA GPUs (sm_80 and later) through jax-triton.

Queries go in runs whose block scores fit `max_score_bytes`; a run is two kernels, scores then
choice. Deterministic. Scores are float32 sums of the products of the input type, so a choice can
differ from the reference's where two blocks' scores differ by rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import gpu, tune
from pallas_kernels.sparse_topk import few, launches
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import rule as rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
  """Tiles of the score kernel, warps of both, bytes of block scores held at a time."""

  block_q: int = 8  # queries of one program; times the group size = columns of its matmuls
  block_c: int = 64  # compressed keys of one tile
  num_warps: int = 4
  num_stages: int = 2
  blocks_per_warp: int = 2048  # of the row of scores that a choice holds in registers
  max_score_bytes: int = 2**28
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, block_q=1, block_c=1, num_warps=1, blocks_per_warp=1)


def default_config(group: int, head_dim: int, dtype) -> TritonConfig:
  """As tuned for the device; else 128 columns a product: three programs a multiprocessor of Hopper,
  where one multiplies while others exponentiate. Before it they take registers, too.
  """
  tuned = tune.lookup("sparse_topk", TritonConfig, tune.key(group, head_dim, dtype))
  rows = gpu.next_power_of_two(group)
  if jnp.dtype(dtype).itemsize == 4:  # no tensor cores: fewer columns in registers
    columns, tiles = 32, dict(block_c=32, num_stages=1)
  else:  # small groups: many queries, whose scores and bounds are registers
    columns, tiles = 128 if group >= 16 else 64, dict(num_stages=2)
  return tuned or TritonConfig(block_q=max(1, columns // rows), **tiles)


def runs(
  q_BTNH,
  fine_BFKH,
  coarse_BFKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  config: TritonConfig | None = None,
):
  """(queries of a run, its block scores, its choice); NotImplementedError with the reason.

  scores(first) -> [B, K, rows, M] float32 of the queries from `first` on, and choose(first, scores)
  -> (ids [B, K, rows, W], counts [B, K, rows]) are one kernel each.
  """
  B, T, N, H = q_BTNH.shape
  F, K = fine_BFKH.shape[1:3]
  config = config or default_config(N // K, H, q_BTNH.dtype)
  gpu.check_cuda("sparse_topk", config.compute_capability)
  gpu.check_arrays("sparse_topk", q=q_BTNH, fine=fine_BFKH)
  per_block = rule.block_size // rule.kernel_stride
  gpu.require_power_of_two("sparse_topk", **{"block_size / kernel_stride": per_block})
  left = rule.kernel_size // rule.kernel_stride - 1
  if left > per_block:
    raise NotImplementedError(f"sparse_topk: a window of {rule.kernel_size} spans three blocks")
  if H > 256:
    raise NotImplementedError(f"sparse_topk: head width {H}, at most 256")
  from pallas_kernels.sparse_topk import triton_kernels

  norm_BCKH, C, level, fine_BFKH, offset_B = launches.operands(
    fine_BFKH, coarse_BFKH, q_offset, rule
  )
  G, block_c = N // K, config.block_c
  M = -(-rule.num_blocks(num_slots) // block_c) * block_c
  most = config.max_score_bytes // (4 * B * K * M) // config.block_q * config.block_q
  rows = max(config.block_q, min(most, -(-T // config.block_q) * config.block_q))

  def scores(first):
    return gpu.launch(
      triton_kernels.block_scores,
      q_BTNH,
      fine_BFKH,
      norm_BCKH,
      offset_B,
      start_BT,
      jnp.reshape(first, (1,)).astype(jnp.int32),
      out_shape=jax.ShapeDtypeStruct((B, K, rows, M), jnp.float32),
      grid=(rows // config.block_q, K, B),
      num_warps=config.num_warps,
      num_stages=config.num_stages,
      scale=H**-0.5,
      F=F,
      C=C,
      G=G,
      GP=gpu.next_power_of_two(G),
      H=H,
      HP=gpu.next_power_of_two(H, least=16),
      SIZE=rule.kernel_size,
      STRIDE=rule.kernel_stride,
      NORM_SIZE=level * rule.kernel_size,
      NORM_STRIDE=level * rule.kernel_stride,
      PER_BLOCK=per_block,
      LOCAL=rule.num_local,
      QUERIES=config.block_q,
      KEYS=block_c,
      PRECISION=gpu.precision(q_BTNH.dtype),
      T=T,
      K=K,
      M=M,
      ROWS=rows,
      compute_capability=config.compute_capability,
    )

  def choose(first, scores_BKrM):
    return launches.choose(
      *(scores_BKrM, offset_B, start_BT, first, rule),
      blocks_per_warp=config.blocks_per_warp,
      compute_capability=config.compute_capability,
    )

  return rows, scores, choose


def select_triton(
  q_BTNH,
  fine_BFKH,
  coarse_BFKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  config: TritonConfig | None = None,
  nodes: nodes_lib.Nodes | None = None,
):
  """As `xla.select_xla`, or NotImplementedError with the reason. `config`: of the kernels for many
  queries, also where there are few (but for nodes)."""
  (B, T), K, W = q_BTNH.shape[:2], fine_BFKH.shape[2], rule.num_selected
  rows, scores, choose = runs(
    q_BTNH, fine_BFKH, coarse_BFKH, q_offset, start_BT, rule, num_slots, config
  )
  if nodes is not None:
    args = (q_BTNH, fine_BFKH, coarse_BFKH, q_offset, start_BT, rule, num_slots)
    return few.select_nodes(*args, nodes)
  if config is None and few.is_served(q_BTNH, K):
    return few.select(q_BTNH, fine_BFKH, coarse_BFKH, q_offset, start_BT, rule, num_slots)

  def run(first):
    return choose(first, scores(first))

  if rows >= T:
    ids_BKrW, counts_BKr = run(np.int32(0))
    return ids_BKrW[:, :, :T], counts_BKr[:, :, :T]
  ids, counts = jax.lax.map(run, jnp.arange(0, T, rows, dtype=jnp.int32))
  ids_BKTW = jnp.reshape(jnp.moveaxis(ids, 0, 2), (B, K, -1, W))[:, :, :T]
  return ids_BKTW, jnp.reshape(jnp.moveaxis(counts, 0, 2), (B, K, -1))[:, :, :T]
