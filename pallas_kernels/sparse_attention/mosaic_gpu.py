"""Attention over selected blocks on Hopper GPUs through Pallas Mosaic GPU.

Tiles of up to four times 64 rows go over the union of their queries' lists, the band of local
blocks included (its blocks are common to the tile, so they fill it). Residuals: q, k, v, out, lists
[B, K, T, W] int32, lse [B, T, N] float32, the same as Triton's: `MosaicGpuConfig.backward` says
whose backward pass runs on them. All are bitwise deterministic. The unions come from a Triton
kernel where jax-triton is installed, else from XLA's sorts. Memory of the forward beyond its
residuals: 8 bytes an entry of the unions, a copy of q and out in tiles where the group is no
multiple of 8, and one of k and v where S is no multiple of the block; of the backward:
`mosaic_gpu_backward`.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.common import gpu, mgpu, spec, tune
from pallas_kernels.sparse_attention import mosaic_gpu_backward, tiles, triton, vjp
from pallas_kernels.sparse_topk import rule as rules

# Names for remat policies: what takes a sort to make again, and what takes the forward pass.
LISTS, OUT = "sparse_attention_lists", "sparse_attention_out"
BACKWARDS = ("auto", "mosaic_gpu", "triton", "xla")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicGpuConfig:
  """Tiles in flight and the backward pass.

  `*_stages` blocks of keys and of values (dk and dv: of 64 rows of q and of dout) are in flight.
  `backward` "auto": Mosaic's where its tiles fit, else Triton's where it serves the device, else
  the XLA one.
  """

  warpgroups: int = 3  # of a tile of the forward and of dq: they share its blocks
  num_stages: int | None = None  # None = as many as fit, at most 5
  q_stages: int | None = None  # of dq; None = as many as fit, at most 3
  kv_stages: int = 2  # of dk and dv
  unit_rows: int = 32  # rows (queries times group) that dk and dv take or leave together: 32 or 64
  run_units: int = 4096  # of one program of dk and dv
  backward: Literal["auto", "mosaic_gpu", "triton", "xla"] = "auto"
  interpret: bool | None = None  # None = on a CPU

  def __post_init__(self):
    for name in ("num_stages", "q_stages", "kv_stages"):
      found = getattr(self, name)
      if found is not None and not 2 <= found <= 8:
        raise ValueError(f"MosaicGpuConfig.{name}: found {found}, expected 2 to 8")
    if not 1 <= self.warpgroups <= 4:
      found = self.warpgroups
      raise ValueError(f"MosaicGpuConfig.warpgroups: found {found}, expected 1 to 4")
    if self.unit_rows not in (32, 64):
      raise ValueError(f"MosaicGpuConfig.unit_rows: found {self.unit_rows}, expected 32 or 64")
    if self.run_units < 1:
      raise ValueError(f"MosaicGpuConfig.run_units: found {self.run_units}, expected 1 or more")
    if self.backward not in BACKWARDS:
      raise ValueError(
        f"MosaicGpuConfig.backward: found {self.backward!r}, expected one of {BACKWARDS}"
      )


@dataclasses.dataclass(frozen=True)
class _Static:
  block: int
  num_local: int
  config: MosaicGpuConfig
  backward: str
  interpreted: bool


def default_config(group: int, head_dim: int, dtype) -> MosaicGpuConfig:
  """As tuned for the device, else what was fastest on an H200."""
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
  step = math.gcd(H, 64)  # columns of a block in shared memory that are swizzled together
  if block % step or block > 128:
    raise NotImplementedError(
      f"{op}: block_size = {block}, mosaic_gpu serves multiples of {step} up to 128 at head width "
      f"{H}"
    )


def attend_mosaic_gpu(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  ids_BKTW,
  pos_BT,
  start_BT,
  *,
  block_size,
  num_local=0,
  config=None,
  interpret=None,
):
  """As `vjp.attend_xla`, or NotImplementedError with the reason."""
  from pallas_kernels.sparse_attention import mgpu_kernels

  op, H = "sparse_attention", q_BTNH.shape[-1]
  config = config or default_config(q_BTNH.shape[2] // k_BSKH.shape[2], H, q_BTNH.dtype)
  config = spec.requested(config, interpret)
  interpreted = mgpu.is_interpreted(op, config.interpret)
  mgpu.check_arrays(op, interpreted, q=q_BTNH, k=k_BSKH, v=v_BSKH)
  check_shapes(op, q_BTNH, k_BSKH, v_BSKH, block_size)
  config = _with_tiles(config, q_BTNH, k_BSKH, block_size)
  num_bytes = mgpu_kernels.shared_bytes(
    block_size, H, config.num_stages, q_BTNH.dtype.itemsize, config.warpgroups
  )
  mgpu.check_shared_memory(op, num_bytes, f"{config.num_stages} stages of {block_size} x {H}")
  backward = _backward_name(op, config, q_BTNH, k_BSKH, v_BSKH, block_size)
  static = _Static(block_size, num_local, config, backward, interpreted)
  pos_BT = jnp.broadcast_to(pos_BT, start_BT.shape)
  return _attend(static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT)


def _with_tiles(config: MosaicGpuConfig, q_BTNH, k_BSKH, block: int) -> MosaicGpuConfig:
  """As many warpgroups as have queries, and stages in place of None."""
  from pallas_kernels.sparse_attention import mgpu_backward_kernels, mgpu_kernels

  (_, T, N, H), size = q_BTNH.shape, q_BTNH.dtype.itemsize
  _, warpgroups = tiles.sizes(T, N // k_BSKH.shape[2], mgpu.ROWS, config.warpgroups)

  def stages(given, most, shared_bytes):
    if given is not None:
      return given
    return mgpu.stages_that_fit(most, lambda n: shared_bytes(block, H, n, size, warpgroups))

  return dataclasses.replace(
    config,
    warpgroups=warpgroups,
    num_stages=stages(config.num_stages, 5, mgpu_kernels.shared_bytes),
    q_stages=stages(config.q_stages, 3, mgpu_backward_kernels.shared_bytes_q),
  )


def _backward_name(op: str, config: MosaicGpuConfig, q_BTNH, k_BSKH, v_BSKH, block: int) -> str:
  """Of the pass to run; a named one that does not fit raises."""
  if config.backward in ("auto", "mosaic_gpu"):
    try:
      H, size = q_BTNH.shape[-1], q_BTNH.dtype.itemsize
      mosaic_gpu_backward.check_fits(op, block, H, size, config)
      return "mosaic_gpu"
    except NotImplementedError:
      if config.backward != "auto":
        raise
  if config.backward == "auto":
    try:
      triton.checked_config(q_BTNH, k_BSKH, v_BSKH, block)
      return "triton"
    except NotImplementedError:
      return "xla"
  return config.backward


def _listed(static: _Static, q_BTNH, k_BSKH, ids_BKTW):
  """The unions of `tiles.listed` of the forward's tiles, which are those of dq."""
  (_, T, N, _), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  queries, warpgroups = tiles.sizes(T, N // K, mgpu.ROWS, static.config.warpgroups)
  has_triton = not static.interpreted and gpu.has_triton()
  return tiles.listed(ids_BKTW, queries * warpgroups, -(-S // static.block), has_triton)


def _forward(static: _Static, q_BTNH, k_BSKH, v_BSKH, ids_BKTW, pos_BT, start_BT, listed=None):
  from pallas_kernels.sparse_attention import mgpu_kernels

  (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
  group = N // K
  queries, warpgroups = tiles.sizes(T, group, mgpu.ROWS, static.config.warpgroups)
  is_in_place = group % 8 == 0  # rows of a query that shared memory can hold apart
  if is_in_place:
    q = jnp.reshape(q_BTNH, (B, T, K, group, H))
  else:
    q = tiles.to_tiles(q_BTNH, queries * warpgroups, K)
    q = tiles.in_warpgroups(q, warpgroups, mgpu.ROWS)
  out, lse_X1CR = mgpu_kernels.forward(
    listed or _listed(static, q_BTNH, k_BSKH, ids_BKTW),
    None,
    q,
    tiles.blocks(k_BSKH, static.block),
    tiles.blocks(v_BSKH, static.block),
    tiles.of_queries(pos_BT, queries, warpgroups, -1),
    tiles.of_queries(start_BT, queries, warpgroups, rules.NOWHERE),
    group=group,
    scale=H**-0.5,
    splits=1,
    num_stages=static.config.num_stages,
    out_dtype=v_BSKH.dtype,
    interpreted=static.interpreted,
  )

  def from_warpgroups(x_X1CR):
    return tiles.from_warpgroups(x_X1CR[:, 0], B, T, queries, group, K)

  out_BTNH = jnp.reshape(out, q_BTNH.shape) if is_in_place else from_warpgroups(out)
  return out_BTNH, from_warpgroups(lse_X1CR)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *arrays):
  return _forward(static, *arrays)


def _attend_fwd(static: _Static, *arrays):
  listed = _listed(static, *arrays[:2], arrays[3])
  listed = tuple(checkpoint_name(x, LISTS) for x in listed)
  out, lse = (checkpoint_name(x, OUT) for x in _forward(static, *arrays, listed))
  return (out, lse), ((*arrays, out, lse), listed)


def _attend_bwd(static: _Static, saved, cotangents):
  residuals, listed = saved
  if static.backward == "mosaic_gpu":
    own = dict(config=static.config, interpreted=static.interpreted, listed=listed)
    grads = mosaic_gpu_backward.backward(residuals, cotangents, block_size=static.block, **own)
  else:
    other = triton.backward if static.backward == "triton" else vjp.backward_xla
    sizes = dict(block_size=static.block, num_local=static.num_local)
    grads = other(residuals, cotangents, **sizes)
  return (*grads, None, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
