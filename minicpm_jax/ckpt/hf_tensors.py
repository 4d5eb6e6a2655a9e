"""Reading the tensors of a Hugging Face folder: which file, is the set right, into which buffer.

Used by `hf_io.load_hf`. One tensor is in host memory at a time, next to the leaf it is copied into.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Shaped

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_names, safetensors_file
from minicpm_jax.core import trees, types
from minicpm_jax.models import transformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BIN_ADVICE = (
  "torch pickles are not read (they can run code). Convert once, where torch is installed: "
  "python -c \"import transformers as t; m = t.AutoModelForCausalLM.from_pretrained('{folder}', "
  "dtype='auto', trust_remote_code=True); m.save_pretrained('{folder}-safetensors')\""
)
_MAX_LISTED = 40


def read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise errors.MissingFileError(f"{path}: found no such file, expected it in an HF folder")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise errors.CheckpointError(f"{path}: found broken JSON ({error})") from error
  if not isinstance(value, dict):
    raise errors.CheckpointError(f"{path}: found a {type(value).__name__}, expected a JSON object")
  return value


def dtype_name(dtype: Any) -> config.DTypeName:
  name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  dtype = types.dtype_of(name)
  return next(short for short, full in types.DTYPES.items() if full == dtype)


def open_tensors(folder: pathlib.Path) -> dict[str, safetensors_file.Reader]:
  """Tensor name -> the open file that holds it."""
  if (folder / WEIGHTS).is_file():
    reader = safetensors_file.Reader(folder / WEIGHTS)
    return dict.fromkeys(reader.tensors, reader)
  if not (folder / INDEX).is_file():
    raise _no_weights(folder)
  weight_map = read_json(folder / INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
    raise errors.CheckpointError(f"{folder / INDEX}: weight_map: expected {{tensor: file}}")
  files = sorted(set(weight_map.values()))
  lost = [f for f in files if pathlib.Path(f).name != f or not (folder / f).is_file()]
  if lost:
    raise errors.MissingFileError(
      f"{folder}: missing shard files {lost}, expected the {len(files)} files that {INDEX} names"
    )
  readers = {f: safetensors_file.Reader(folder / f) for f in files}
  absent = [f"{t} (in {f})" for t, f in weight_map.items() if t not in readers[f].tensors]
  unnamed = [f"{t} (in {f})" for f, r in readers.items() for t in r.tensors if t not in weight_map]
  if absent or unnamed:
    raise errors.CheckpointError(
      f"{folder / INDEX}: does not agree with the shards: tensors named but not stored: "
      f"{listed(absent)}; stored but not named: {listed(unnamed)}"
    )
  return {tensor: readers[f] for tensor, f in weight_map.items()}


def _no_weights(folder: pathlib.Path) -> errors.CheckpointError:
  pickles = sorted(p.name for p in folder.glob("*.bin"))
  if pickles:
    advice = _BIN_ADVICE.format(folder=folder)
    return errors.CheckpointError(
      f"{folder}: found only {', '.join(pickles[:3])}, expected {WEIGHTS}: {advice}"
    )
  found = sorted(p.name for p in folder.glob("*.safetensors")) or "no safetensors file"
  return errors.MissingFileError(f"{folder}: found {found}, expected {WEIGHTS} or {INDEX}")


def listed(names: Sequence[str]) -> str:
  more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
  return (", ".join(names[:_MAX_LISTED]) + more) or "none"


def check_counts(
  cfg: config.ModelConfig, source: Mapping[str, safetensors_file.Reader], folder: pathlib.Path
) -> None:
  """Refuses layers and widths that the files cannot hold, before names or tables fill the memory.

  Any width divides the size of some tensor; a stored word holds at most 8 codes.
  """
  experts = 1 if cfg.moe is None else cfg.moe.num_experts
  if cfg.num_layers * experts > max(len(source), 200):
    raise errors.CheckpointError(
      f"{folder}/config.json: num_hidden_layers, num_experts: found {cfg.num_layers} layers of "
      f"{experts}, expected what {len(source)} tensors can hold"
    )
  most = 8 * max((math.prod(r.tensors[name].shape) for name, r in source.items()), default=0)
  heads = cfg.num_heads * cfg.head_dim
  for key, found in (
    ("hidden_size", cfg.model_dim),
    ("intermediate_size", cfg.mlp_dim),
    ("num_attention_heads * head_dim", heads),
  ):
    if found > most:
      raise errors.CheckpointError(
        f"{folder}/config.json: {key}: found {found}, expected what the tensors can hold (the "
        f"largest is of {most // 8} numbers)"
      )


def check_tensors(
  cfg: config.ModelConfig, source: Mapping[str, safetensors_file.Reader], folder: pathlib.Path
) -> dict[str, tuple[int, ...]]:
  """HF name -> shape of that tensor in our layout; refuses any other set of tensors or shapes."""
  quantized = [name for name in source if hf_names.is_quantized(name)]
  if quantized:
    raise errors.QuantizedCheckpointError(
      f"{folder}: found quantised tensors ({listed(quantized[:3])} ...), expected plain weights"
    )
  unpadded = transformer.Transformer(dataclasses.replace(cfg, vocab_multiple=1))
  shapes = trees.flatten_paths(transformer.abstract_params(unpadded)[0])
  blocks, wanted = {}, {}
  for path, leaf in hf_names.leaves(cfg).items():
    for _, name in leaf.tensors:
      blocks[name] = tuple(shapes[path].shape[leaf.num_leading :])
      wanted[name] = hf_names.hf_shape(leaf.rule, blocks[name])
  missing = [name for name in wanted if name not in source]
  unexpected = [n for n in source if n not in wanted and not hf_names.is_ignored(n, cfg)]
  if missing or unexpected:
    raise errors.CheckpointError(
      f"{folder}: {len(missing)} missing tensors: {listed(missing)}; "
      f"{len(unexpected)} unexpected tensors: {listed(unexpected)}"
    )
  infos = {name: source[name].tensors[name] for name in wanted}
  wrong = [
    f"{name}: found {list(info.shape)}, expected {list(wanted[name])}"
    for name, info in infos.items()
    if info.shape != wanted[name]
  ]
  if wrong:
    raise errors.CheckpointError(f"{folder}: wrong shapes: {listed(wrong)}")
  odd = [f"{n} ({i.dtype})" for n, i in infos.items() if i.dtype not in safetensors_file.DTYPES]
  if odd:
    expected = list(safetensors_file.DTYPES)
    raise errors.CheckpointError(f"{folder}: found dtypes {listed(odd)}, expected {expected}")
  _warn_of_another_head(cfg, source)
  return blocks


def _warn_of_another_head(cfg: config.ModelConfig, source: Mapping[str, Any]) -> None:
  """A stored head of a tied model is ignored; where it is another matrix, that is worth a line."""
  head, table = "lm_head.weight", "model.embed_tokens.weight"
  if not cfg.tie_embeddings or head not in source:
    return
  is_same = source[head].tensors[head][:2] == source[table].tensors[table][:2]
  if is_same:
    is_same = np.array_equal(_bits(source[head].read(head)), _bits(source[table].read(table)))
  if not is_same:
    logging.warning(
      "%s: ignored, the embeddings are tied, but it differs from %s; if this checkpoint has a head "
      'of its own, write "tie_word_embeddings": false into its config.json',
      head,
      table,
    )


def _bits(x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "bytes"]:
  return x.reshape(-1).view(np.uint8)


def majority_dtype(
  shapes: Mapping[str, tuple[int, ...]], source: Mapping[str, safetensors_file.Reader]
) -> config.DTypeName:
  """The dtype that most stored parameters have."""
  counts: dict[str, int] = {}
  for name, shape in shapes.items():
    dtype = source[name].tensors[name].dtype
    counts[dtype] = counts.get(dtype, 0) + int(np.prod(shape))
  return dtype_name(safetensors_file.DTYPES[max(counts, key=counts.__getitem__)])


def load_leaf(
  leaf: hf_names.Leaf,
  shape: tuple[int, ...],
  blocks: Mapping[str, tuple[int, ...]],
  source: Mapping[str, safetensors_file.Reader],
  dtype: np.dtype | None,
  sharding: jax.sharding.NamedSharding | None,
) -> jax.Array:
  """One leaf on its devices. Rows of a padded vocabulary stay zero."""
  if dtype is None:
    stored = {source[n].tensors[n].dtype for _, n in leaf.tensors}
    dtype = np.dtype(jnp.result_type(*(safetensors_file.DTYPES[d] for d in stored)))
  whole = tuple((0, n) for n in shape)
  windows = {None: whole}
  if sharding is not None:
    windows = {
      device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
      for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
  buffers = {w: _aligned_zeros([b - a for a, b in w], dtype) for w in set(windows.values())}
  lead = leaf.num_leading
  for at, name in leaf.tensors:
    held = [w for w in buffers if all(a <= i < b for i, (a, b) in zip(at, w, strict=False))]
    if not held:
      continue
    block = hf_names.to_ours(leaf.rule, source[name].read(name), blocks[name])
    for window in held:
      part = block[tuple(slice(a, b) for a, b in window[lead:])]
      target = buffers[window][tuple(i - a for i, (a, _) in zip(at, window, strict=False))]
      target = target[tuple(slice(0, n) for n in part.shape)]
      assign(target, part, name)
  # Zero-copy on a CPU: the buffers are aligned, so the arrays take them over.
  if sharding is None:
    return jax.block_until_ready(jax.device_put(buffers[whole]))
  parts = [jax.device_put(buffers[window], device) for device, window in windows.items()]
  made = jax.make_array_from_single_device_arrays(shape, sharding, parts)
  return jax.block_until_ready(made)


def assign(target: Shaped[np.ndarray, "..."], part: Shaped[np.ndarray, "..."], name: str) -> None:
  """target[...] = part, rounding to nearest even; refuses what float16 cannot hold."""
  with np.errstate(over="ignore"):
    _copy(target, part)
  if target.dtype == np.float16 and part.dtype != np.float16:
    if np.any(np.isinf(target) & np.isfinite(part.astype(np.float32))):
      raise errors.CheckpointError(
        f"{name}: found a value beyond 65504, expected one that float16 can hold (use bf16 or f32)"
      )


def _copy(target: Shaped[np.ndarray, "..."], part: Shaped[np.ndarray, "..."]) -> None:
  """target[...] = part; transposing copies go by blocks of rows of the source, 3 to 8 times faster
  than numpy's own order on large matrices."""
  if part.ndim == 3:
    axis = int(part.strides[1] > part.strides[0])  # of heads
    for one, other in zip(np.moveaxis(target, axis, 0), np.moveaxis(part, axis, 0), strict=True):
      _copy(one, other)
  elif part.ndim < 2 or part.strides[-1] == part.itemsize:
    target[...] = part
  else:
    for j in range(0, part.shape[-1], 128):
      target[:, j : j + 128] = part[:, j : j + 128]


def _aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
  """Zeros at a multiple of 64 bytes, which is what a CPU device takes without a copy."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.zeros(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)
