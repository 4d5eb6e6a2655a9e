"""GPTQ and Marlin folders into parameter trees with QTensor leaves (quantization.md 8).

Writing is in `quant_write`. `load_hf` comes here for a folder whose config names a quantisation.
Read: GPTQ of 4 bits in both checkpoint formats, with act order, asymmetric zero points, any group
size, biases of zeros; Marlin as CPM.cu stores it (`model_gptq.safetensors`, q|k|v and gate|up
joined). All projections must be quantised, nothing else. Every refusal names the file and the key
or tensor.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_config, hf_io, hf_names, hf_tensors, safetensors_file
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees, types
from minicpm_jax.models import transformer
from minicpm_jax.quant import gptq_format, marlin, qtensor, tree
from minicpm_jax.quant import leaf as leaf_lib
from minicpm_jax.text import tokenizer

MARLIN_FILE = "model_gptq.safetensors"
_OLD_CONFIG = "quantize_config.json"
FUSED = {  # CPM.cu's name -> HF's, joined along the outputs
  "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "self_attn.o_proj": ("self_attn.o_proj",),
  "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
  "mlp.down_proj": ("mlp.down_proj",),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What `quantization_config` says."""

  group_size: int
  is_symmetric: bool
  version: gptq_format.Version
  is_marlin: bool
  needs_index: bool  # act order whose groups are not those of the original order


def is_quantized(folder: pathlib.Path, hf: Mapping[str, Any]) -> bool:
  """True where the config, or a file beside it, says that the weights are quantised."""
  in_config = bool(hf.get("quantization_config") or hf.get("compression_config"))
  return in_config or any((folder / name).is_file() for name in (_OLD_CONFIG, MARLIN_FILE))


def read_settings(folder: pathlib.Path, hf: Mapping[str, Any]) -> Settings:
  """Checked settings; QuantizedCheckpointError for what is not read here."""
  file, prefix, found = (
    folder / "config.json",
    "quantization_config.",
    hf.get("quantization_config"),
  )
  if not found and (folder / _OLD_CONFIG).is_file():
    file, prefix, found = folder / _OLD_CONFIG, "", hf_tensors.read_json(folder / _OLD_CONFIG)
    found = {"quant_method": "gptq"} | found
  if not isinstance(found, dict):
    raise errors.QuantizedCheckpointError(
      f"{file}: quantization_config: found {found!r:.80}, expected the settings of a GPTQ model"
    )

  def check(ok: bool, key: str, expected: str) -> None:
    if not ok:
      shown = repr(found[key]) if key in found else "no such key"
      raise errors.QuantizedCheckpointError(
        f"{file}: {prefix}{key}: found {shown}, expected {expected}"
      )

  check(found.get("quant_method") == "gptq", "quant_method", "'gptq' (no other method is read)")
  check(found.get("bits") == 4, "bits", "4")
  size = found.get("group_size")
  is_size = isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0)
  check(is_size, "group_size", "-1 or inputs > 0")
  for key in ("sym", "desc_act", "static_groups"):
    value = found.get(key)
    check(value is None or isinstance(value, bool), key, "true or false")
  is_symmetric = found.get("sym") is not False
  check(not found.get("lm_head"), "lm_head", "false (a quantised head is not built)")
  check(not found.get("dynamic"), "dynamic", "none (settings by module are not built)")
  version = found.get("checkpoint_format") or "gptq"
  is_marlin = (folder / MARLIN_FILE).is_file()
  check(
    version in gptq_format.VERSIONS or (is_marlin and version == "marlin"),
    "checkpoint_format",
    f"one of {gptq_format.VERSIONS}",
  )
  if is_marlin:
    check(size in (128, -1), "group_size", "128 or -1 (Marlin)")
    check(is_symmetric, "sym", "true (Marlin)")
    check(not found.get("desc_act"), "desc_act", "false (Marlin)")
    version = "gptq"
  is_ordered = bool(found.get("desc_act")) and not found.get("static_groups") and size != -1
  return Settings(size, is_symmetric, version, is_marlin, is_ordered)


