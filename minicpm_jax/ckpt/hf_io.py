"""Hugging Face folders <-> parameter trees: `load_hf`, `save_hf` (models.md 7, 7.1, 10).

Loading streams: one HF tensor is in host memory at a time, next to the leaf that it is copied into.
On a mesh every leaf is born sharded; only the slices of this process's devices are ever allocated.
Saving streams likewise and puts nothing half-written in place. The MTP head has no tensor names in
HF layouts and is left out with a notice.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_config, hf_names, hf_tensors, safetensors_file
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees, types
from minicpm_jax.models import joined, transformer
from minicpm_jax.quant import qtensor, ternary
from minicpm_jax.text import tokenizer

_SHARDS = "model-*-of-*.safetensors"
_QUANTIZED = ("model_gptq.safetensors", "quantize_config.json")  # would make a folder quantised


def load_hf(
  path: str | pathlib.Path,
  *,
  dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  scan_layers: bool = True,
) -> tuple[transformer.Transformer, types.Params, Any]:
  """Model, parameters and tokenizer (None where the folder has none) of a local HF folder.

  A GPTQ folder, or one with Marlin tensors of CPM.cu, gives QTensor leaves (`quant_io`).

  Args:
    path: folder with config.json and safetensors (one file, or shards with their index).
    dtype: of parameters and compute, e.g. "bf16" or jnp.float32. Default: every tensor as stored,
      compute in the dtype that most of them have.
    mesh: parameters are created sharded by the rules of core.mesh; the vocabulary is padded in
      memory to a multiple of the devices that share it (`cfg.vocab_multiple`).
    scan_layers: stacked layers, or one subtree a layer (models.convert.stack_layers joins them).
  """
  folder = pathlib.Path(path)
  from minicpm_jax.ckpt import quant_io  # which writes with this module

  if not folder.is_dir():
    raise errors.MissingFileError(f"{folder}: found no such folder, expected a local HF folder")
  hf = hf_tensors.read_json(folder / "config.json")
  if quant_io.is_quantized(folder, hf):
    return quant_io.load_quantized(folder, dtype=dtype, mesh=mesh, scan_layers=scan_layers)
  generation = folder / "generation_config.json"
  with errors.inside(folder):
    cfg = hf_config.from_hf(
      hf,
      generation_config=hf_tensors.read_json(generation) if generation.exists() else None,
      dtype="f32",
      scan_layers=scan_layers,
      vocab_multiple=1 if mesh is None else vocab_shards(mesh),
    )
  source = hf_tensors.open_tensors(folder)
  hf_tensors.check_counts(cfg, source, folder)
  if cfg.quant is not None:
    try:
      transformer.abstract_params(transformer.Transformer(cfg))  # groups divide the kernels' inputs
    except ValueError as error:
      raise errors.ConfigError(f"{folder}/config.json: qat: {error}") from error
  shapes = hf_tensors.check_tensors(cfg, source, folder)
  stored = hf_tensors.majority_dtype(shapes, source)
  chosen = stored if dtype is None else hf_tensors.dtype_name(dtype)
  cfg = dataclasses.replace(cfg, dtype=chosen, param_dtype=chosen)
  model = transformer.Transformer(cfg)
  abstract, specs = transformer.abstract_params(model)
  shardings = None
  if mesh is not None:
    shardings = trees.flatten_paths(mesh_lib.tree_shardings(mesh, specs, abstract))
  in_memory = trees.flatten_paths(abstract)
  params = {}
  for name, leaf in hf_names.leaves(cfg).items():
    place = None if shardings is None else shardings[name]
    to = None if dtype is None else np.dtype(types.dtype_of(chosen))
    params[name] = hf_tensors.load_leaf(leaf, in_memory[name].shape, shapes, source, to, place)
  params = trees.unflatten(params)
  try:
    ternary.check_latent(cfg.quant, params)
  except ternary.FusedWeightsError as error:
    raise errors.CheckpointError(f"{folder}: config.json has a 'qat' entry, but {error}") from error
  return model, params, tokenizer.load_tokenizer(folder)


def vocab_shards(mesh: jax.sharding.Mesh) -> int:
  return math.prod(mesh.shape.get(axis, 1) for axis in mesh_lib.RULES["vocab"])


def save_hf(
  path: str | pathlib.Path,
  model: transformer.Transformer,
  params: types.Params,
  tok: Any = None,
  *,
  max_shard_bytes: int | float = 5e9,
  dtype: Any = None,
) -> None:
  """Writes config.json, generation_config.json, safetensors and (with `tok`) tokenizer files.

  Quantised kernels (QTensor) are written as the floats that they stand for.

  Everything is written to a temporary folder first; `path` appears, or has its files replaced with
  config.json last, when all is there. Under several processes all must call; process 0 writes.

  Args:
    path: folder; other files in it stay.
    max_shard_bytes: above this the weights are split into shards with an index.
    dtype: stored dtype, default that of the parameters (a cast rounds to nearest even).
  """
  cfg, folder = model.cfg, pathlib.Path(path).absolute()
  params = joined.split_projections(cfg, nn.unbox(params))
  leaves = _check_params(cfg, trees.flatten_paths(params, qtensor.is_qtensor))
  to = None if dtype is None else types.dtype_of(hf_tensors.dtype_name(dtype))
  tensors = Tensors(cfg, leaves, to)
  hf = hf_config.to_hf(cfg, hf_tensors.dtype_name(tensors.main_dtype))
  shards = split(tensors.sizes(), max_shard_bytes)
  if jax.process_index() == 0:
    write_folder(folder, hf, hf_config.generation_to_hf(cfg), tensors, shards, tok)
  else:  # takes part in gathering what is spread over processes, in the same order
    for shard in shards:
      for name in safetensors_file.ordered({n: tensors.specs[n] for n in shard}):
        tensors.fetch(name)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("save_hf")


def write_folder(
  folder: pathlib.Path,
  hf: dict[str, Any],
  generation: dict[str, Any],
  tensors: Any,
  shards: list[list[str]],
  tok: Any,
) -> None:
  """All files of a folder, put in place at the end; `tensors` is like `Tensors`."""
  with replacing(folder) as work:
    _write_weights(work, tensors, shards)
    if tok is not None:
      tok.save(work)
    (work / "generation_config.json").write_text(_json(generation))
    (work / "config.json").write_text(_json(hf))


class Tensors:
  """HF tensors of a parameter tree by name: dtype, shape, and the values on demand."""

  file_name = hf_tensors.WEIGHTS

  def __init__(self, cfg: config.ModelConfig, leaves: Mapping[str, Any], dtype: Any):
    self._cfg, self._leaves, self._dtype = cfg, leaves, dtype
    table = hf_names.leaves(cfg)
    names = [(name, leaf, at) for leaf in table.values() for at, name in leaf.tensors]
    self._where = {name: (leaf, at) for name, leaf, at in sorted(names, key=lambda x: _order(x[0]))}
    self.specs = {name: self._spec(name) for name in self._where}

  def _spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    leaf, at = self._where[name]
    x = self._leaves[leaf.path]
    block = list(_shape(x)[len(at) :])
    if (axis := _vocab_axis(leaf.path)) is not None:
      block[axis] = self._cfg.vocab_size
    return np.dtype(self._dtype or x.dtype), hf_names.hf_shape(leaf.rule, tuple(block))

  @property
  def main_dtype(self) -> np.dtype:
    counts: dict[np.dtype, int] = {}
    for dtype, shape in self.specs.values():
      counts[dtype] = counts.get(dtype, 0) + int(np.prod(shape))
    return max(counts, key=counts.__getitem__)

  def sizes(self) -> dict[str, int]:
    return {n: int(np.prod(shape)) * dtype.itemsize for n, (dtype, shape) in self.specs.items()}

  def fetch(self, name: str) -> Shaped[np.ndarray, "..."]:
    """The values in HF layout, un-padded and cast."""
    leaf, at = self._where[name]
    x = _block(self._leaves[leaf.path], at)
    if (axis := _vocab_axis(leaf.path)) is not None:
      x = x[: self._cfg.vocab_size] if axis == 0 else x[:, : self._cfg.vocab_size]
    x = hf_names.to_hf(leaf.rule, x)
    out = np.empty(x.shape, self.specs[name][0])
    hf_tensors.assign(out, x, name)
    return out


def _order(name: str) -> tuple[int, int]:
  """Embedding, layers by number, final norm, head: the order of released files."""
  parts = name.split(".")
  layer = int(parts[2]) if parts[1] == "layers" else 0
  rank = 0 if "embed_tokens" in name else 1 if parts[1] == "layers" else 2
  return (rank, layer)


def _vocab_axis(path: str) -> int | None:
  return {"embed/embedding": 0, "lm_head/kernel": 1}.get(path)


def _shape(x: Any) -> tuple[int, ...]:
  return tuple(x.full_shape if qtensor.is_qtensor(x) else x.shape)


def _block(x: Any, at: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
  """x[at] on the host, whatever devices x is spread over, without a host copy of all of x."""
  if qtensor.is_qtensor(x):
    one = jax.tree.map(lambda leaf: _block(leaf, at), x)
    return np.asarray(_dequantize(jax.tree.map(jnp.asarray, one), dtype=x.dtype))
  if isinstance(x, np.ndarray):
    return x[at]
  if not x.is_fully_addressable:
    return multihost_utils.process_allgather(_index(x, np.asarray(at, np.int32)), tiled=True)
  if {device.platform for device in x.devices()} != {"cpu"}:
    return np.asarray(_index(x, np.asarray(at, np.int32)))
  out = np.empty(x.shape[len(at) :], x.dtype)
  for shard in x.addressable_shards:  # a shard on a CPU is a numpy view
    starts = [s.start or 0 for s in shard.index[: len(at)]]
    local = tuple(i - start for i, start in zip(at, starts, strict=True))
    if shard.replica_id == 0 and all(
      0 <= i < n for i, n in zip(local, shard.data.shape, strict=False)
    ):
      out[shard.index[len(at) :]] = np.asarray(shard.data)[local]
  return out


_dequantize = jax.jit(qtensor.dequantize, static_argnames="dtype")  # one compilation a shape


@jax.jit
def _index(x: jax.Array, at: jax.Array) -> jax.Array:
  """x[at] with a traced index: one compilation serves all layers (and experts)."""
  for axis in range(at.shape[0]):
    x = jax.lax.dynamic_index_in_dim(x, at[axis], 0, keepdims=False)
  return x


def _check_params(cfg: config.ModelConfig, leaves: dict[str, Any]) -> dict[str, Any]:
  """The leaves that have an HF name; refuses a tree that is not `cfg`'s."""
  mtp = [path for path in leaves if path.startswith("mtp/")]
  if mtp:
    logging.info("save_hf: %d leaves of the MTP head left out (no HF layout has them)", len(mtp))
  leaves = {path: x for path, x in leaves.items() if path not in mtp}
  plain = transformer.Transformer(dataclasses.replace(cfg, quant=None))
  shapes = trees.flatten_paths(transformer.abstract_params(plain)[0])
  table = hf_names.leaves(cfg)
  missing = [path for path in table if path not in leaves]
  unexpected = [path for path in leaves if path not in table]
  if missing or unexpected:
    raise errors.CheckpointError(
      f"params: missing leaves: {hf_tensors.listed(missing)}; unexpected leaves: "
      f"{hf_tensors.listed(unexpected)} (model.scan_layers is {cfg.scan_layers})"
    )
  wrong = [
    f"{path}: found {list(_shape(x))}, expected {list(shapes[path].shape)}"
    for path, x in leaves.items()
    if _shape(x) != tuple(shapes[path].shape)
  ]
  if wrong:
    raise errors.CheckpointError(f"params: wrong shapes: {hf_tensors.listed(wrong)}")
  floats = [np.dtype(d) for d in safetensors_file.DTYPES.values()]
  odd = [f"{path} ({x.dtype})" for path, x in leaves.items() if x.dtype not in floats]
  if odd:
    expected = list(safetensors_file.DTYPES)
    raise errors.CheckpointError(
      f"params: found dtypes {hf_tensors.listed(odd)}, expected {expected}"
    )
  return leaves


