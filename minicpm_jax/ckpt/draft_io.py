"""Draft checkpoints under the names of EAGLE, EAGLE-3 and MiniCPM4 releases (inference.md 10).

| kind | told by | tensors |
|---|---|---|
| eagle | neither of below | fc.{weight,bias}, layers.0.* without input_layernorm |
| minicpm | input_norm1.weight | fc.weight, input_norm1 (token), input_norm2 (state), layers.0.* |
| eagle3 | midlayer.* | fc.weight, midlayer.*, norm.weight, lm_head.weight, d2t, t2d |

A prefix "model." and vLLM's "eagle_layers" are accepted. `embed_tokens` is the target's and is
ignored, as is the head of the first two kinds and the norm that vLLM declares for `minicpm` without
calling it. Row i of an EAGLE-3 head is token i + d2t[i]. int4 drafts (GPTQ,
Marlin): `draft_quant`.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from minicpm_jax import config
from minicpm_jax.ckpt import (
  draft_quant,
  errors,
  hf_config,
  hf_io,
  hf_names,
  hf_tensors,
  quant_io,
  safetensors_file,
)
from minicpm_jax.core import trees, types
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.quant import qtensor

Source = draft_quant.Source
_OURS = "minicpm_jax"  # our fields in config.json, which no release has
_INTEGERS = {"I64": np.int64, "I32": np.int32, "BOOL": np.bool_, "U8": np.uint8}
_IGNORED = re.compile(r"embed_tokens\.weight|(.*\.)?rotary_emb\..*|t2d")
_LAYER = (
  ("attn/q/kernel", "self_attn.q_proj.weight", "linear"),
  ("attn/k/kernel", "self_attn.k_proj.weight", "linear"),
  ("attn/v/kernel", "self_attn.v_proj.weight", "linear"),
  ("attn/o/kernel", "self_attn.o_proj.weight", "heads_in"),
  ("mlp_norm/scale", "post_attention_layernorm.weight", "copy"),
  ("mlp/gate/kernel", "mlp.gate_proj.weight", "linear"),
  ("mlp/up/kernel", "mlp.up_proj.weight", "linear"),
  ("mlp/down/kernel", "mlp.down_proj.weight", "linear"),
)
_OUTER: dict[str, tuple[tuple[str, str, hf_names.Rule], ...]] = {
  "eagle": (),
  "minicpm": (
    ("embed_norm/scale", "input_norm1.weight", "copy"),
    ("hidden_norm/scale", "input_norm2.weight", "copy"),
  ),
  "eagle3": (
    ("embed_norm/scale", "midlayer.input_layernorm.weight", "copy"),
    ("hidden_norm/scale", "midlayer.hidden_norm.weight", "copy"),
    ("norm/scale", "norm.weight", "copy"),
    ("lm_head/kernel", "lm_head.weight", "linear"),
  ),
}


def names(cfg: config.DraftConfig) -> dict[str, tuple[str, hf_names.Rule]]:
  """Our path -> (released name, rule of hf_names)."""
  rows: list[tuple[str, str, Any]] = [("fc/kernel", "fc.weight", "linear"), *_OUTER[cfg.kind]]
  if cfg.fc_bias:
    rows.append(("fc/bias", "fc.bias", "copy"))
  for i in range(cfg.layer.num_layers):
    prefix = "midlayer" if cfg.kind == "eagle3" else f"layers.{i}"
    rows += [(f"layers_{i}/{path}", f"{prefix}.{name}", rule) for path, name, rule in _LAYER]
    if cfg.kind == "minicpm" or (cfg.kind == "eagle" and i > 0):
      rows.append((f"layers_{i}/attn_norm/scale", f"{prefix}.input_layernorm.weight", "copy"))
  return {path: (name, rule) for path, name, rule in rows}


# --- Reading -------------------------------------------------------------------------------------


def load_draft(
  path: str | pathlib.Path,
  target: config.ModelConfig,
  *,
  dtype: Any = None,
  window_size: int | None = None,
  draft_logit_scale: float | None = None,
  is_plain: bool = False,
) -> draft_lib.Draft:
  """The draft of a folder (config.json, safetensors) for a target of this config.

  Scales are those of CPM.cu (residual scale_depth / sqrt(L + 1) with the target's L, logits not
  divided) unless the folder was written by `save_draft`. is_plain: EAGLE-3 without them.
  dtype: of parameters and compute; None = as stored.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise errors.MissingFileError(f"{folder}: found no such folder, expected a draft checkpoint")
  raw = hf_tensors.read_json(folder / "config.json")
  readers = quant_io.open_tensors(folder)
  source = _strip(readers, folder)
  with errors.inside(folder):
    cfg = _config(raw, source, target, folder)
  hf_tensors.check_counts(cfg.layer, readers, folder)
  if is_plain:
    cfg = draft_lib.plain(cfg)
  if window_size is not None:
    cfg = dataclasses.replace(cfg, window_size=window_size)
  if draft_logit_scale is not None:
    cfg = dataclasses.replace(cfg, draft_logit_scale=draft_logit_scale)
  try:
    draft_lib.check_fits(cfg, target)
  except ValueError as error:
    raise errors.ConfigError(f"{folder}: {error}") from error
  low = draft_quant.find(folder, names(cfg), source)
  settings = quant_io.read_settings(folder, raw) if low else None
  if settings is not None and settings.is_marlin:
    quant_io.check_joined(cfg.layer, {full: reader for reader, full in source.values()})
  _check(cfg, source, folder, low)
  stored = _majority(cfg, source, low)
  chosen = stored if dtype is None else hf_tensors.dtype_name(dtype)
  layer = dataclasses.replace(cfg.layer, dtype=chosen, param_dtype=chosen)
  cfg = dataclasses.replace(cfg, layer=layer)
  shapes = trees.flatten_paths(draft_lib.abstract_params(cfg)[0])
  leaves = {}
  if settings is not None:
    cfg = draft_lib.quantized(cfg, settings.group_size, "codes", has_fc="fc/kernel" in low)
  for ours, (name, rule) in names(cfg).items():
    if ours in low:
      leaves[ours] = draft_quant.load_leaf(
        ours, name, rule, shapes[ours].shape, source, settings, folder
      )
      continue
    reader, full_name = source[name]
    x = hf_names.to_ours(rule, reader.read(full_name), shapes[ours].shape)
    leaves[ours] = jnp.asarray(np.ascontiguousarray(x), types.dtype_of(chosen))
  return draft_lib.Draft(cfg, trees.unflatten(leaves), _ids(cfg, source, folder))


