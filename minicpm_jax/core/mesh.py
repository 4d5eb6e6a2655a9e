"""Device mesh, logical axis names and the rules between them (style.md 2.3).

Modules know logical names only ("embed", "act_batch", ...); `RULES` maps them to the six mesh axes
`dp, fsdp, ep, tp, cp, pp`, which always exist. All axes are Auto (environment.md section 2).

Two kinds of use, two policies for a dimension that its mesh axes do not divide:
  parameters  `tree_shardings` refuses and names the tensor, except for `kv_heads`: few heads of
              keys and values (2 in MiniCPM4) are replicated over tp, as every tp rank needs them,
              and so are groups and bytes of quantised kernels (45 groups of 128 in 5760 inputs);
  activations `constrain` is a hint: such a dimension is left whole (batch 1 in decoding).
The global batch is checked once, by `check_batch`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from minicpm_jax import config
from minicpm_jax.core import types

AXES = ("dp", "fsdp", "ep", "tp", "cp", "pp")

# Logical name -> mesh axes. Inside one tensor an axis goes to the first dimension that asks for it.
RULES: dict[str, tuple[str, ...]] = {
  "layers": (),
  "embed": ("fsdp",),
  "heads": ("tp",),
  "kv_heads": ("tp",),
  "head_dim": (),
  "mlp": ("tp",),
  "vocab": ("tp",),
  "expert": ("ep",),
  "lora": ("fsdp",),
  "embed_groups": ("fsdp",),
  "heads_groups": ("tp",),
  "mlp_groups": ("tp",),
  "lora_groups": ("fsdp",),
  "act_batch": ("dp", "fsdp", "ep"),
  "act_seq": ("cp",),
  "act_embed": (),
  "act_heads": ("tp",),
  "act_kv_heads": ("tp",),
  "act_mlp": ("tp",),
  "act_vocab": ("tp",),
  "act_expert": ("ep",),
}
REPLICATED_IF_UNEVEN = ("kv_heads", "embed_groups", "heads_groups", "mlp_groups", "lora_groups")

Names = Sequence[str | None]


class ShardingError(ValueError):
  """A mesh that does not fit the devices, or a tensor that does not fit the mesh."""


def make_mesh(cfg: config.MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `cfg` over `devices` (default: all); the axis of size -1 takes what remains."""
  devices = list(jax.devices() if devices is None else devices)
  sizes = {axis: getattr(cfg, axis) for axis in AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [axis for axis, size in sizes.items() if size == -1]
  if free and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  elif free or fixed != len(devices):
    spelled = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1))
    expected = f"a divisor of {len(devices)}" if free else f"{len(devices)}"
    raise ShardingError(
      f"mesh: found {spelled or 'all sizes 1'} = {fixed} devices, expected {expected}, "
      f"the number of {devices[0].platform} devices (set one axis to -1 to take all)"
    )
  shape = tuple(sizes[axis] for axis in AXES)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(
  names: Names,
  *,
  sizes: dict[str, int],
  shape: Sequence[int] | None = None,
  tensor: str = "",
  is_hint: bool = False,
) -> PartitionSpec:
  """Mesh axes of each dimension; `sizes` are the mesh axis sizes, `shape` is checked if given."""
  if shape is not None and len(shape) != len(names):
    raise ShardingError(f"{tensor}: found shape {tuple(shape)}, expected one dim for each {names}")
  used: set[str] = set()
  dims: list[tuple[str, ...] | str | None] = []
  for i, name in enumerate(names):
    if name is not None and name not in RULES:
      raise ShardingError(f"{tensor}: found logical axis {name!r}, expected one of {list(RULES)}")
    axes = tuple(a for a in RULES.get(name or "", ()) if sizes.get(a, 1) > 1 and a not in used)
    parts = math.prod(sizes[a] for a in axes)
    if shape is not None and shape[i] % parts:
      if not is_hint and name not in REPLICATED_IF_UNEVEN:
        raise ShardingError(
          f"{tensor}: found dimension {i} ({name}) of size {shape[i]}, "
          f"expected a multiple of {parts} (mesh {' x '.join(f'{a} {sizes[a]}' for a in axes)})"
        )
      axes = ()
    used.update(axes)
    dims.append(axes if len(axes) > 1 else axes[0] if axes else None)
  return PartitionSpec(*dims)


def sharding(
  mesh: Mesh, names: Names, shape: Sequence[int] | None = None, tensor: str = ""
) -> NamedSharding:
  """NamedSharding of a tensor with these logical axis names; with `shape`, divisibility too."""
  spec = partition_spec(names, sizes=dict(mesh.shape), shape=shape, tensor=tensor)
  return NamedSharding(mesh, spec)


