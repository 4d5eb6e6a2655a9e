"""BiTA weights on disk: config.json and model.safetensors (the format is ours).

mask_embeddings  [M, D]           prompts  [P, L, 2, K, H] (0 = keys before RoPE, 1 = values)
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_io, hf_tensors
from minicpm_jax.core import trees
from minicpm_jax.models import bita

MODEL_TYPE = "bita"
_NAMES = {"masks/embedding": "mask_embeddings", "prompts/kernel": "prompts"}


def is_bita(path: str | pathlib.Path) -> bool:
  """Whether the folder holds what `save_bita` writes."""
  file = pathlib.Path(path) / "config.json"
  return file.is_file() and hf_tensors.read_json(file).get("model_type") == MODEL_TYPE


def load_bita(path: str | pathlib.Path, target: config.ModelConfig) -> bita.Bita:
  """Config and float32 weights of a folder, checked against the target's shapes."""
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise errors.MissingFileError(f"{folder}: found no such folder, expected BiTA weights")
  raw = hf_tensors.read_json(folder / "config.json")
  if raw.get("model_type") != MODEL_TYPE:
    raise errors.ConfigError(
      f"{folder}/config.json: model_type: found {raw.get('model_type')!r}, expected {MODEL_TYPE!r}"
    )
  fields = {f.name: raw.get(f.name) for f in dataclasses.fields(config.BitaConfig)}
  for name, value in fields.items():
    if not isinstance(value, int):
      raise errors.ConfigError(f"{folder}/config.json: {name}: found {value!r}, expected a number")
  try:
    cfg = config.BitaConfig(**fields)
    bita.check_fits(cfg, target)
  except ValueError as error:
    raise errors.ConfigError(f"{folder}: {error}") from error
  readers, leaves = hf_tensors.open_tensors(folder), {}
  for path_, shape in bita.shapes(cfg).items():
    name = _NAMES[path_]
    if name not in readers:
      raise errors.CheckpointError(f"{folder}: {name}: found no such tensor, expected {shape}")
    found = tuple(readers[name].tensors[name].shape)
    if found != shape:
      raise errors.CheckpointError(f"{folder}: {name}: found {found}, expected {shape}")
    leaves[path_] = jnp.asarray(np.asarray(readers[name].read(name)), jnp.float32)
  return bita.Bita(cfg, trees.unflatten(leaves))


def save_bita(path: str | pathlib.Path, draft: bita.Bita) -> None:
  """The folder appears, or has its two files replaced, when all is written."""
  from safetensors import numpy as safetensors_numpy

  bita.check_params(draft.cfg, draft.params)
  folder = pathlib.Path(path).absolute()
  leaves = trees.flatten_paths(draft.params)
  tensors = {
    name: np.ascontiguousarray(np.asarray(leaves[path_], np.float32))
    for path_, name in _NAMES.items()
  }
  raw: dict[str, Any] = {"model_type": MODEL_TYPE} | dataclasses.asdict(draft.cfg)
  with hf_io.replacing(folder) as work:
    safetensors_numpy.save_file(tensors, work / hf_tensors.WEIGHTS)
    (work / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
