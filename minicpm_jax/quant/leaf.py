"""Kernels stored as QTensors: which, of what group size, how they start and are sharded.

A QTensor leaf is used as it is, whatever the config says.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from minicpm_jax.config import QuantConfig
from minicpm_jax.core import types
from minicpm_jax.quant import qtensor, schemes

_ROW_PARALLEL = re.compile(r"(^|/)(o|down)/kernel$")  # inputs are cut over tp


def group_size_of(cfg: QuantConfig, path: str, num_in: int) -> int:
  """Group size of the kernel at `path` with `num_in` input channels; names the path it refuses."""
  if cfg.scale_shards > 1 and _ROW_PARALLEL.search(path):
    if num_in % cfg.scale_shards:
      raise ValueError(
        f"{path}: quant.scale_shards: found {cfg.scale_shards}, expected a divisor of {num_in}"
      )
    return num_in // cfg.scale_shards
  schemes.group_count(num_in, cfg.group_size, path)
  return cfg.group_size


def is_stored(cfg: QuantConfig | None, path: str) -> bool:
  """True where the parameter itself is to be a QTensor."""
  return cfg is not None and cfg.weights != "latent" and cfg.selects(path)


def quantize_kernel(
  cfg: QuantConfig,
  path: str,
  w: Float[Array, "..."],
  *,
  num_in: int,
  num_lead: int = 0,
  is_table: bool = False,
) -> qtensor.QTensor:
  """The QTensor of a float kernel by the scheme's own rule, packed if the config says so."""
  width = w.shape[-1] if is_table else math.prod(w.shape[num_lead : num_lead + num_in])
  qt = qtensor.quantize(
    w,
    cfg.scheme,
    group_size_of(cfg, path, width),
    num_in=num_in,
    num_lead=num_lead,
    scale_dtype=types.dtype_of(cfg.scale_dtype),
    is_table=is_table,
    name=path,
  )
  return qtensor.pack(qt) if cfg.weights == "packed" else qt


def names(
  qt: qtensor.QTensor, kernel_names: tuple[str | None, ...], num_lead: int = 0
) -> qtensor.QTensor:
  """Logical axis names of every array of `qt`, in its own structure; `kernel_names` are those of
  the floats (of a table [V, D], which is turned here).

  Unpacked codes are cut like the kernel. Groups of scales and packed bytes, which lie along the
  inputs, are cut like the first input axis where their number divides ("mlp_groups"); outputs are
  cut like the kernel's.
  """
  kernel_names = kernel_names[::-1] if qt.is_table else kernel_names
  lead, out = kernel_names[:num_lead], kernel_names[num_lead + qt.num_in :]
  name = kernel_names[num_lead]
  first = None if name is None else f"{name}_groups"
  grouped = (*lead, first if qt.num_groups > 1 else None, *out)
  return qt.replace(
    codes=(*lead, first, *out) if qt.is_packed else kernel_names,
    scale=grouped,
    zero=None if qt.zero is None else grouped,
    g_idx=None if qt.g_idx is None else (*lead, None),
    order=None if qt.order is None else (*lead, None),
  )


def stored_init(
  cfg: QuantConfig,
  path: str,
  init: Callable[..., Array],
  box: Callable[[Any, tuple[str | None, ...]], Any],
  axes: tuple[str | None, ...],
  *,
  num_in: int,
  num_lead: int = 0,
  is_table: bool = False,
) -> Callable[..., qtensor.QTensor]:
  """Initialiser of a QTensor leaf: `init` quantised, every array boxed with its axis names."""

  def quantized(key: Any, shape: tuple[int, ...], dtype: Any) -> qtensor.QTensor:
    layout = dict(num_in=num_in, num_lead=num_lead, is_table=is_table)
    qt = quantize_kernel(cfg, path, init(key, shape, dtype), **layout)
    labels = names(qt, axes, num_lead)
    fields = ("codes", "scale", "zero", "g_idx")
    return qt.replace(
      **{f: box(getattr(qt, f), getattr(labels, f)) for f in fields if getattr(qt, f) is not None}
    )

  return quantized


def check_leaf(qt: qtensor.QTensor, path: str, shape: tuple[int, ...]) -> None:
  """Refuses a QTensor of another kernel's shape."""
  if tuple(shape) not in (qt.full_shape, qt.full_shape[len(qt.lead) :]):
    raise ValueError(f"{path}: found a QTensor of shape {qt.full_shape}, expected {shape}")
