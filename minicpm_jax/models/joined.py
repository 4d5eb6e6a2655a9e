"""The form of projections that decodes fastest: q|k|v and gate|up joined; on a CPU outputs first.

One matrix-vector product of three widths takes less time than three: each product has its own start
and end on all cores. For one row on a CPU floats lie with their outputs first (`nn.output_major`).
The function is unchanged. Only the forward pass knows the form: `ckpt`, `deploy.quantize` and
`models.convert` undo it by themselves; `quant` refuses it by name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import types
from minicpm_jax.nn import output_major
from minicpm_jax.quant import qat, qtensor, tree

# block: (joined name, outputs of each part of `tree.JOINED`, axis of the outputs from the end)
_Rule = tuple[str, Callable[[ModelConfig], tuple[int, ...]], int]
_RULES: dict[str, _Rule] = {
  "attn": ("qkv", lambda c: (c.num_heads, c.num_kv_heads, c.num_kv_heads), -2),
  "mlp": ("gate_up", lambda c: (c.mlp_dim, c.mlp_dim), -1),
}

_NUM_IN = {"qkv": 1, "o": 2, "gate_up": 1, "down": 1}


def join_projections(cfg: ModelConfig, params: types.Params) -> types.Params:
  """The same model with `attn/qkv` and `mlp/gate_up` where its parts can be joined.

  Floats that the forward quantises, apart or joined, stay apart (latent weights, FP8: the rule goes
  by path), and so do quantised kernels of different form. Experts and MLA have other projections.
  """

  def join(path: str, block: types.Params, rule: _Rule) -> types.Params:
    name, _, axis = rule
    parts = tree.JOINED[f"{path.rpartition('/')[2]}/{name}"]
    if not all(part in block for part in parts):
      return block
    kernels = [block[part]["kernel"] for part in parts]
    if not _is_alike(kernels):
      return block
    if any(_is_rounded(cfg, f"{path}/{part}", kernels[0]) for part in (*parts, name)):
      return block
    if cfg.quant is not None and cfg.quant.act_bits is not None:
      if len({cfg.quant.selects(f"{path}/{part}/kernel") for part in parts}) > 1:
        return block  # inputs that some round and others do not
    rest = {n: leaf for n, leaf in block.items() if n not in parts}
    joined = lambda *xs: jnp.concatenate(xs, axis=axis)  # noqa: E731
    return {**rest, name: {"kernel": _changed(joined, axis, *kernels)}}

  return _map_blocks(join, params)


def split_projections(cfg: ModelConfig, params: types.Params) -> types.Params:
  """Inverse of `join_projections` and `store_by_output`; other parameters stay as they are."""
  is_stored = lambda x: isinstance(x, output_major.OutputMajor)  # noqa: E731
  restored = lambda x: output_major.restore(x) if is_stored(x) else x  # noqa: E731
  params = jax.tree.map(restored, params, is_leaf=is_stored)
  params = tree.map_qtensors(lambda qt: qtensor.unpack(qt) if qt.is_by_output else qt, params)

  def split(path: str, block: types.Params, rule: _Rule) -> types.Params:
    name, sizes, axis = rule
    parts = tree.JOINED[f"{path.rpartition('/')[2]}/{name}"]
    if name not in block:
      return block
    rest = {n: leaf for n, leaf in block.items() if n != name}
    start, kernel = 0, block[name]["kernel"]
    for part, size in zip(parts, sizes(cfg), strict=True):
      cut = lambda x, a=start, b=start + size: jax.lax.slice_in_dim(x, a, b, axis=axis)  # noqa: E731
      rest[part] = {"kernel": _changed(cut, axis, kernel)}
      start += size
    return rest

  return _map_blocks(split, params)


def store_by_output(cfg: ModelConfig, params: types.Params) -> types.Params:
  """Float projections of unrolled layers with their outputs first, beside joined ones.

  QTensors stay, and so do floats that the forward quantises, and blocks with nothing joined.
  """
  if cfg.scan_layers:
    raise ValueError("scan_layers: found stacked layers, expected one subtree a layer")

  def stored(path: str, leaf: Any) -> Any:
    kernel = leaf.get("kernel")
    if not isinstance(kernel, jax.Array) or _is_rounded(cfg, path, kernel):
      return leaf
    return {**leaf, "kernel": output_major.store(kernel, _NUM_IN[path.rsplit("/", 1)[1]])}

  def one(path: str, block: types.Params, rule: _Rule) -> types.Params:
    if rule[0] not in block:  # `quant` knows this form by the joined name
      return block
    return {n: stored(f"{path}/{n}", x) if n in _NUM_IN else x for n, x in block.items()}

  return _map_blocks(one, params)


def _is_rounded(cfg: ModelConfig, path: str, kernel: Any) -> bool:
  """Whether the forward itself quantises the float kernel under this path."""
  is_stored = qtensor.is_qtensor(kernel)
  return not is_stored and qat.is_active(cfg.quant) and cfg.quant.selects(f"{path}/kernel")


def _map_blocks(
  change: Callable[[str, types.Params, _Rule], types.Params], params: types.Params
) -> types.Params:
  """`change` of attention and MLP of every layer, stacked or one subtree a layer."""

  def layer(path: str, x: types.Params) -> types.Params:
    changed = {n: change(f"{path}/{n}", x[n], rule) for n, rule in _RULES.items() if n in x}
    return {**x, **changed}

  return {n: layer(n, x) if n.startswith("layers") else x for n, x in params.items()}


def _is_alike(kernels: list[Any]) -> bool:
  """Whether arrays of these kernels can be laid side by side along their outputs."""
  if not any(map(qtensor.is_qtensor, kernels)):
    return len({jnp.dtype(k.dtype) for k in kernels}) == 1
  if not all(map(qtensor.is_qtensor, kernels)):
    return False
  if not all(_is_equal([getattr(k, name) for k in kernels]) for name in ("g_idx", "order")):
    return False
  forms = {
    (k.scheme, k.group_size, k.is_packed, k.zero is None, k.num_groups, jnp.dtype(k.scale.dtype))
    for k in kernels
  }
  return len(forms) == 1


def _is_equal(arrays: list[Any]) -> bool:
  """Whether all of these are None, or equal arrays: kernels of one input often share act order."""
  if any(x is None for x in arrays):
    return all(x is None for x in arrays)
  if any(isinstance(x, jax.core.Tracer) for x in arrays):
    return False
  return all(np.array_equal(arrays[0], x) for x in arrays[1:])


def _changed(change: Callable[..., Any], axis: int, *kernels: Any) -> Any:
  """change(arrays) of floats, or of every array of QTensors with its shape put right."""
  if not qtensor.is_qtensor(kernels[0]):
    return change(*map(jnp.asarray, kernels))
  first = kernels[0]
  arrays = {
    name: change(*(jnp.asarray(getattr(k, name)) for k in kernels))
    for name in ("codes", "scale", "zero")
    if getattr(first, name) is not None
  }
  shape = list(first.shape)
  shape[axis] = arrays["scale"].shape[axis]
  return first.replace(**arrays, shape=tuple(shape))