def tree_shardings(mesh: Mesh, tree: Any, shapes: Any = None) -> Any:
  """Shardings of a parameter tree.

  Leaves of `tree` are linen boxes (`nn.LogicallyPartitioned`, with or without abstract values) or
  logical specs (`PartitionSpec` or tuple of names); specs need `shapes`, a tree of the same
  structure whose leaves have `.shape`, for the divisibility check. Unboxed leaves are replicated.
  """

  def is_leaf(x: Any) -> bool:
    is_names = isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)
    return hasattr(x, "names") or isinstance(x, PartitionSpec) or is_names

  def one(path: Any, leaf: Any, like: Any) -> NamedSharding:
    tensor = jax.tree_util.keystr(path, simple=True, separator="/")
    if hasattr(leaf, "names"):
      return sharding(mesh, leaf.names, leaf.value.shape, tensor)
    if not isinstance(leaf, tuple | PartitionSpec):
      return NamedSharding(mesh, PartitionSpec())
    shape = None if like is None else like.shape
    names = tuple(leaf)
    if shape is not None:
      names += (None,) * (len(shape) - len(names))
    return sharding(mesh, names, shape, tensor)

  if shapes is None:
    return jax.tree_util.tree_map_with_path(lambda p, x: one(p, x, None), tree, is_leaf=is_leaf)
  return jax.tree_util.tree_map_with_path(one, tree, shapes, is_leaf=is_leaf)


def is_sharded() -> bool:
  """True under `with jax.set_mesh(mesh)` of several devices, outside shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and math.prod(mesh.shape.values()) > 1 and not mesh.manual_axes


def constrain(x: Shaped[types.Array, "..."], *names: str | None) -> Shaped[types.Array, "..."]:
  """Hints the sharding of an activation under `with jax.set_mesh(mesh)`; without a mesh, `x`."""
  if not is_sharded():
    return x
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  spec = partition_spec(names, sizes=sizes, shape=x.shape, tensor="act", is_hint=True)
  return jax.lax.with_sharding_constraint(x, spec)


def by_rows(op: Callable[..., Any], rows: tuple[Any, ...], whole: tuple[Any, ...]) -> Any:
  """op(*rows, *whole, implementation=...) of a `pallas_kernels` product, also on a mesh.

  XLA cannot partition a kernel: on a mesh that cuts the batch alone, every device runs it on its
  own rows (dimension 0 of `rows` and of the result) with all of `whole`; on another mesh, or where
  the rows do not divide, the op's XLA form is used, which is partitioned.
  """
  if not is_sharded():
    return op(*rows, *whole, implementation="auto")
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  cut = partition_spec(("act_batch",), sizes=sizes, shape=rows[0].shape[:1], is_hint=True)
  axes = (cut[0],) if isinstance(cut[0], str) else cut[0] or ()
  if math.prod(sizes[a] for a in axes) != math.prod(sizes.values()):
    return op(*rows, *whole, implementation="xla")
  specs = (cut,) * len(rows) + (PartitionSpec(),) * len(whole)
  local = functools.partial(op, implementation="auto")
  return jax.shard_map(local, in_specs=specs, out_specs=cut, check_vma=False)(*rows, *whole)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of [B, T] inputs: rows over (dp, fsdp, ep), tokens over cp."""
  return sharding(mesh, ("act_batch", "act_seq"))


def num_data_shards(mesh: Mesh) -> int:
  """Number of parts that the rows of a batch are cut into."""
  return math.prod(mesh.shape[a] for a in RULES["act_batch"])


def check_batch(mesh: Mesh, *, batch_size: int, seq_len: int, grad_accum: int = 1) -> None:
  """Refuses a global batch that the mesh does not divide (each micro-batch is sharded alike)."""
  rows, parts = batch_size // grad_accum, num_data_shards(mesh)
  if rows % parts:
    raise ShardingError(
      f"data.batch_size: found {batch_size} / grad_accum {grad_accum} = {rows} rows, expected a "
      f"multiple of {parts} (mesh dp x fsdp x ep)"
    )
  if seq_len % mesh.shape["cp"]:
    raise ShardingError(
      f"data.seq_len: found {seq_len}, expected a multiple of {mesh.shape['cp']} (mesh.cp)"
    )


def data_process(mesh: Mesh) -> tuple[int, int]:
  """(index, count): which slice of the global batch's rows this process has to load.

  Processes whose devices hold the same rows (tp or cp across processes) get the same index.
  """
  parts = num_data_shards(mesh)
  rows = batch_sharding(mesh).devices_indices_map((parts, mesh.shape["cp"]))
  held: dict[int, set[int]] = {}
  for device, (row, _) in rows.items():
    held.setdefault(device.process_index, set()).add(row.start or 0)
  groups = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(len(g) for g in groups) != parts or len({len(g) for g in groups}) > 1:
    raise ShardingError(
      f"mesh: found row shards {groups} on the processes, expected equal disjoint groups "
      "(let dp, fsdp and ep be the axes that span processes)"
    )
  return groups.index(tuple(sorted(held[jax.process_index()]))), len(groups)


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Global [B, T] arrays from the rows that this process loaded (`data_process` says which)."""
  _, count = data_process(mesh)
  place = batch_sharding(mesh)

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(place, x, (x.shape[0] * count, *x.shape[1:]))

  return {name: put(x) for name, x in batch.items()}


def initialize_distributed(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """`jax.distributed.initialize`; call before any other use of jax.

  With no arguments jax detects Slurm, Open MPI, GKE and TPU pods by itself. One process with
  `num_processes=1, process_id=0` and a local coordinator enables preemption handling.
  """
  if coordinator is None and (num_processes is not None or process_id is not None):
    raise ValueError("coordinator: found None, expected HOST:PORT with num_processes, process_id")
  if coordinator is not None and (num_processes is None) != (process_id is None):
    raise ValueError(
      f"num_processes, process_id: found {num_processes}, {process_id}, expected both or neither"
    )
  jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)


def is_main_process() -> bool:
  """True on the process that writes files and logs."""
  return jax.process_index() == 0
