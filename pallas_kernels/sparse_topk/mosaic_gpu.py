"""Block selection on Hopper GPUs through Pallas Mosaic GPU. Deterministic.

Queries go in runs whose block scores fit `max_score_bytes`; a run is two kernels, scores then
choice, as in Triton's form. Scores are float32 sums of the products of the input type. At 128k
tokens of the 8B shape an H200 takes 26.2 ms (18.2 of scores); Triton takes 12.6, so `auto` does.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import mgpu, spec, tune
from pallas_kernels.sparse_topk import rule as rules

MAX_BLOCKS = 8192  # of a row: a choice holds their scores in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
  """Tiles of the score kernel, bytes of block scores held at a time."""

  warpgroups: int = 1  # of a program; 2 multiply in turns, each 64 queries
  max_score_bytes: int = 2**28
  interpret: bool | None = None  # None = on a CPU

  def __post_init__(self):
    if self.warpgroups not in (1, 2):
      raise ValueError(f"MosaicGpuConfig.warpgroups: found {self.warpgroups}, expected 1 or 2")
    if self.max_score_bytes < 1:
      raise ValueError(
        f"MosaicGpuConfig.max_score_bytes: found {self.max_score_bytes}, expected 1 or more"
      )


def runs(
  q_BTNH,
  fine_BFKH,
  coarse_BCKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  config: MosaicGpuConfig | None = None,
  interpret: bool | None = None,
):
  """(queries of a run, padded length, its block scores, its choice), as `triton.runs`.

  scores(first) -> two arrays [B * K, rows, M] and choose(first, scores) -> ids [B * K, rows,
  width]; `first` counts tiles of 64 queries.
  """
  op = "sparse_topk"
  B, T, N, H = q_BTNH.shape
  F, K = fine_BFKH.shape[1:3]
  name = tune.key(N // K, H, q_BTNH.dtype, "mosaic_gpu")
  config = config or tune.lookup(op, MosaicGpuConfig, name) or MosaicGpuConfig()
  config = spec.requested(config, interpret)
  interpreted = mgpu.is_interpreted(op, config.interpret)
  mgpu.check_arrays(op, interpreted, q=q_BTNH, fine=fine_BFKH, coarse=coarse_BCKH)
  if H % 16 or H > 256:
    raise NotImplementedError(f"{op}: head width {H}, mosaic_gpu serves multiples of 16 up to 256")
  if rule.block_size // rule.kernel_stride > 4 or rule.kernel_size > 5 * rule.kernel_stride:
    raise NotImplementedError(
      f"{op}: {rule.block_size // rule.kernel_stride} windows a block of {rule.kernel_size} tokens"
    )
  M = -(-rule.num_blocks(num_slots) // 128) * 128
  if M > MAX_BLOCKS:
    raise NotImplementedError(f"{op}: {M} blocks, mosaic_gpu serves up to {MAX_BLOCKS}")
  from pallas_kernels.sparse_topk import mgpu_kernels as kernels

  num_bytes = kernels.shared_bytes(rule, N // K, H, q_BTNH.dtype.itemsize, config.warpgroups)
  mgpu.check_shared_memory(op, num_bytes, f"tiles of {H} and {N // K} heads a group")
  norm_BCKH = fine_BFKH if rule.lse == "exact" else coarse_BCKH
  num_norm = norm_BCKH.shape[1]
  tile = config.warpgroups * mgpu.ROWS
  most = config.max_score_bytes // (8 * B * K * M) // tile * tile
  rows = max(tile, min(most, -(-T // tile) * tile))
  padded = -(-T // rows) * rows

  def pad(x, axis, length, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)

  q_BTNH = pad(q_BTNH, 1, padded)
  start_BT = pad(start_BT, 1, padded, rules.NOWHERE)
  offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
  pos_BT = offset_B[:, None] + jnp.arange(padded, dtype=jnp.int32)[None, :]
  pos_Btr, start_Btr = (jnp.reshape(x, (B, -1, tile)) for x in (pos_BT, start_BT))
  last_Bt = jnp.max(jnp.where(start_Btr <= pos_Btr, pos_Btr, -1), axis=-1)
  begin_Bt = jnp.min(start_Btr, axis=-1)
  full_Bt2 = _seen_by_all(pos_Btr, start_Btr, rule, num_norm)
  norm_tile = math.prod(kernels.key_tiles(rule))
  norm_BCKH = pad(norm_BCKH, 1, max(1, -(-num_norm // norm_tile)) * norm_tile)
  fine_EMKH = _by_phase(fine_BFKH, rule, M)
  width = -(-rule.num_selected // kernels.LANES) * kernels.LANES

  def scores(first):
    return kernels.block_scores(
      jnp.reshape(first, (1,)).astype(jnp.int32),
      begin_Bt,
      last_Bt,
      full_Bt2,
      q_BTNH,
      fine_EMKH,
      norm_BCKH,
      pos_BT,
      start_BT,
      rule=rule,
      num_rows=rows,
      num_blocks=M,
      num_fine=F,
      num_norm=num_norm,
      warpgroups=config.warpgroups,
      interpreted=interpreted,
    )

  def choose(first, scores):
    first_1 = jnp.reshape(first, (1,)).astype(jnp.int32)
    return kernels.choose(
      first_1, *scores, pos_BT, start_BT, rule=rule, width=width, interpreted=interpreted
    )

  return rows, padded, scores, choose


def select_mosaic_gpu(
  q_BTNH,
  fine_BFKH,
  coarse_BCKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  config: MosaicGpuConfig | None = None,
  interpret: bool | None = None,
):
  """As `xla.select_xla`, or NotImplementedError with the reason."""
  (B, T), K, W = q_BTNH.shape[:2], fine_BFKH.shape[2], rule.num_selected
  rows, padded, scores, choose = runs(
    q_BTNH, fine_BFKH, coarse_BCKH, q_offset, start_BT, rule, num_slots, config, interpret
  )

  def run(first):
    return choose(first, scores(first))

  if rows == padded:
    ids_ETW = run(jnp.int32(0))
  else:
    ids = jax.lax.map(run, jnp.arange(0, padded // mgpu.ROWS, rows // mgpu.ROWS, dtype=jnp.int32))
    ids_ETW = jnp.reshape(jnp.moveaxis(ids, 0, 1), (B * K, padded, -1))
  ids_BKTW = jnp.reshape(ids_ETW, (B, K, padded, -1))[:, :, :T, :W]
  return ids_BKTW, jnp.sum(ids_BKTW >= 0, axis=-1, dtype=jnp.int32)


def _by_phase(fine_BFKH, rule: rules.Rule, num_blocks: int):
  """[B * parts, M * width / 64, K, H]: the windows of 64 blocks after those of 64 blocks, window i
  of all 64 together; zeros where there is none."""
  from pallas_kernels.sparse_topk import mgpu_kernels as kernels

  B, F, K, H = fine_BFKH.shape
  per_block, (parts, width) = rule.block_size // rule.kernel_stride, kernels.key_tiles(rule)
  length = num_blocks * per_block
  fine = fine_BFKH[:, :length]
  fine = jnp.pad(fine, ((0, 0), (0, length - fine.shape[1]), (0, 0), (0, 0)))
  fine = jnp.reshape(fine, (B, -1, kernels.TILE, parts, width // kernels.TILE, K, H))
  return jnp.reshape(jnp.transpose(fine, (0, 3, 1, 4, 2, 5, 6)), (B * parts, -1, K, H))


def _seen_by_all(pos_Btr, start_Btr, rule: rules.Rule, num_norm: int):
  """[B, tiles, 2]: windows of the normaliser that every query of a tile sees, from and to.

  Padding sees nothing, whatever is added to its sum.
  """
  level = 1 if rule.lse == "exact" else rules.COARSE
  stride, size = level * rule.kernel_stride, level * rule.kernel_size
  is_query = start_Btr <= pos_Btr
  low = jnp.min(jnp.where(is_query, pos_Btr, rules.NOWHERE), axis=-1)
  high = jnp.max(jnp.where(is_query, start_Btr, 0), axis=-1)
  end = jnp.minimum(jnp.maximum(low + 1 - size + stride, 0) // stride, num_norm)
  return jnp.stack((-(-high // stride), end), axis=-1).astype(jnp.int32)
