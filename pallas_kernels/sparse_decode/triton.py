"""Sparse decoding on NVIDIA GPUs (sm_80 and later) through jax-triton. Deterministic; no gradient.

Reads each listed block once for the G query heads of its key head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, tune

MERGED = 32  # channels that a program of `merge` joins


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
  """`num_splits` programs share one list."""

  num_splits: int = 32
  num_warps: int = 4
  num_stages: int = 2
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    gpu.check_tiles(self, num_splits=1, num_warps=1)


def default_config(rows: int, num_listed: int) -> TritonConfig:
  """About 512 programs (four for each multiprocessor of a large device), at most one per block."""
  splits = gpu.next_power_of_two(-(-512 // max(1, rows)))
  splits = max(1, min(splits, 128, gpu.next_power_of_two(num_listed)))
  return TritonConfig(num_splits=splits, num_stages=1 if splits >= num_listed else 2)


def decode_triton(
  q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM, *, block_size, config=None
):
  """As `api.decode_blocks`, or NotImplementedError with the reason."""
  B, T, N, H = q_BTNH.shape
  K, W = k.shape[2], ids_BKTW.shape[3]
  name = f"{tune.key(N // K, H, q_BTNH.dtype)}_rows{B * T * K}"
  config = config or tune.lookup("sparse_decode", TritonConfig, name)
  config = config or default_config(B * T * K, W)
  gpu.check_cuda("sparse_decode", config.compute_capability)
  gpu.check_arrays("sparse_decode", q=q_BTNH, k=k, v=v)
  gpu.require_power_of_two("sparse_decode", block_size=block_size)
  if H > 256:
    raise NotImplementedError(f"sparse_decode: head width {H}, at most 256")
  from pallas_kernels.sparse_decode import triton_kernels

  is_paged, splits = page_table_BM is not None, config.num_splits
  base_B = jnp.zeros((B,), jnp.int32) if base_B is None else base_B
  HP = gpu.next_power_of_two(H, least=16)
  parts, lses = gpu.launch(
    triton_kernels.decode,
    *(q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B),
    page_table_BM if is_paged else base_B,
    out_shape=(
      jax.ShapeDtypeStruct((B, T, splits, N, H), jnp.float32),
      jax.ShapeDtypeStruct((B, T, splits, N), jnp.float32),
    ),
    grid=(splits, K, B * T),
    num_warps=config.num_warps,
    num_stages=config.num_stages,
    compute_capability=config.compute_capability,
    scale=H**-0.5,
    T=T,
    S=k.shape[1],
    K=K,
    G=N // K,
    GP=gpu.next_power_of_two(N // K),
    H=H,
    HP=HP,
    W=W,
    WP=gpu.next_power_of_two(W),
    M=page_table_BM.shape[1] if is_paged else 1,
    BLOCK=block_size,
    PAGED=is_paged,
    SPLITS=splits,
    PRECISION=gpu.precision(q_BTNH.dtype),
  )
  return gpu.launch(
    triton_kernels.merge,
    *(parts, lses),
    out_shape=(
      jax.ShapeDtypeStruct(q_BTNH.shape, v.dtype),
      jax.ShapeDtypeStruct((B, T, N), jnp.float32),
    ),
    grid=(N, B * T, -(-HP // MERGED)),
    num_warps=4,
    num_stages=1,
    compute_capability=config.compute_capability,
    N=N,
    H=H,
    HB=min(HP, MERGED),
    SPLITS=splits,
  )
