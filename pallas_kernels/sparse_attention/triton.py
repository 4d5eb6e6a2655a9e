"""Attention over selected blocks on NVIDIA GPUs (sm_80 and later) through jax-triton.

Residuals: q, k, v, out, lists [B, K, T, W] int32, lse [B, T, N] float32. The backward pass inverts
the lists (queries sorted by block), cuts every block's queries into runs of `run_queries`, and adds
the runs' float32 dk and dv in order: forward and backward are bitwise deterministic. Memory of the
backward beyond the residuals: 8 * block * H bytes a run, at most M + T * W / run_queries runs a
key head, and 4 * N * H bytes a query where there is a band.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, tune
from pallas_kernels.sparse_attention import inverse, vjp


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonConfig:
  """Tiles and warps: `list_*` one query or one run, `band_*` several queries at once."""

  list_warps: int = 4
  list_stages: int = 2
  kv_rows: int = 64  # query rows (queries times group) of a dk, dv step
  kv_warps: int = 8
  kv_stages: int = 2
  run_queries: int = 4096
  band_rows: int = 128  # query rows of a band tile
  band_keys: int = 64
  band_warps: int = 8
  band_stages: int = 2
  compute_capability: int | None = None  # None = of the device in use

  def __post_init__(self):
    counts = ("list_stages", "kv_stages", "band_stages", "compute_capability")
    names = {field.name for field in dataclasses.fields(self)} - set(counts)
    gpu.check_tiles(self, **dict.fromkeys(sorted(names), 1))


def default_config(group: int, head_dim: int, dtype) -> TritonConfig:
  """As tuned for the device; else full tiles for rows of up to 256 bytes, smaller for wider ones.

  float32 runs without tensor cores (it is not rounded to TF32) and needs the registers.
  """
  tuned = tune.lookup("sparse_attention", TritonConfig, tune.key(group, head_dim, dtype))
  if tuned is not None:
    return tuned
  if jnp.dtype(dtype).itemsize == 4:
    return TritonConfig(
      kv_rows=16,
      kv_stages=1,
      band_rows=32,
      band_keys=32,
      band_stages=1,
    )
  if head_dim > 128:
    return TritonConfig(kv_rows=32, kv_stages=1, band_rows=64, band_stages=1)
  return TritonConfig()


@dataclasses.dataclass(frozen=True)
class _Static:
  block: int
  num_local: int
  config: TritonConfig


def attend_triton(
  q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, *, block_size, num_local=0, config=None
):
  """As `vjp.attend_xla`, or NotImplementedError with the reason.

  Positions go up by one along T; lists ascend.
  """
  config = checked_config(q_BTNH, k_BSKH, v_BSKH, block_size, config)
  pos_BT = jnp.broadcast_to(pos_BT, start_BT.shape)
  static = _Static(block_size, num_local, config)
  return _attend(static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT)


def checked_config(q_BTNH, k_BSKH, v_BSKH, block_size, config=None) -> TritonConfig:
  """The config to use, or NotImplementedError with the reason why a call is not served."""
  H, V = q_BTNH.shape[-1], v_BSKH.shape[-1]
  config = config or default_config(q_BTNH.shape[2] // k_BSKH.shape[2], H, q_BTNH.dtype)
  gpu.check_cuda("sparse_attention", config.compute_capability)
  gpu.check_arrays("sparse_attention", q=q_BTNH, k=k_BSKH, v=v_BSKH)
  gpu.require_power_of_two("sparse_attention", block_size=block_size)
  if H != V or H > 256:
    raise NotImplementedError(f"sparse_attention: head widths {H} and {V}, equal ones up to 256")
  return config


def backward(residuals, cotangents, *, block_size, num_local=0, config=None):
  """(dq, dk, dv) of another backend's forward. residuals: (q, k, v, ids, pos, start, out, lse)."""
  config = checked_config(*residuals[:3], block_size, config)
  return _backward(_Static(block_size, num_local, config), residuals, cotangents)[:3]


