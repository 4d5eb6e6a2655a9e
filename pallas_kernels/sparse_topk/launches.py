"""What the Triton kernels of many queries (`triton.py`) and of few (`few.py`) share: operands and
the launch of the choice."""

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu
from pallas_kernels.sparse_topk import rule as rules


def operands(fine_BFKH, coarse_BFKH, q_offset, rule: rules.Rule):
  """(keys of the normaliser, how many there are, their level, fine keys, offsets [B])."""
  B, _, K, H = fine_BFKH.shape
  is_exact = rule.lse == "exact"
  norm_BCKH, level = (fine_BFKH, 1) if is_exact else (coarse_BFKH, rules.COARSE)
  C = norm_BCKH.shape[1]
  # A pointer is never read where there is no key; a zero-sized array has none to give.
  norm_BCKH, fine_BFKH = (
    x if x.shape[1] else jnp.zeros((B, 1, K, H), x.dtype) for x in (norm_BCKH, fine_BFKH)
  )
  return norm_BCKH, C, level, fine_BFKH, jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))


def choose(
  scores_BKrM,
  offset_B,
  start_BT,
  first,
  rule: rules.Rule,
  *,
  blocks_per_warp: int,
  compute_capability: int | None,
):
  """(ids [B, K, rows, W], counts [B, K, rows]) of the queries from `first` on."""
  from pallas_kernels.sparse_topk import triton_kernels

  B, K, rows, M = scores_BKrM.shape
  W, MP = rule.num_selected, gpu.next_power_of_two(M, least=16)
  return gpu.launch(
    triton_kernels.choose,
    *(scores_BKrM, offset_B, start_BT, jnp.reshape(first, (1,)).astype(jnp.int32)),
    out_shape=(
      jax.ShapeDtypeStruct((B, K, rows, W), jnp.int32),
      jax.ShapeDtypeStruct((B, K, rows), jnp.int32),
    ),
    grid=(rows, K, B),
    num_warps=min(16, max(1, MP // blocks_per_warp)),
    num_stages=1,
    compute_capability=compute_capability,
    T=start_BT.shape[1],
    K=K,
    M=M,
    MP=MP,
    ROWS=rows,
    W=W,
    WP=gpu.next_power_of_two(W),
    BLOCK=rule.block_size,
    INIT=rule.init_blocks,
    LOCAL=rule.num_local,
    TOPK=rule.topk,
    JOINT=rule.selection == "joint",
  )