def split(sizes: Mapping[str, int], max_bytes: int | float) -> list[list[str]]:
  """Names in order, cut into shards of at most `max_bytes` (a larger tensor gets its own)."""
  if not max_bytes > 0:
    raise ValueError(f"max_shard_bytes: found {max_bytes}, expected bytes > 0")
  shards: list[list[str]] = [[]]
  used = 0
  for name, size in sizes.items():
    if shards[-1] and used + size > max_bytes:
      shards.append([])
      used = 0
    shards[-1].append(name)
    used += size
  return shards


def _write_weights(work: pathlib.Path, tensors: Any, shards: list[list[str]]) -> None:
  weight_map = {}
  for k, shard in enumerate(shards, start=1):
    file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
    file = file if len(shards) > 1 else tensors.file_name
    weight_map.update(dict.fromkeys(shard, file))
    specs = {name: tensors.specs[name] for name in shard}
    safetensors_file.write(work / file, specs, tensors.fetch)
  if len(shards) > 1:
    total = sum(tensors.sizes().values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (work / hf_tensors.INDEX).write_text(_json(index))


def _json(value: dict[str, Any]) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write a checkpoint to; it becomes `folder` when the block ends.

  A folder that exists gets the files, config.json last; other files in it stay. While files are
  replaced it has no config.json, so an interruption leaves nothing that loads as a mixture of two.
  """
  if folder.exists() and not folder.is_dir():
    raise errors.CheckpointError(f"{folder}: found a file, expected a folder or nothing")
  parent = folder if folder.exists() else folder.parent
  parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=parent))
  try:
    work.chmod(0o755)
    yield work
    _move_into_place(work, folder)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _move_into_place(work: pathlib.Path, folder: pathlib.Path) -> None:
  if not folder.exists():
    work.replace(folder)
    return
  (folder / "config.json").unlink(missing_ok=True)
  single = (hf_tensors.WEIGHTS, hf_tensors.INDEX, *_QUANTIZED)
  for old in (*folder.glob(_SHARDS), *(folder / name for name in single)):
    old.unlink(missing_ok=True)
  for new in sorted(work.iterdir(), key=lambda p: p.name == "config.json"):
    new.replace(folder / new.name)