def load_quantized(
  folder: pathlib.Path,
  *,
  dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  scan_layers: bool = True,
) -> tuple[transformer.Transformer, types.Params, Any]:
  """(model, params, tokenizer): projections as int4 QTensors, the rest as `load_hf` reads it."""
  hf = hf_tensors.read_json(folder / "config.json")
  settings = read_settings(folder, hf)
  plain_hf = {k: v for k, v in hf.items() if k not in ("quantization_config", "compression_config")}
  generation = folder / "generation_config.json"
  with errors.inside(folder):
    cfg = hf_config.from_hf(
      plain_hf,
      generation_config=hf_tensors.read_json(generation) if generation.exists() else None,
      dtype="f32",
      scan_layers=scan_layers,
      vocab_multiple=1 if mesh is None else hf_io.vocab_shards(mesh),
    )
  source = open_tensors(folder)
  quant = config.QuantConfig(
    scheme="int4", group_size=settings.group_size, weights="codes", scale_dtype="f16"
  )
  hf_tensors.check_counts(cfg, source, folder)
  table = hf_names.leaves(cfg)
  low = {path: leaf for path, leaf in table.items() if quant.selects(path)}
  plain = {path: leaf for path, leaf in table.items() if path not in low}
  _check_names(cfg, folder, source, low, plain, settings)
  if settings.is_marlin:
    check_joined(cfg, source)
  blocks = _check_plain(cfg, source, plain)
  stored = hf_tensors.majority_dtype(blocks, source)
  chosen = stored if dtype is None else hf_tensors.dtype_name(dtype)
  cfg = dataclasses.replace(cfg, dtype=chosen, param_dtype=chosen)
  abstract, specs = (
    trees.flatten_paths(t) for t in transformer.abstract_params(transformer.Transformer(cfg))
  )
  to = None if dtype is None else np.dtype(types.dtype_of(chosen))
  params = {}
  for path, leaf in table.items():
    names = tuple(specs[path]) + (None,) * (len(abstract[path].shape) - len(tuple(specs[path])))
    if path in plain:
      place = None if mesh is None else mesh_lib.sharding(mesh, names, abstract[path].shape, path)
      shape = abstract[path].shape
      params[path] = hf_tensors.load_leaf(leaf, shape, blocks, source, to, place)
    else:
      qt = load_leaf(leaf, abstract[path].shape, source, settings, folder)
      params[path] = qt if mesh is None else _placed(qt, names, mesh, path)
  model = transformer.Transformer(dataclasses.replace(cfg, quant=quant))
  return model, trees.unflatten(params), tokenizer.load_tokenizer(folder)


def open_tensors(folder: pathlib.Path) -> dict[str, safetensors_file.Reader]:
  """Tensor name -> the open file that holds it: the Marlin file where there is one."""
  if not (folder / MARLIN_FILE).is_file():
    return hf_tensors.open_tensors(folder)
  reader = safetensors_file.Reader(folder / MARLIN_FILE)
  return dict.fromkeys(reader.tensors, reader)


def base_name(name: str) -> str:
  return name.removesuffix(".weight")


def marlin_name(base: str) -> tuple[str, tuple[str, ...]]:
  """(name in Marlin's layout, what is joined there) of a projection; fc of a draft stands alone."""
  layer, *inner = base.rsplit(".", 2)
  for fused, parts in FUSED.items():
    if ".".join(inner) in parts:
      return f"{layer}.{fused}", parts
  return base, (base,)


def _check_names(
  cfg: config.ModelConfig,
  folder: pathlib.Path,
  source: Mapping[str, Any],
  low: Mapping[str, hf_names.Leaf],
  plain: Mapping[str, hf_names.Leaf],
  settings: Settings,
) -> None:
  """Exactly the tensors of a model whose projections are all quantised."""
  names = [name for leaf in low.values() for _, name in leaf.tensors]
  floats = [name for name in names if name in source]
  if floats:
    raise errors.QuantizedCheckpointError(
      f"{folder}: {hf_tensors.listed(floats[:5])}: found plain weights of {len(floats)} "
      f"projections, expected .qweight for all {len(names)} (mixed formats are not read)"
    )
  wanted, optional = [name for leaf in plain.values() for _, name in leaf.tensors], set()
  if settings.is_marlin:
    if cfg.moe is not None or cfg.mla is not None:
      raise errors.QuantizedCheckpointError(
        f"{folder / MARLIN_FILE}: found experts or latent attention, expected a dense model"
      )
    for i in range(cfg.num_layers):
      for fused in FUSED:
        wanted += [f"model.layers.{i}.{fused}.{part}" for part in ("qweight", "scales")]
  else:
    wanted += [f"{base_name(n)}.{part}" for n in names for part in ("qweight", "qzeros", "scales")]
    optional = {f"{base_name(n)}.{part}" for n in names for part in ("g_idx", "bias")}
  missing = [name for name in wanted if name not in source]
  expected = set(wanted) | optional
  unexpected = [n for n in source if n not in expected and not hf_names.is_ignored(n, cfg)]
  if missing or unexpected:
    raise errors.CheckpointError(
      f"{folder}: {len(missing)} missing tensors: {hf_tensors.listed(missing)}; "
      f"{len(unexpected)} unexpected tensors: {hf_tensors.listed(unexpected)}"
    )


