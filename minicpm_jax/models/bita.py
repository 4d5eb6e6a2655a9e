"""BiTA: what a frozen target learns in order to draft for itself (inference.md 15).

  masks/embedding   [M, D]           embeddings of the mask tokens (ids V .. V + M - 1)
  prompts/kernel    [P, L, 2, K, H]  soft prompts: a key (not rotated) and a value a layer

After a context of c tokens mask i stands at position c - 1 + i, sees the context, the masks before
it and the prompts, and its logits are those of token c + 1 + i (counted from 1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from minicpm_jax.config import BitaConfig, ModelConfig
from minicpm_jax.core import trees, types
from minicpm_jax.nn import layers, lookahead

_SHAPE = ("vocab_size", "model_dim", "num_layers", "num_kv_heads", "head_dim")
_SPECS = {
  "masks/embedding": (None, "embed"),
  "prompts/kernel": (None, None, None, "kv_heads", None),
}


@dataclasses.dataclass(frozen=True)
class Bita:
  """Config and weights."""

  cfg: BitaConfig
  params: types.Params


def for_target(target: ModelConfig, **changes: Any) -> BitaConfig:
  """The config with a target's shapes; `changes` are num_masks and num_prompts."""
  if target.mla is not None:
    raise ValueError("bita: found a target with latent attention, expected keys by head (GQA)")
  return BitaConfig(**{name: getattr(target, name) for name in _SHAPE}, **changes)


def check_fits(cfg: BitaConfig, target: ModelConfig) -> None:
  """Refuses a draft of other shapes than the target's."""
  for_target(target)
  for name in _SHAPE:
    found, expected = getattr(cfg, name), getattr(target, name)
    if found != expected:
      raise ValueError(f"draft.{name}: found {found}, expected the target's {expected}")


def shapes(cfg: BitaConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every leaf by path."""
  heads = (cfg.num_prompts, cfg.num_layers, 2, cfg.num_kv_heads, cfg.head_dim)
  return {"masks/embedding": (cfg.num_masks, cfg.model_dim), "prompts/kernel": heads}


def abstract_params(cfg: BitaConfig) -> tuple[types.Params, types.Params]:
  """(ShapeDtypeStruct tree, tree of PartitionSpecs of logical axis names)."""
  structs = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes(cfg).items()}
  specs = {path: jax.sharding.PartitionSpec(*axes) for path, axes in _SPECS.items()}
  return trees.unflatten(structs), trees.unflatten(specs)


def init_params(cfg: BitaConfig, target: ModelConfig, key: Key[Array, ""]) -> types.Params:
  """Random float32 parameters: masks as words of the table, prompts near 0."""
  stds = {"masks/embedding": layers.embedding_std(target), "prompts/kernel": 0.02}
  keys = jax.random.split(key, len(stds))
  found = {
    path: stds[path] * jax.random.normal(k, shape)
    for k, (path, shape) in zip(keys, shapes(cfg).items(), strict=True)
  }
  return trees.unflatten(found)


def check_params(cfg: BitaConfig, params: types.Params) -> None:
  """ValueError that names the first leaf of another shape."""
  wanted, leaves = shapes(cfg), trees.flatten_paths(params)
  for name in sorted(set(wanted) | set(leaves)):
    found = list(np.shape(leaves[name])) if name in leaves else "none"
    expected = list(wanted[name]) if name in wanted else "none"
    if found != expected:
      raise ValueError(f"draft params: {name}: found {found}, expected {expected}")


def ahead(params: types.Params, mask_BT: Int[Array, "B T"]) -> lookahead.Lookahead:
  """What `Transformer.__call__` takes; mask_BT: 0 = a real token, i = mask token i."""
  kv_PL2KH = params["prompts"]["kernel"]
  return lookahead.Lookahead(
    mask_BT=mask_BT,
    embedding_MD=params["masks"]["embedding"],
    k_LPKH=jnp.swapaxes(kv_PL2KH[:, :, 0], 0, 1),
    v_LPKH=jnp.swapaxes(kv_PL2KH[:, :, 1], 0, 1),
  )
