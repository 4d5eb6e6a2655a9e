"""The muP constants as data: one compiled step serves every setting of them.

A model's constants are numbers inside its graph, so changing one compiles again. Here the graph is
the plain one (every multiplier 1, untied head), and the constants multiply the weights in front of
it, as in `models.convert.fold_to_llama`, but inside the loss, so that gradients, Adam and the
learning rates still act on the unfolded tensors:

  embedding used      scale_emb * E              branch outputs   r * W_o, r * W_down
  head used           E^T / w  (or W_head / w)   r = scale_depth / sqrt(L), w = D / dim_model_base

Learning-rate factors by role and initial standard deviations are data as well. muP under both
readings of the embedding and the standard parameterisation of one width are then one program.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import trees, types
from minicpm_jax.models import convert, transformer
from minicpm_jax.nn import layers
from minicpm_jax.optim import mup

Scalar = float | np.floating | np.ndarray | types.Array


class Knobs(NamedTuple):
  """The constants of one run; float32 scalars, or arrays [R] for R runs."""

  embed: Scalar  # scale_emb
  branch: Scalar  # scale_depth / sqrt(L)
  head: Scalar  # 1 / w
  lr_matrix: Scalar  # learning-rate factors: matrices and head,
  lr_embedding: Scalar  # the embedding table; norms have 1


def knobs_of(model: config.ModelConfig, optim: config.OptimConfig) -> Knobs:
  """The constants that `model` and `optim` describe."""
  values = (
    model.scale_emb,
    model.residual_scale,
    1.0 / model.logit_divisor,
    mup.lr_scale(model, "matrix") if optim.mup else 1.0,
    mup.lr_scale(model, "embedding") if optim.mup else 1.0,
  )
  return Knobs(*(np.float32(value) for value in values))


def plain_model(model: config.ModelConfig) -> config.ModelConfig:
  """The graph shared by all settings of the constants; what `model` still decides is its shape.

  Layers are a list, not a scan: a fifth faster for small models on a CPU.
  """
  refused = [n for n in ("moe", "mla", "mtp", "sparse") if getattr(model, n) is not None]
  if refused or model.arch == "minicpm3":
    raise ValueError(
      f"model.{(refused or ['arch'])[0]}: found a part whose constants are not data here, expected "
      "a dense model; run it through the queue of train.loop"
    )
  return dataclasses.replace(
    model,
    name="plain",
    scale_emb=1.0,
    scale_depth=None,
    dim_model_base=None,
    mup_denominator=None,
    init_std=1.0,
    mup_embedding="matrix",
    scan_layers=False,
  )


def graph_model(plain: config.ModelConfig) -> transformer.Transformer:
  """The module that runs folded parameters."""
  return transformer.Transformer(dataclasses.replace(plain, tie_embeddings=False))


def fold(params: types.Params, knobs: Knobs) -> types.Params:
  """Parameters of `graph_model` (no scan) from the trained ones; tied where there is no head."""
  table_VD = params["embed"]["embedding"]
  head_DV = params["lm_head"]["kernel"] if "lm_head" in params else table_VD.T
  out = dict(params)
  out["embed"] = {"embedding": table_VD * knobs.embed}
  out["lm_head"] = {"kernel": head_DV * knobs.head}
  for name in [name for name in params if name.startswith("layers_")]:
    layer = dict(params[name])
    for part, kernel in (("attn", "o"), ("mlp", "down")):
      scaled = params[name][part][kernel]["kernel"] * knobs.branch
      layer[part] = {**layer[part], kernel: {"kernel": scaled}}
    out[name] = layer
  return out


def scale_updates(updates: types.Params, knobs: Knobs) -> types.Params:
  """Updates times the learning-rate factor of their role."""
  factors = {"norm": 1.0, "vector": 1.0, "embedding": knobs.lr_embedding}
  return trees.map_with_path(
    lambda path, u: u * factors.get(mup.role_of(path), knobs.lr_matrix), updates
  )


def draw_params(plain: config.ModelConfig, key: jax.Array) -> types.Params:
  """Initial parameters of `plain_model` (std 1), list form; the draws of `train.loop`'s seeds."""
  stacked = dataclasses.replace(plain, scan_layers=True)
  drawn = transformer.init_params(transformer.Transformer(stacked), key)
  return convert.unstack_layers(stacked, drawn)[1]


def scale_params(model: config.ModelConfig, drawn: types.Params) -> types.Params:
  """Drawn parameters at the standard deviations of `model`, by role."""
  embedding, matrix = layers.embedding_std(model), layers.matrix_std(model)

  def scaled(path: str, x: Any) -> Any:
    role = mup.role_of(path)
    return x if role == "norm" else x * np.float32(embedding if role == "embedding" else matrix)

  return trees.map_with_path(scaled, drawn)


def trained_form(
  model: config.ModelConfig, params: types.Params
) -> tuple[config.ModelConfig, types.Params]:
  """(config, params) of a run's parameters as `train` and `ckpt` know them."""
  cfg, params = convert.stack_layers(dataclasses.replace(model, scan_layers=False), params)
  return cfg, params
