"""Quantisation of whole parameter trees by path (quantization.md 0)."""

import math
from collections.abc import Callable
from typing import Any

from minicpm_jax.config import DTypeName, QuantConfig
from minicpm_jax.config.quant import EMBEDDING, HEAD, SchemeName
from minicpm_jax.core import trees, types
from minicpm_jax.quant import leaf as leaf_lib
from minicpm_jax.quant import qtensor

# block/name of kernels that hold several projections, for decoding (models/joined.py) -> the parts
JOINED = {"attn/qkv": ("q", "k", "v"), "mlp/gate_up": ("gate", "up")}


def is_table(path: str) -> bool:
  """Whether the parameter at `path` is the table of embeddings [V, D], whose inputs are D."""
  return path == "embed/embedding"


def layout(path: str) -> tuple[int, int]:
  """(num_in, num_lead) of the kernel at a parameter path.

  Output projections [N, H, D] contract two axes; stacked layers and experts lead.
  """
  parts = path.split("/")
  num_lead = int(parts[0] == "layers") + int("moe" in parts and "router" not in parts)
  return (2 if parts[-2:] == ["o", "kernel"] else 1), num_lead


def selected(cfg: QuantConfig, params: types.Params) -> dict[str, Any]:
  """Path -> kernel (array, shape struct or QTensor) of everything that `cfg` quantises.

  A config that finds nothing is refused, and joined kernels where it selects one of their parts:
  left out, they would stay floats without a word.
  """
  leaves = trees.flatten_paths(params, qtensor.is_qtensor)
  found = {path: w for path, w in leaves.items() if cfg.selects(path)}
  for path in leaves:
    kernel = path.removesuffix("/values")
    if kernel != path and any(map(cfg.selects, (kernel, *_parts(kernel)))):
      raise _output_major_error(path)
    if path not in found and any(map(cfg.selects, _parts(path))):
      raise _joined_error(path)
  if not found:
    raise ValueError(
      f"quant.include: {cfg.include} without {cfg.exclude} matches no parameter; paths are "
      f"{list(leaves)}"
    )
  return found


def check_floats(params: types.Params, where: str = "") -> None:
  """Refuses what rewriting kernels by name would miss: forms of decoding, and QTensors; `where`
  opens the message."""
  for path, w in trees.flatten_paths(params, qtensor.is_qtensor).items():
    if path.endswith("/kernel/values"):
      raise _output_major_error(path)
    if _parts(path):
      raise _joined_error(path)
    if qtensor.is_qtensor(w):
      raise ValueError(f"{where}{path}: found a QTensor ({w.scheme}), expected floats")


def selects(cfg: QuantConfig, path: str) -> bool:
  """`cfg.selects`, of joined projections whether it selects any of their parts."""
  return any(map(cfg.selects, _parts(path) or (path,)))


def _parts(path: str) -> list[str]:
  """Paths of the projections that the kernel at `path` holds, [] for a kernel of one."""
  for name, parts in JOINED.items():
    if f"/{path}".endswith(f"/{name}/kernel"):
      block = path.removesuffix(f"{name.split('/')[1]}/kernel")
      return [f"{block}{part}/kernel" for part in parts]
  return []


def _output_major_error(path: str) -> ValueError:
  return ValueError(
    f"{path}: found a kernel in the form of decoding (nn/output_major.py), expected one as it is "
    "trained: models.joined.split_projections"
  )


def _joined_error(path: str) -> ValueError:
  return ValueError(
    f"{path}: found joined projections (the form for decoding), expected {', '.join(_parts(path))} "
    "apart: models.joined.split_projections"
  )


def map_kernels(fn: Callable[..., Any], cfg: QuantConfig, params: types.Params) -> types.Params:
  """`fn(path, leaf, num_in=, num_lead=)` on every selected leaf, others as they are."""
  names = selected(cfg, params)

  def one(path: str, leaf: Any) -> Any:
    if path not in names:
      return leaf
    num_in, num_lead = layout(path)
    return fn(path, leaf, num_in=num_in, num_lead=num_lead)

  return trees.map_with_path(one, params, is_leaf=qtensor.is_qtensor)


def quantize_params(cfg: QuantConfig, params: types.Params) -> types.Params:
  """Every selected float kernel as a QTensor by the scheme's own rule (round to nearest)."""

  def one(path: str, w: Any, *, num_in: int, num_lead: int) -> qtensor.QTensor:
    if qtensor.is_qtensor(w):
      raise ValueError(f"{path}: found a QTensor, expected floats to quantise")
    layout = dict(num_in=num_in, num_lead=num_lead, is_table=is_table(path))
    return leaf_lib.quantize_kernel(cfg, path, w, **layout)

  return map_kernels(one, cfg, params)


def quantize_head(
  params: types.Params,
  scheme: SchemeName = "int8",
  group_size: int = -1,
  *,
  scale_dtype: DTypeName = "f32",
) -> types.Params:
  """The output head alone as packed codes, whatever the projections are: `lm_head/kernel`, or of a
  tied model `embed/embedding`, whose rows are then read from the same codes."""
  is_untied = any("lm_head/kernel" in path for path in trees.flatten_paths(params))
  cfg = QuantConfig(
    scheme=scheme,
    group_size=group_size,
    weights="packed",
    scale_dtype=scale_dtype,
    include=(HEAD if is_untied else EMBEDDING,),
  )
  return quantize_params(cfg, params)


def map_qtensors(fn: Callable[[qtensor.QTensor], Any], params: types.Params) -> types.Params:
  """`fn(qt)` on every QTensor, e.g. `qtensor.pack`."""
  return trees.map_with_path(
    lambda _, x: fn(x) if qtensor.is_qtensor(x) else x, params, is_leaf=qtensor.is_qtensor
  )


def dequantize_params(params: types.Params, dtype: Any = None) -> types.Params:
  """Every QTensor as floats (default: the dtype of its scales)."""
  return map_qtensors(
    lambda qt: qtensor.dequantize(qt, qt.scale.dtype if dtype is None else dtype), params
  )


def num_weights(cfg: QuantConfig, params: types.Params) -> int:
  """Number of weights that `cfg` quantises."""
  sizes = (
    leaf.lead + leaf.shape if qtensor.is_qtensor(leaf) else leaf.shape
    for leaf in selected(cfg, params).values()
  )
  return sum(math.prod(shape) for shape in sizes)
