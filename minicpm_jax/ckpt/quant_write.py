"""Parameter trees with int4 QTensors -> GPTQ folders and Marlin files (quantization.md 8)."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_config, hf_io, hf_names, hf_tensors, quant_io
from minicpm_jax.core import trees, types
from minicpm_jax.models import joined, transformer
from minicpm_jax.quant import gptq_format, marlin, qtensor

_HEADS = ("embed/embedding", "lm_head/kernel")  # loaders take floats there


def save_gptq(
  path: str | pathlib.Path,
  model: transformer.Transformer,
  params: types.Params,
  tok: Any = None,
  *,
  version: gptq_format.Version = "gptq",
  damp: float = 0.01,
  dtype: Any = None,
  max_shard_bytes: int | float = 5e9,
) -> None:
  """A GPTQ folder of a model whose projections are int4 QTensors; other leaves, a rounded head
  among them, are floats in `dtype`.

  Scales are stored as float16 (exact where the solver rounded them so). version "gptq" stores zero
  points minus 1, "gptq_v2" as they are; loaders of today take both.
  """
  if version not in gptq_format.VERSIONS:
    raise ValueError(f"version: found {version!r}, expected one of {gptq_format.VERSIONS}")
  tensors = _GPTQTensors(model.cfg, params, version, dtype)
  _save(path, model, tensors, tok, version, damp, max_shard_bytes)


def save_marlin(
  path: str | pathlib.Path,
  model: transformer.Transformer,
  params: types.Params,
  tok: Any = None,
  *,
  damp: float = 0.01,
  dtype: Any = None,
) -> None:
  """The folder that CPM.cu loads: `model_gptq.safetensors` in Marlin's layout.

  Symmetric, consecutive groups of 128 (or one), dense model; anything else is refused.
  """
  tensors = _MarlinTensors(model.cfg, params, dtype)
  _save(path, model, tensors, tok, "gptq", damp, math.inf)


def check_model(cfg: config.ModelConfig, group_size: int, *, is_marlin: bool = False) -> None:
  """Refuses, by shapes alone, a model whose symmetric int4 codes such a folder cannot hold."""
  quant = config.QuantConfig(scheme="int4", group_size=group_size, weights="codes")
  model = transformer.Transformer(dataclasses.replace(cfg, quant=quant))
  params = transformer.abstract_params(model)[0]
  if is_marlin:
    _MarlinTensors(cfg, params, None)
  else:
    _GPTQTensors(cfg, params, "gptq", None)


def _save(
  path: str | pathlib.Path,
  model: transformer.Transformer,
  tensors: "_GPTQTensors",
  tok: Any,
  version: str,
  damp: float,
  max_shard_bytes: int | float,
) -> None:
  cfg = dataclasses.replace(model.cfg, quant=None)
  hf = hf_config.to_hf(cfg, hf_tensors.dtype_name(tensors.main_dtype))
  kinds = list(tensors.low.values())
  hf["quantization_config"] = {
    "bits": 4,
    "checkpoint_format": version,
    "damp_percent": damp,
    "desc_act": any(qt.g_idx is not None for qt in kinds),
    "group_size": kinds[0].group_size,
    "lm_head": False,
    "quant_method": "gptq",
    "static_groups": all(qt.g_idx is None for qt in kinds),
    "sym": kinds[0].zero is None,
    "true_sequential": True,
  }
  shards = hf_io.split(tensors.sizes(), max_shard_bytes)
  folder = pathlib.Path(path).absolute()
  hf_io.write_folder(folder, hf, hf_config.generation_to_hf(cfg), tensors, shards, tok)


def layer_codes(qt: qtensor.QTensor, at: tuple[int, ...], base: str) -> gptq_format.Codes:
  """Codes 0..15 of layer `at` of an unpacked int4 QTensor; `base` names it in errors."""
  width, out, groups = qt.in_size, math.prod(qt.out_shape), qt.num_groups
  pick = lambda x: np.asarray(x[at] if at else x)  # noqa: E731
  exact = pick(qt.scale).astype(np.float32).reshape(groups, out)
  scale = exact.astype(np.float16)
  if not np.all(np.isfinite(scale.astype(np.float32))):
    raise errors.CheckpointError(f"save_gptq: {base}.scales: found beyond float16's range")
  if num_coarse := np.sum(np.abs(scale - exact) > 2**-10 * np.abs(exact)):
    logging.warning(
      "save_gptq: %s.scales: %d of %d lie below float16's normal range (6e-5) and lose digits",
      *(base, num_coarse, exact.size),
    )
  zero = np.full((groups, out), gptq_format.SYMMETRIC_ZERO, np.uint8)
  if qt.zero is not None:
    zero = (pick(qt.zero).astype(np.int16) + 8).astype(np.uint8).reshape(groups, out)
  size = width // groups
  index = np.arange(width, dtype=np.int32) // size if qt.g_idx is None else pick(qt.g_idx)
  codes = (pick(qt.codes).astype(np.int16) + 8).astype(np.uint8).reshape(width, out)
  return gptq_format.Codes(codes, scale, zero, index.astype(np.int32))


class _GPTQTensors:
  """Tensors of the folder by name: dtype, shape and, on demand, values."""

  file_name = hf_tensors.WEIGHTS

  def __init__(self, cfg: config.ModelConfig, params: types.Params, version: str, dtype: Any):
    self.version = version
    params = joined.split_projections(cfg, nn.unbox(params))
    flat = trees.flatten_paths(params, qtensor.is_qtensor)
    flat = {path: x for path, x in flat.items() if not path.startswith("mtp/")}
    is_low = lambda path, x: qtensor.is_qtensor(x) and path not in _HEADS  # noqa: E731
    self.low = {path: qtensor.unpack(x) for path, x in flat.items() if is_low(path, x)}
    plain_cfg = dataclasses.replace(cfg, quant=None)
    _check_low(plain_cfg, self.low)
    to = None if dtype is None else types.dtype_of(hf_tensors.dtype_name(dtype))
    self.floats = hf_io.Tensors(plain_cfg, flat, to)
    self.where = {
      quant_io.base_name(name): (leaf.path, at)
      for leaf in hf_names.leaves(plain_cfg).values()
      if leaf.path in self.low
      for at, name in leaf.tensors
    }
    self.specs = {}
    for name, spec in self.floats.specs.items():
      if quant_io.base_name(name) not in self.where:
        self.specs[name] = spec
    counts: dict[np.dtype, int] = {}
    for x, shape in self.specs.values():
      counts[x] = counts.get(x, 0) + math.prod(shape)
    self.main_dtype = max(counts, key=counts.__getitem__)
    self.add_specs()
    self._encoded = functools.lru_cache(maxsize=1)(self._encode)

  def add_specs(self) -> None:
    for base, (path, _) in self.where.items():
      qt = self.low[path]
      width, out, groups = qt.in_size, math.prod(qt.out_shape), qt.num_groups
      if width % 8 or out % 8:
        raise errors.CheckpointError(
          f"save_gptq: {base}: found {width} inputs and {out} outputs, expected multiples of 8"
        )
      words = np.dtype(np.int32)
      self.specs[f"{base}.qweight"] = (words, (width // 8, out))
      self.specs[f"{base}.qzeros"] = (words, (groups, out // 8))
      self.specs[f"{base}.scales"] = (np.dtype(np.float16), (groups, out))
      self.specs[f"{base}.g_idx"] = (words, (width,))

  def sizes(self) -> dict[str, int]:
    return {n: math.prod(shape) * dtype.itemsize for n, (dtype, shape) in self.specs.items()}

  def codes(self, base: str) -> gptq_format.Codes:
    """Codes 0..15 of one layer's projection."""
    path, at = self.where[base]
    return layer_codes(self.low[path], at, base)

  def _encode(self, base: str) -> gptq_format.Tensors:
    return gptq_format.encode(self.codes(base), self.version, base)

  def fetch(self, name: str) -> np.ndarray:
    base, _, part = name.rpartition(".")
    if base in self.where and part != "weight":
      return getattr(self._encoded(base), part)
    return self.floats.fetch(name)