def check_joined(cfg: config.ModelConfig, source: Mapping[str, safetensors_file.Reader]) -> None:
  """Marlin's q|k|v and gate|up hold exactly their parts: k and v are counted from the end."""
  qkv = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
  for name, reader in source.items():
    for joined, out in (("qkv_proj", qkv), ("gate_up_proj", 2 * cfg.mlp_dim)):
      found = reader.tensors[name].shape
      if name.endswith(f".{joined}.qweight") and found[-1:] != (2 * out,):
        raise errors.CheckpointError(
          f"{reader.path}: {name}: found shape {list(found)}, expected [in / 16, {2 * out}] of "
          f"{out} outputs"
        )


def _check_plain(
  cfg: config.ModelConfig,
  source: Mapping[str, safetensors_file.Reader],
  plain: Mapping[str, hf_names.Leaf],
) -> dict[str, tuple[int, ...]]:
  """HF name -> shape in our layout of the tensors that are floats, checked against the file."""
  unpadded = transformer.Transformer(dataclasses.replace(cfg, vocab_multiple=1))
  shapes = trees.flatten_paths(transformer.abstract_params(unpadded)[0])
  blocks = {}
  for path, leaf in plain.items():
    for _, name in leaf.tensors:
      blocks[name] = tuple(shapes[path].shape[leaf.num_leading :])
      found, info = hf_names.hf_shape(leaf.rule, blocks[name]), source[name].tensors[name]
      if info.shape != found or info.dtype not in safetensors_file.DTYPES:
        raise errors.CheckpointError(
          f"{source[name].path}: {name}: found {info.dtype} {list(info.shape)}, expected floats of "
          f"shape {list(found)}"
        )
  return blocks