def _strip(readers: Mapping[str, safetensors_file.Reader], folder: pathlib.Path) -> Source:
  source: Source = {}
  for full, reader in readers.items():
    name = full.removeprefix("model.").replace("eagle_layers.", "layers.", 1)
    if name in source:
      raise errors.CheckpointError(f"{folder}: {full}: found twice ({source[name][1]})")
    source[name] = (reader, full)
  return source


def _config(
  raw: dict[str, Any], source: Source, target: config.ModelConfig, folder: pathlib.Path
) -> config.DraftConfig:
  kind = "eagle"
  if any(name.startswith("midlayer.") for name in source):
    kind = "eagle3"
  elif "input_norm1.weight" in source:
    kind = "minicpm"
  for key, ours in (
    ("scale_emb", target.scale_emb),
    ("scale_depth", target.scale_depth),
    ("dim_model_base", target.dim_model_base),
  ):
    if kind != "eagle3" and key in raw and raw[key] != ours:
      raise errors.ConfigError(
        f"config.json: {key}: found {raw[key]!r}, expected the target's {ours!r}"
      )
  base = draft_lib.for_target(target, kind)
  heads = hf_config.integer(raw, "num_attention_heads")
  width = hf_config.integer(raw, "hidden_size")
  act = raw.get("hidden_act", "silu")
  if act != "silu":
    raise errors.ConfigError(f"config.json: hidden_act: found {act!r}, expected 'silu'")
  rope = base.layer.rope
  if rope.kind == "longrope":  # CPM.cu applies no attention factor anywhere
    rope = dataclasses.replace(rope, factor=1.0)
  ours = _own_fields(raw.get(_OURS, {}), base)
  try:
    layer = dataclasses.replace(
      base.layer,
      name=folder.name,
      model_dim=width,
      mlp_dim=hf_config.integer(raw, "intermediate_size"),
      num_layers=hf_config.integer(raw, "num_hidden_layers", 1),
      num_heads=heads,
      num_kv_heads=hf_config.integer(raw, "num_key_value_heads", heads),
      head_dim=hf_config.integer(raw, "head_dim", max(width // heads, 1)),
      vocab_size=hf_config.integer(raw, "vocab_size", target.vocab_size),
      norm_eps=hf_config.number(raw, "rms_norm_eps", target.norm_eps),
      rope=rope,
    )
    fields: dict[str, Any] = {"layer": layer, "fc_bias": "fc.bias" in source}
    fields["draft_logit_scale"] = 1.0
    if kind == "eagle3" and "draft_vocab_size" in raw:
      fields["draft_vocab_size"] = hf_config.integer(raw, "draft_vocab_size")
    return dataclasses.replace(base, **fields | ours)
  except errors.ConfigError:
    raise
  except ValueError as error:
    raise errors.ConfigError(f"config.json: {error}") from error


def _own_fields(ours: Any, base: config.DraftConfig) -> dict[str, Any]:
  """Our entry of config.json: what `save_draft` writes, checked."""
  scales = ("residual_scale", "draft_logit_scale", "feature_scale")
  if not isinstance(ours, dict):
    raise errors.ConfigError(f"config.json: {_OURS}: found {ours!r:.80}, expected a dict")
  found: dict[str, Any] = {}
  for key, value in ours.items():
    if key in scales:
      found[key] = hf_config.number(ours, key, getattr(base, key), where=f"{_OURS}.")
    elif key == "window_size" and type(value) is int:
      found[key] = value
    elif key == "feature_layers" and isinstance(value, list):
      if all(type(i) is int for i in value):
        found[key] = tuple(value)
  if unknown := sorted(set(ours) - set(found)):
    known = (*scales, "window_size (an integer)", "feature_layers (integers)")
    shown = unknown if len(unknown) > 1 else f"{unknown} with {ours[unknown[0]]!r:.60}"
    raise errors.ConfigError(f"config.json: {_OURS}: found {shown}, expected {known}")
  return found


def _check(
  cfg: config.DraftConfig, source: Source, folder: pathlib.Path, low: Mapping[str, list[str]]
) -> None:
  shapes = trees.flatten_paths(draft_lib.abstract_params(cfg)[0])
  wanted = {
    name: hf_names.hf_shape(rule, shapes[path].shape)
    for path, (name, rule) in names(cfg).items()
    if path not in low
  }
  codes = [name for parts in low.values() for name in parts]  # their shapes: quant_io
  also = {"d2t"} if cfg.kind == "eagle3" else {"lm_head.weight", "norm.weight"}
  also |= {f"{name.rpartition('.')[0]}.{part}" for name in codes for part in ("g_idx", "bias")}
  missing = [name for name in (*wanted, *codes) if name not in source]
  if cfg.kind == "eagle3" and cfg.head_size < cfg.layer.vocab_size and "d2t" not in source:
    missing.append("d2t")
  unexpected = [
    full
    for name, (_, full) in source.items()
    if name not in wanted
    and name not in codes
    and name not in also
    and not _IGNORED.fullmatch(name)
  ]
  if missing or unexpected:
    raise errors.CheckpointError(
      f"{folder}: draft of kind {cfg.kind!r}: {len(missing)} missing tensors: "
      f"{hf_tensors.listed(missing)}; {len(unexpected)} unexpected tensors: "
      f"{hf_tensors.listed(unexpected)}"
    )
  for name, shape in wanted.items():
    reader, full = source[name]
    found = reader.tensors[full]
    if found.shape != shape:
      raise errors.CheckpointError(
        f"{folder}: {full}: found {list(found.shape)}, expected {list(shape)}"
      )
    if found.dtype not in safetensors_file.DTYPES:
      expected = list(safetensors_file.DTYPES)
      raise errors.CheckpointError(
        f"{folder}: {full}: found dtype {found.dtype}, expected one of {expected}"
      )


def _majority(cfg: config.DraftConfig, source: Source, low: Mapping[str, Any]) -> config.DTypeName:
  counts: dict[str, int] = {}
  for path, (name, _) in names(cfg).items():
    if path in low:
      continue
    reader, full = source[name]
    info = reader.tensors[full]
    counts[info.dtype] = counts.get(info.dtype, 0) + math.prod(info.shape)
  return hf_tensors.dtype_name(safetensors_file.DTYPES[max(counts, key=counts.__getitem__)])


def _ids(
  cfg: config.DraftConfig, source: Source, folder: pathlib.Path
) -> Int[np.ndarray, " R"] | None:
  """Full token ids of the head's rows from d2t; checked against t2d where it is there."""
  if cfg.kind != "eagle3" or "d2t" not in source:
    return None
  offsets = _read_integers(*source["d2t"])
  if offsets.shape != (cfg.head_size,):
    raise errors.CheckpointError(
      f"{folder}: d2t: found {list(offsets.shape)}, expected [{cfg.head_size}]"
    )
  ids = np.arange(cfg.head_size) + offsets.astype(np.int64)
  if ids.min() < 0 or ids.max() >= cfg.layer.vocab_size or np.unique(ids).size != ids.size:
    raise errors.CheckpointError(
      f"{folder}: d2t: found ids {ids.min()}..{ids.max()} ({np.unique(ids).size} distinct), "
      f"expected {ids.size} distinct ids in 0..{cfg.layer.vocab_size - 1}"
    )
  if "t2d" in source:
    t2d = _read_integers(*source["t2d"]).astype(bool)
    if t2d.shape != (cfg.layer.vocab_size,) or set(np.flatnonzero(t2d)) != set(ids.tolist()):
      raise errors.CheckpointError(f"{folder}: t2d: found another set of ids than d2t gives")
  return ids.astype(np.int32)


def _read_integers(reader: safetensors_file.Reader, name: str) -> np.ndarray:
  info = reader.tensors[name]
  if info.dtype not in _INTEGERS:
    raise errors.CheckpointError(
      f"{reader.path}: {name}: found dtype {info.dtype}, expected one of {list(_INTEGERS)}"
    )
  size = info.end - info.start
  raw = np.fromfile(reader.path, np.uint8, count=size, offset=info.start)
  return raw.view(_INTEGERS[info.dtype]).reshape(info.shape)


# --- Writing -------------------------------------------------------------------------------------


def save_draft(
  path: str | pathlib.Path,
  draft: draft_lib.Draft,
  target: config.ModelConfig,
  *,
  layout: Literal["gptq", "marlin"] = "gptq",
) -> None:
  """Writes config.json and model.safetensors under released names; scales go beside them.

  int4 QTensors (`cfg.layer.quant` of weights "codes") become GPTQ tensors, scales in float16, or
  with layout "marlin" what CPM.cu loads, in model_gptq.safetensors (groups of 128).
  The folder appears, or has its two files replaced, when all is written.
  """
  if layout not in ("gptq", "marlin"):
    raise ValueError(f"layout: found {layout!r}, expected 'gptq' or 'marlin'")
  cfg, folder = draft.cfg, pathlib.Path(path).absolute()
  draft_lib.check_fits(cfg, target)
  leaves, wanted = (
    trees.flatten_paths(x, qtensor.is_qtensor)
    for x in (draft.params, draft_lib.abstract_params(cfg)[0])
  )
  for name in sorted(set(leaves) | set(wanted)):
    a, b = (list(tree[name].shape) if name in tree else "none" for tree in (leaves, wanted))
    if a != b:
      raise errors.CheckpointError(f"draft.params: {name}: found {a}, expected {b}")
  tensors: dict[str, np.ndarray] = {}
  low = {name: leaves[path] for path, (name, _) in names(cfg).items()}
  low = {name: x for name, x in low.items() if qtensor.is_qtensor(x)}
  if layout == "marlin":
    if not low:
      raise errors.CheckpointError("draft.params: found floats, expected int4 QTensors (Marlin)")
    tensors |= draft_quant.marlin_tensors(low, cfg.kind)
  for path, (name, rule) in names(cfg).items():
    if name not in low:
      tensors[name] = hf_names.to_hf(rule, np.asarray(leaves[path]))
    elif layout == "gptq":
      tensors |= draft_quant.gptq_tensors(quant_io.base_name(name), qtensor.unpack(low[name]))
  if cfg.kind == "eagle3":
    ids = np.arange(cfg.head_size) if draft.ids is None else np.asarray(draft.ids, np.int64)
    t2d = np.zeros(cfg.layer.vocab_size, bool)
    t2d[ids] = True
    tensors |= {"d2t": ids - np.arange(cfg.head_size), "t2d": t2d}
    if layout == "marlin":
      tensors["d2t"] = tensors["d2t"].astype(np.int32)
      del tensors["t2d"]
  file = quant_io.MARLIN_FILE if layout == "marlin" else hf_tensors.WEIGHTS
  with hf_io.replacing(folder) as work:
    _write_safetensors(work / file, tensors)
    (work / "config.json").write_text(json.dumps(_to_json(cfg, target), indent=2) + "\n")


def _to_json(cfg: config.DraftConfig, target: config.ModelConfig) -> dict[str, Any]:
  layer = cfg.layer
  raw: dict[str, Any] = {
    "architectures": [{"eagle3": "LlamaForCausalLMEagle3"}.get(cfg.kind, "EagleForCausalLM")],
    "model_type": "minicpm" if target.arch == "minicpm" else "llama",
    "hidden_size": layer.model_dim,
    "intermediate_size": layer.mlp_dim,
    "num_hidden_layers": layer.num_layers,
    "num_attention_heads": layer.num_heads,
    "num_key_value_heads": layer.num_kv_heads,
    "head_dim": layer.head_dim,
    "vocab_size": layer.vocab_size,
    "rms_norm_eps": layer.norm_eps,
    "rope_theta": layer.rope.theta,
    "hidden_act": "silu",
  }
  if cfg.kind == "eagle3":
    raw["draft_vocab_size"] = cfg.head_size
  if target.scale_depth is not None:
    raw |= {"scale_emb": target.scale_emb, "scale_depth": target.scale_depth}
    raw["dim_model_base"] = target.dim_model_base
  if layer.quant is not None and layer.quant.weights != "latent":
    raw["quantization_config"] = draft_quant.settings_json(layer.quant.group_size)
  fields = ("residual_scale", "draft_logit_scale", "feature_scale", "window_size")
  raw[_OURS] = {name: getattr(cfg, name) for name in fields}
  raw[_OURS]["feature_layers"] = list(cfg.feature_layers)
  return raw


def _write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  from safetensors import numpy as safetensors_numpy

  arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors_numpy.save_file(arrays, path, metadata={"format": "pt"})