class _MarlinTensors(_GPTQTensors):
  """The same in Marlin's layout, q|k|v and gate|up joined."""

  file_name = quant_io.MARLIN_FILE

  def __init__(self, cfg: config.ModelConfig, params: types.Params, dtype: Any):
    if cfg.moe is not None or cfg.mla is not None:
      raise errors.CheckpointError("save_marlin: found experts or latent attention, expected dense")
    super().__init__(cfg, params, "gptq", dtype)

  def add_specs(self) -> None:
    self.fused: dict[str, Sequence[str]] = {}
    for base, (path, _) in self.where.items():
      qt = self.low[path]
      if qt.zero is not None or qt.g_idx is not None or qt.group_size not in (-1, 128):
        raise errors.CheckpointError(
          f"save_marlin: {base}: found group_size {qt.group_size}, "
          f"{'symmetric' if qt.zero is None else 'asymmetric'}"
          f"{'' if qt.g_idx is None else ', act order'}; expected symmetric groups of 128 in order"
        )
    layers = sorted({".".join(base.split(".")[:3]) for base in self.where}, key=_layer_number)
    for layer in layers:
      for fused, parts in quant_io.FUSED.items():
        bases = [f"{layer}.{part}" for part in parts]
        qts = [self.low[self.where[base][0]] for base in bases]
        width, out = qts[0].in_size, sum(math.prod(qt.out_shape) for qt in qts)
        marlin.check_shape(width, out, f"save_marlin: {layer}.{fused}")
        name = f"{layer}.{fused}"
        self.fused[name] = bases
        self.specs[f"{name}.qweight"] = (np.dtype(np.int32), (width // 16, 2 * out))
        self.specs[f"{name}.scales"] = (np.dtype(np.float16), (qts[0].num_groups, out))

  def fetch(self, name: str) -> np.ndarray:
    base, _, part = name.rpartition(".")
    if base not in self.fused or part == "weight":
      return self.floats.fetch(name)
    found = [self.codes(b) for b in self.fused[base]]
    if part == "qweight":
      return marlin.pack(np.concatenate([c.codes_IO for c in found], axis=1), base)
    return marlin.permute_scales(np.concatenate([c.scale_QO for c in found], axis=1))


def _layer_number(name: str) -> int:
  return int(name.split(".")[2])


def _check_low(cfg: config.ModelConfig, low: Mapping[str, qtensor.QTensor]) -> None:
  wanted = [p for p in hf_names.leaves(cfg) if config.QuantConfig().selects(p)]
  floats = [path for path in wanted if path not in low]
  if floats or len(low) != len(wanted):
    odd = [path for path in low if path not in wanted]
    raise errors.CheckpointError(
      f"save_gptq: params: found floats at {hf_tensors.listed(floats)} and QTensors at "
      f"{hf_tensors.listed(odd)} beside the projections, expected int4 QTensors at all projections"
    )
  kinds = {(qt.scheme, qt.group_size, qt.zero is None) for qt in low.values()}
  if len(kinds) > 1 or next(iter(kinds))[0] != "int4":
    raise errors.CheckpointError(
      f"save_gptq: params: found (scheme, group size, symmetric) {sorted(map(str, kinds))}, "
      "expected one kind, scheme int4"
    )