def load_leaf(
  leaf: hf_names.Leaf,
  shape: tuple[int, ...],
  source: Mapping[str, safetensors_file.Reader],
  settings: Settings,
  folder: pathlib.Path,
) -> qtensor.QTensor:
  """One leaf: every layer (and expert) decoded and stacked."""
  lead = leaf.num_leading
  num_in, _ = tree.layout(leaf.path)
  kernel = shape[lead:]
  width, out = math.prod(kernel[:num_in]), math.prod(kernel[num_in:])
  size = width if settings.group_size == -1 else settings.group_size
  if width % size:
    raise errors.CheckpointError(
      f"{folder}: {leaf.tensors[0][1]}: group_size: found {size}, expected a divisor of {width}"
    )
  groups = (*shape[:lead], width // size)
  codes = np.empty((*shape[:lead], width, out), np.int8)
  scale, zero = np.empty((*groups, out), np.float16), np.empty((*groups, out), np.int8)
  g_idx = np.empty((*shape[:lead], width), np.int32)
  for at, name in leaf.tensors:
    found = (_read_marlin if settings.is_marlin else _read_gptq)(
      base_name(name), width, out, source, settings
    )
    codes[at] = found.codes_IO.astype(np.int8) - 8
    zero[at] = found.zero_QO.astype(np.int8) - 8
    scale[at], g_idx[at] = found.scale_QO, found.g_idx_I
  is_plain = np.array_equal(g_idx, np.broadcast_to(np.arange(width) // size, g_idx.shape))
  grouped = (*groups, *kernel[num_in:])
  return qtensor.make(
    jnp.asarray(codes.reshape(shape)),
    jnp.asarray(scale.reshape(grouped)),
    "int4",
    group_size=settings.group_size,
    num_in=num_in,
    num_lead=lead,
    zero=None if settings.is_symmetric else zero.reshape(grouped),
    g_idx=None if is_plain else g_idx,
  )


def _words(source: Mapping[str, safetensors_file.Reader], name: str) -> np.ndarray:
  return source[name].read(name, is_words=True)


def _scales(reader: safetensors_file.Reader, name: str) -> np.ndarray:
  """float16, which the format has; other floats where float16 holds them to its own rounding."""
  stored = reader.read(name)
  if stored.dtype == np.float16:
    return stored
  wide = stored.astype(np.float32)
  with np.errstate(over="ignore", invalid="ignore"):
    half = wide.astype(np.float16)
    off = np.abs(half.astype(np.float32) - wide) > 2.0**-11 * np.abs(wide)
  if np.any(off):
    raise errors.CheckpointError(
      f"{reader.path}: {name}: found {stored.dtype} scales like {wide[off][0]:.4g}, expected what "
      "float16 holds"
    )
  return half


def _read_gptq(
  base: str,
  width: int,
  out: int,
  source: Mapping[str, safetensors_file.Reader],
  settings: Settings,
) -> gptq_format.Codes:
  file, wanted = source[f"{base}.qweight"].path, (width // 8, out)
  found = source[f"{base}.qweight"].tensors[f"{base}.qweight"].shape
  if found != wanted:
    raise errors.CheckpointError(
      f"{file}: {base}.qweight: found shape {list(found)}, expected {list(wanted)}"
    )
  if f"{base}.bias" in source and np.any(source[f"{base}.bias"].read(f"{base}.bias")):
    raise errors.CheckpointError(
      f"{source[f'{base}.bias'].path}: {base}.bias: found values other than 0, expected zeros (the "
      "projections have no bias)"
    )
  size = width if settings.group_size == -1 else settings.group_size
  scales = _scales(source[f"{base}.scales"], f"{base}.scales")
  has_index = f"{base}.g_idx" in source
  if settings.needs_index and not has_index:
    raise errors.CheckpointError(
      f"{file}: {base}.g_idx: found no such tensor, expected the group of every input (desc_act is "
      "true and static_groups is not)"
    )
  index = _words(source, f"{base}.g_idx") if has_index else np.arange(width, dtype=np.int32) // size
  words = [_words(source, f"{base}.{part}") for part in ("qweight", "qzeros")]
  try:
    return gptq_format.decode(
      gptq_format.Tensors(*words, scales, index),
      settings.version,
      group_size=settings.group_size,
      is_symmetric=settings.is_symmetric,
      name=base,
    )
  except ValueError as error:
    raise errors.CheckpointError(f"{file}: {error}") from error


def _read_marlin(
  base: str,
  width: int,
  out: int,
  source: Mapping[str, safetensors_file.Reader],
  settings: Settings,
) -> gptq_format.Codes:
  name, parts = marlin_name(base)
  codes, scale = _marlin_layer(name, width, source[f"{name}.qweight"], settings)
  start, total = 0, codes.shape[1]
  if len(parts) > 1:  # q is first, k and v are equal; gate and up are equal
    place = next(i for i, part in enumerate(parts) if base.endswith(part))
    start = place * out if len(parts) == 2 or place == 0 else total - (3 - place) * out
  columns = slice(start, start + out)
  if start + out > total or start < 0 or (len(parts) == 1 and out != total):
    raise errors.CheckpointError(
      f"{source[f'{name}.qweight'].path}: {name}.qweight: found {codes.shape[1]} outputs, expected "
      f"those of {parts}"
    )
  size = width if settings.group_size == -1 else settings.group_size
  return gptq_format.Codes(
    codes[:, columns],
    scale[:, columns],
    np.full((width // size, out), gptq_format.SYMMETRIC_ZERO, np.uint8),
    np.arange(width, dtype=np.int32) // size,
  )


def _marlin_layer(
  name: str, width: int, reader: safetensors_file.Reader, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
  """(codes [K, N], scales [Q, N]) of one joined projection.

  fc of MiniCPM4's drafts is stored in halves: that of the first K/2 inputs beside the other.
  """
  words, stored = reader.read(f"{name}.qweight", is_words=True), _scales(reader, f"{name}.scales")
  if words.ndim != 2 or stored.ndim != 2:
    raise errors.CheckpointError(
      f"{reader.path}: {name}: found qweight {list(words.shape)} and scales {list(stored.shape)}, "
      "expected two matrices"
    )
  halves = 2 if name.endswith("fc") and 32 * words.shape[0] == width else 1
  inputs = width // halves
  groups = 1 if settings.group_size == -1 else inputs // settings.group_size
  is_split = halves == 1 or (settings.group_size != -1 and inputs % settings.group_size == 0)
  whole = 2 * stored.shape[-1] == words.shape[-1] and words.shape[-1] % (4 * halves) == 0
  if 16 * words.shape[0] != inputs or len(stored) != groups or not (is_split and whole):
    raise errors.CheckpointError(
      f"{reader.path}: {name}: found qweight {list(words.shape)} and scales {list(stored.shape)}, "
      f"expected [{width // 16}, 2 N] and [{groups}, N]"
    )
  if not np.all(np.isfinite(stored)):
    raise errors.CheckpointError(f"{reader.path}: {name}.scales: found inf or nan (damaged file?)")
  try:
    codes = [marlin.unpack(x, name) for x in np.split(words, halves, axis=1)]
    scale = [marlin.restore_scales(x) for x in np.split(stored, halves, axis=1)]
    return np.concatenate(codes), np.concatenate(scale)
  except ValueError as error:
    raise errors.CheckpointError(f"{reader.path}: {error}") from error


def _placed(
  qt: qtensor.QTensor, names: tuple[Any, ...], mesh: jax.sharding.Mesh, path: str
) -> qtensor.QTensor:
  """The arrays of `qt` on the mesh, cut as the kernel would be."""
  labels = leaf_lib.names(qt, names, len(qt.lead))
  arrays = {}
  for field in ("codes", "scale", "zero", "g_idx"):
    x = getattr(qt, field)
    if x is not None:
      place = mesh_lib.sharding(mesh, getattr(labels, field), x.shape, f"{path}/{field}")
      arrays[field] = jax.device_put(x, place)
  return qt.replace(**arrays)