def _sizes(static: _Static, q_BTNH, k_BSKH) -> dict:
  """Constants that all kernels share."""
  (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  return dict(
    scale=H**-0.5,
    T=T,
    S=S,
    K=K,
    G=N // K,
    GP=gpu.next_power_of_two(N // K),
    H=H,
    HP=gpu.next_power_of_two(H, least=16),
    BLOCK=static.block,
    PRECISION=gpu.precision(q_BTNH.dtype),
    compute_capability=static.config.compute_capability,
  )


def _list_sizes(static: _Static, ids_BKTW) -> dict:
  W = ids_BKTW.shape[-1]
  return dict(
    W=W,
    WP=gpu.next_power_of_two(W),
    NUM_LOCAL=static.num_local,
    num_warps=static.config.list_warps,
    num_stages=static.config.list_stages,
  )


def _band_sizes(static: _Static, sizes: dict) -> dict:
  config = static.config
  return dict(
    NUM_LOCAL=static.num_local,
    QUERIES=max(1, config.band_rows // sizes["GP"]),
    KEYS=config.band_keys,
    num_warps=config.band_warps,
    num_stages=config.band_stages,
  )


def _forward(static: _Static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT):
  from pallas_kernels.sparse_attention import triton_kernels

  (B, T, N, _), K = q_BTNH.shape, k_BSKH.shape[2]
  sizes = _sizes(static, q_BTNH, k_BSKH)
  out_shape = (
    jax.ShapeDtypeStruct(q_BTNH.shape, v_BSKH.dtype),
    jax.ShapeDtypeStruct((B, T, N), jnp.float32),
  )
  if static.num_local:
    band = _band_sizes(static, sizes)
    band_out, band_lse = gpu.launch(
      triton_kernels.band_forward,
      *(q_BTNH, k_BSKH, v_BSKH, pos_BT, start_BT),
      out_shape=out_shape,
      grid=(-(-T // band["QUERIES"]), K, B),
      **sizes,
      **band,
    )
  else:
    band_out, band_lse = q_BTNH, start_BT  # not read
  return gpu.launch(
    triton_kernels.list_forward,
    *(q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, band_out, band_lse),
    out_shape=out_shape,
    grid=(T, K, B),
    **sizes,
    **_list_sizes(static, ids_BKTW),
  )


def _invert(static: _Static, ids_BKTW, pos_BT, num_blocks: int):
  """(queries [B, K, T*W] sorted by block, first run [B, K, M+1], block, begin, end of each run).

  Runs hold at most `run_queries` entries of one block; there are M + T*W / run_queries of them.
  """
  B, K, T, W = ids_BKTW.shape
  is_entry = ids_BKTW >= 0
  if static.num_local:
    is_entry = is_entry & (
      ids_BKTW <= (pos_BT // static.block - static.num_local)[:, None, :, None]
    )
  block_BKE = jnp.reshape(jnp.where(is_entry, ids_BKTW, num_blocks), (B, K, T * W))
  t_1 = jnp.reshape(jnp.arange(T, dtype=jnp.int32), (1, 1, T, 1))
  t_BKE = jnp.reshape(jnp.broadcast_to(t_1, ids_BKTW.shape), (B, K, T * W))
  block_BKE, queries_BKE = inverse.sort_by_block(
    block_BKE, t_BKE, num_blocks=num_blocks, num_items=T
  )
  return (queries_BKE, *inverse.runs(block_BKE, num_blocks, static.config.run_queries))


def _backward(static: _Static, residuals, cotangents):
  from pallas_kernels.sparse_attention import triton_kernels

  q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, out_BTNH, lse_BTN = residuals
  dout_BTNH, dlse_BTN = cotangents
  config = static.config
  (B, T, _, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  M = -(-S // static.block)
  sizes = _sizes(static, q_BTNH, k_BSKH)
  delta_BTN = vjp.delta(out_BTNH, dout_BTNH, dlse_BTN, lse_BTN > -jnp.inf)
  dout_BTNH = dout_BTNH.astype(q_BTNH.dtype)
  grads = (dout_BTNH, lse_BTN, delta_BTN)
  queries = max(1, config.kv_rows // sizes["GP"])
  kv = dict(QUERIES=queries, num_warps=config.kv_warps, num_stages=config.kv_stages)
  share = jax.ShapeDtypeStruct(k_BSKH.shape, jnp.float32)
  band_dq, band_dk, band_dv = delta_BTN, delta_BTN, delta_BTN  # not read where there is no band
  if static.num_local:
    band = _band_sizes(static, sizes)
    inputs = (q_BTNH, k_BSKH, v_BSKH, pos_BT, start_BT, *grads)
    band_dq = gpu.launch(
      triton_kernels.band_backward_q,
      *inputs,
      out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32),
      grid=(-(-T // band["QUERIES"]), K, B),
      **sizes,
      **band,
    )
    band_dk, band_dv = gpu.launch(
      triton_kernels.band_backward_kv,
      *inputs,
      out_shape=(share, share),
      grid=(M, K, B),
      NUM_LOCAL=static.num_local,
      **sizes,
      **kv,
    )
  dq_BTNH = gpu.launch(
    triton_kernels.list_backward_q,
    *(q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, *grads, band_dq),
    out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    grid=(T, K, B),
    **sizes,
    **_list_sizes(static, ids_BKTW),
  )
  queries_BKE, first_run, block_BKR, begin_BKR, end_BKR = _invert(static, ids_BKTW, pos_BT, M)
  R = block_BKR.shape[-1]
  run_share = jax.ShapeDtypeStruct((B, K, R, static.block, H), jnp.float32)
  runs = gpu.launch(
    triton_kernels.list_backward_kv,
    *(q_BTNH, k_BSKH, v_BSKH, queries_BKE, block_BKR, begin_BKR, end_BKR, pos_BT, start_BT, *grads),
    out_shape=(run_share, run_share),
    grid=(R, K, B),
    E=queries_BKE.shape[-1],
    R=R,
    **sizes,
    **kv,
  )
  names = ("S", "K", "H", "HP", "BLOCK", "compute_capability")
  dk_BSKH, dv_BSKH = (
    gpu.launch(
      triton_kernels.sum_runs,
      *(x, first_run, band_share),
      out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
      grid=(M, K, B),
      M=M,
      R=R,
      NUM_LOCAL=static.num_local,
      num_warps=8,
      num_stages=2,
      **{name: sizes[name] for name in names},
    )
    for x, band_share, like in zip(runs, (band_dk, band_dv), (k_BSKH, v_BSKH), strict=True)
  )
  return dq_BTNH, dk_BSKH, dv_BSKH, None, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *arrays):
  return _forward(static, *arrays)


def _attend_fwd(static: _Static, *arrays):
  out, lse = _forward(static, *arrays)
  return (out, lse), (*arrays, out, lse)


_attend.defvjp(_attend_fwd, _backward)
