"""Attention over selected blocks on Hopper GPUs through Pallas Mosaic GPU: the forward pass.

Tiles of 64 rows go over the union of their queries' lists, the band of local blocks included (its
blocks are common to the tile, so they fill it). Residuals: q, k, v, out, lists [B, K, T, W] int32,
lse [B, T, N] float32, the same as Triton's, whose backward pass is used where it serves the device
(else the XLA one). Both passes are bitwise deterministic. Memory of the forward beyond its
residuals: a copy of q and out in tiles, 8 bytes an entry of the unions (at most 4 * Q * W a tile),
and a copy of k and v where S is no multiple of the block. Compiled for sm_90a and checked in the
interpreter; it has not run on a device.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common import mgpu, tune
from pallas_kernels.sparse_attention import tiles, triton, vjp
from pallas_kernels.sparse_topk import rule as rules

MAX_QUERIES = 31  # of a tile: a bit each


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
  """`num_stages` blocks of keys and of values are in flight; `backward` names the other pass."""

  num_stages: int = 2
  backward: Literal["auto", "triton", "xla"] = "auto"
  interpret: bool | None = None  # None = on a CPU

  def __post_init__(self):
    if not 1 <= self.num_stages <= 8:
      raise ValueError(f"MosaicGpuConfig.num_stages: found {self.num_stages}, expected 1 to 8")
    if self.backward not in ("auto", "triton", "xla"):
      raise ValueError(
        f"MosaicGpuConfig.backward: found {self.backward!r}, expected 'auto', 'triton' or 'xla'"
      )


@dataclasses.dataclass(frozen=True)
class _Static:
  block: int
  num_local: int
  num_stages: int
  backward: str
  interpreted: bool


def default_config(group: int, head_dim: int, dtype) -> MosaicGpuConfig:
  """As tuned for the device, else two stages: two programs then fit a multiprocessor."""
  name = tune.key(group, head_dim, dtype, "mosaic_gpu")
  return tune.lookup("sparse_attention", MosaicGpuConfig, name) or MosaicGpuConfig()


def check_shapes(op: str, q_BTNH, k, v, block: int) -> None:
  """NotImplementedError for head widths, groups and blocks that the kernel does not serve."""
  H, V, group = q_BTNH.shape[-1], v.shape[-1], q_BTNH.shape[2] // k.shape[2]
  if H != V or H % 16 or H > 128:
    raise NotImplementedError(
      f"{op}: head widths {H} and {V}, mosaic_gpu serves equal ones, multiples of 16 up to 128"
    )
  if group > mgpu.ROWS:
    raise NotImplementedError(f"{op}: {group} heads a group, mosaic_gpu serves up to {mgpu.ROWS}")
  if block % 16 or block > 128:
    raise NotImplementedError(
      f"{op}: block_size = {block}, mosaic_gpu serves multiples of 16 up to 128"
    )


def pad_rows(x_XR):
  """[X, 64, ...]: rows of zeros behind a tile's own."""
  return jnp.pad(x_XR, ((0, 0), (0, mgpu.ROWS - x_XR.shape[1])) + ((0, 0),) * (x_XR.ndim - 2))


def attend_mosaic_gpu(
  q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, *, block_size, num_local=0, config=None
):
  """As `vjp.attend_xla`, or NotImplementedError with the reason."""
  from pallas_kernels.sparse_attention import mgpu_kernels

  op, H = "sparse_attention", q_BTNH.shape[-1]
  config = config or default_config(q_BTNH.shape[2] // k_BSKH.shape[2], H, q_BTNH.dtype)
  interpreted = mgpu.is_interpreted(op, config.interpret)
  mgpu.check_arrays(op, interpreted, q=q_BTNH, k=k_BSKH, v=v_BSKH)
  check_shapes(op, q_BTNH, k_BSKH, v_BSKH, block_size)
  size = q_BTNH.dtype.itemsize
  num_bytes = mgpu_kernels.shared_bytes(block_size, H, config.num_stages, size, size)
  mgpu.check_shared_memory(op, num_bytes, f"{config.num_stages} stages of {block_size} x {H}")
  backward = _backward_name(config.backward, q_BTNH, k_BSKH, v_BSKH, block_size)
  static = _Static(block_size, num_local, config.num_stages, backward, interpreted)
  pos_BT = jnp.broadcast_to(pos_BT, start_BT.shape)
  return _attend(static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT)


def _backward_name(requested: str, *args) -> str:
  """`auto`: Triton's where it serves the call on the device in use."""
  if requested != "auto":
    return requested
  try:
    triton.checked_config(*args)
  except NotImplementedError:
    return "xla"
  return "triton"


def _forward(static: _Static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT):
  from pallas_kernels.sparse_attention import mgpu_kernels

  (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  group, M = N // K, -(-S // static.block)
  queries = max(1, min(MAX_QUERIES, mgpu.ROWS // group, T))
  ids_XU, bits_XU, counts_X = tiles.union_in_runs(tiles.list_tiles(ids_BKTW, queries), M)
  X = ids_XU.shape[0]
  first_X = jnp.arange(X, dtype=jnp.int32) // (X // B) * M

  def of_rows(x_BT, value):  # [X / K, 64]
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % queries)), constant_values=value)
    x_YR = jnp.reshape(jnp.repeat(x_BT, group, axis=1), (X // K, queries * group))
    return pad_rows(x_YR)

  out_XCRH, lse_XCR = mgpu_kernels.forward(
    (ids_XU, bits_XU, counts_X, first_X),
    None,
    pad_rows(tiles.to_tiles(q_BTNH, queries, K)),
    tiles.blocks(k_BSKH, static.block),
    tiles.blocks(v_BSKH, static.block),
    of_rows(pos_BT, -1),
    of_rows(start_BT, rules.NOWHERE),
    group=group,
    scale=H**-0.5,
    splits=1,
    num_stages=static.num_stages,
    out_dtype=v_BSKH.dtype,
    interpreted=static.interpreted,
  )
  out, lse = (x[:, 0, : queries * group] for x in (out_XCRH, lse_XCR))
  return tuple(tiles.from_tiles(x, B, T, queries, K) for x in (out, lse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *arrays):
  return _forward(static, *arrays)


def _attend_fwd(static: _Static, *arrays):
  out, lse = _forward(static, *arrays)
  return (out, lse), (*arrays, out, lse)


def _attend_bwd(static: _Static, residuals, cotangents):
  sizes = dict(block_size=static.block, num_local=static.num_local)
  backward = triton.backward if static.backward == "triton" else vjp.backward_xla
  return (*backward(residuals, cotangents, **sizes), None, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
