"""QTensors in checkpoints of Orbax: in the form of the config, with all of their arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from minicpm_jax import config
from minicpm_jax.ckpt import errors
from minicpm_jax.core import trees, types
from minicpm_jax.quant import leaf as leaf_lib
from minicpm_jax.quant import qtensor, schemes


def in_form(cfg: config.ModelConfig, params: types.Params) -> types.Params:
  """`params` with codes packed or not, and scales of the type, as `cfg.quant` says.

  CheckpointError for QTensors that the config does not know or knows as others (a run folder holds
  arrays alone, and the code book is the config's), and for scales that its type rounds.
  """

  def one(path: str, x: Any) -> Any:
    return _in_form(cfg.quant, path, x) if qtensor.is_qtensor(x) else x

  return trees.map_with_path(one, params, is_leaf=qtensor.is_qtensor)


def _in_form(quant: config.QuantConfig | None, path: str, qt: qtensor.QTensor) -> qtensor.QTensor:
  if quant is None or not leaf_lib.is_stored(quant, path):
    raise errors.CheckpointError(
      f"params: {path}: found a QTensor ({qt.scheme}), expected floats by model.quant: {quant} "
      "(codes are of weights 'codes' or 'packed' there)"
    )
  size = leaf_lib.group_size_of(quant, path, qt.in_size)
  num_groups = schemes.group_count(qt.in_size, size)
  if (qt.scheme, qt.num_groups) != (quant.scheme, num_groups):
    raise errors.CheckpointError(
      f"params: {path}: found {qt.scheme!r} codes in {qt.num_groups} groups, expected "
      f"{quant.scheme!r} in {num_groups} by model.quant"
    )
  scale = qt.scale.astype(types.dtype_of(quant.scale_dtype))
  if not jnp.array_equal(scale.astype(qt.scale.dtype), qt.scale):
    raise errors.CheckpointError(
      f"params: {path}/scale: found {qt.scale.dtype} scales that model.quant.scale_dtype "
      f"{quant.scale_dtype!r} rounds, expected a type that holds them"
    )
  qt = qtensor.unpack(qt).replace(scale=scale)
  return qtensor.pack(qt) if quant.weights == "packed" else qt


def as_stored(target: types.Params, stored: Mapping[str, Any]) -> types.Params:
  """`target`, a tree of shape structs, with the arrays of QTensors that no config foresees.

  These are zero points and act order; `stored` has the paths of all arrays of the checkpoint.
  """

  def one(path: str, x: Any) -> Any:
    return _as_stored(path, x, stored) if qtensor.is_qtensor(x) else x

  return trees.map_with_path(one, target, is_leaf=qtensor.is_qtensor)


def _as_stored(path: str, qt: qtensor.QTensor, stored: Mapping[str, Any]) -> qtensor.QTensor:
  place = qt.scale.sharding
  whole = place  # on every device: not cut, as in `leaf.names`
  if isinstance(place, jax.sharding.NamedSharding):
    whole = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
  shapes = {
    "zero": jax.ShapeDtypeStruct(qt.scale.shape, jnp.int8, sharding=place),
    "g_idx": jax.ShapeDtypeStruct((*qt.lead, qt.in_size), jnp.int32, sharding=whole),
  }
  found = {n: s for n, s in shapes.items() if f"{path}/{n}" in stored and getattr(qt, n) is None}
  return qt.replace(**found)
