"""Hugging Face `config.json` <-> ModelConfig: normalisation and refusals (models.md 2, 7.1, 10).

The architecture string decides everything, never `model_type` and never the presence of muP keys:
"-llama-format" repositories keep `scale_emb` beside `LlamaForCausalLM`, where it means nothing.

What a round trip changes (documented defaults): absent keys are written out
(`tie_word_embeddings`, `num_key_value_heads`, `rope_theta`, `head_dim` of Llama, ...), the kind of
a rope scaling goes under `rope_type`, `eos_token_id` is a list only if it has several ids, whole
`scale_emb` and `scale_depth` are integers (other numbers that are floats in the family stay
floats). Dropped: `auto_map` (the remote code is not shipped), `_name_or_path`,
`transformers_version`, sampling defaults of old files (generation_config.json goes round whole).
"""

import json
import math
from typing import Any

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_qat

_ARCHS = {
  "MiniCPMForCausalLM": "minicpm",
  "LlamaForCausalLM": "llama",
  "MiniCPM3ForCausalLM": "minicpm3",
  "MixtralForCausalLM": "llama",  # a MiniCPM-MoE folded into Llama form
}
_CLASSES = {arch: name for name, arch in list(_ARCHS.items())[:3]}
_TIED_BY_DEFAULT = {"minicpm": True, "minicpm3": True, "llama": False}
_INIT_STD = {"minicpm": 0.1, "minicpm3": 0.1, "llama": 0.02}
_HF_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_ROPE_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "longrope": "longrope"}
_ROPE_KEYS = {
  "none": (),
  "linear": ("factor",),
  "dynamic": ("factor", "original_max_position_embeddings"),
  "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
# Keys that would change the network if set; the family has none of them.
_NEUTRAL = {
  "attention_bias": (None, False),
  "mlp_bias": (None, False),
  "qkv_bias": (None, False),
  "partial_rotary_factor": (None, 1, 1.0),
  "rope_interleaved": (None, False),
  "attn_use_rope": (None, True),
  "attn_use_output_gate": (None, False),
  "qk_norm": (None, False),
  "sliding_window": (None,),
}

_REQUIRED = object()


def _check(ok: bool, key: str, found: Any, expected: str) -> None:
  if not ok:
    shown = "no such key" if found is _REQUIRED else repr(found)
    raise errors.ConfigError(f"config.json: {key}: found {shown}, expected {expected}")


def integer(hf: dict[str, Any], key: str, default: Any = _REQUIRED) -> Any:
  """A positive integer, or `default` where the key is absent or null."""
  value = default if hf.get(key) is None else hf[key]
  ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
  _check(ok, key, value, "an integer > 0")
  return value


def number(hf: dict[str, Any], key: str, default: Any = _REQUIRED, where: str = "") -> Any:
  """A finite positive number as float, or `default` where the key is absent or null."""
  value = default if hf.get(key) is None else hf[key]
  if value is None:
    return None
  ok = isinstance(value, int | float) and not isinstance(value, bool)
  _check(ok and 0 < value < math.inf, where + key, value, "a number > 0")
  return float(value)


def _token_ids(value: Any, key: str) -> tuple[int, ...]:
  ids = value if isinstance(value, list) else [] if value is None else [value]
  ok = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
  _check(ok, key, value, "a token id, a list of token ids or null")
  return tuple(dict.fromkeys(ids))


def from_hf(
  hf: dict[str, Any],
  *,
  generation_config: dict[str, Any] | None = None,
  dtype: config.DTypeName | None = None,
  scan_layers: bool = True,
  vocab_multiple: int = 1,
) -> config.ModelConfig:
  """The ModelConfig of a released config.json; ConfigError names the key that is wrong.

  `dtype` is for compute and storage, default `torch_dtype` of the file. The stop ids are those of
  config.json followed by further ones of generation_config.json.
  """
  if hf.get("quantization_config") or hf.get("compression_config"):
    raise errors.QuantizedCheckpointError(
      "config.json: quantization_config: found a quantised checkpoint, expected bf16, f16 or f32 "
      "weights (the plain loader does not read quantised tensors)"
    )
  arch = architecture(hf)
  for key, allowed in _NEUTRAL.items():
    _check(hf.get(key) in allowed, key, hf.get(key), f"{allowed[-1]} (nothing else is built)")
  num_heads = integer(hf, "num_attention_heads")
  model_dim = integer(hf, "hidden_size")
  num_kv_heads = integer(hf, "num_key_value_heads", num_heads)
  expected = f"a divisor of num_attention_heads {num_heads}"
  _check(num_heads % num_kv_heads == 0, "num_key_value_heads", num_kv_heads, expected)
  mla = _mla(hf, model_dim, num_heads) if arch == "minicpm3" else None
  head_dim = None if mla is None else mla.qk_nope_head_dim + mla.qk_rope_head_dim
  if head_dim is None and hf.get("head_dim") is None:
    expected = f"a multiple of num_attention_heads {num_heads}, or a head_dim"
    _check(model_dim % num_heads == 0, "hidden_size", model_dim, expected)
    head_dim = model_dim // num_heads
  elif head_dim is None:
    head_dim = integer(hf, "head_dim")
  rotary_dim = head_dim if mla is None else mla.qk_rope_head_dim
  act, act_threshold = _activation(hf)
  tie = _TIED_BY_DEFAULT[arch] if hf.get("tie_word_embeddings") is None else None
  if tie is None:
    tie = hf["tie_word_embeddings"]
    _check(isinstance(tie, bool), "tie_word_embeddings", tie, "true, false or no such key")
  dtype = dtype or _dtype(hf)
  generation = generation_config or {}
  default_eos = None if "eos_token_id" in generation else 2
  stop_ids = _token_ids(hf.get("eos_token_id", default_eos), "eos_token_id")
  stop_ids += _token_ids(generation.get("eos_token_id"), "generation_config: eos_token_id")
  bos_ids = _token_ids(hf.get("bos_token_id", 1), "bos_token_id")
  pad_ids = _token_ids(hf.get("pad_token_id"), "pad_token_id")
  own = {"bos_token_id", "eos_token_id", *(("pad_token_id",) if pad_ids else ())}
  more = {key: value for key, value in generation.items() if key not in own}
  try:
    return config.ModelConfig(
      name=str(hf.get("_name_or_path") or "").rstrip("/").split("/")[-1] or "custom",
      arch=arch,
      vocab_size=integer(hf, "vocab_size"),
      model_dim=model_dim,
      mlp_dim=integer(hf, "intermediate_size"),
      num_layers=integer(hf, "num_hidden_layers"),
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      max_position=integer(hf, "max_position_embeddings"),
      rope=_rope(hf, rotary_dim),
      norm_eps=number(hf, "rms_norm_eps", 1e-6),
      tie_embeddings=tie,
      **_mup(hf, arch),
      act=act,
      act_threshold=act_threshold,
      moe=_moe(hf, arch),
      mla=mla,
      sparse=_sparse(hf),
      quant=hf_qat.from_hf(hf),
      bos_id=bos_ids[0] if bos_ids else None,
      stop_ids=tuple(dict.fromkeys(stop_ids)),
      generation=json.dumps(more) if more else None,
      pad_id=pad_ids[0] if pad_ids else None,
      vocab_multiple=vocab_multiple,
      dtype=dtype,
      param_dtype=dtype,
      scan_layers=scan_layers,
      init_std=number(hf, "initializer_range", _INIT_STD[arch]),
    )
  except errors.ConfigError:
    raise
  except ValueError as error:
    raise errors.ConfigError(f"config.json: {error}") from error


def architecture(hf: dict[str, Any]) -> str:
  """minicpm, llama or minicpm3, from `architectures[0]` alone."""
  names = hf.get("architectures")
  ok = isinstance(names, list) and bool(names) and isinstance(names[0], str)
  expected = f"a list whose first entry is one of {list(_ARCHS)}"
  _check(ok and names[0] in _ARCHS, "architectures", names, expected)
  return _ARCHS[names[0]]


def _dtype(hf: dict[str, Any]) -> config.DTypeName:
  value = hf.get("torch_dtype") or hf.get("dtype") or "float32"
  short = {v: k for k, v in _HF_DTYPES.items()}.get(value)
  _check(short is not None, "torch_dtype", value, f"one of {list(_HF_DTYPES.values())}")
  return short


def _mup(hf: dict[str, Any], arch: str) -> dict[str, Any]:
  """The muP multipliers; Llama has none, whatever keys its config carries."""
  if arch == "llama":
    return {}
  for key in ("scale_emb", "scale_depth", "dim_model_base"):
    _check(key in hf, key, _REQUIRED, f"this muP constant in a {_CLASSES[arch]} config")
  return {
    "scale_emb": number(hf, "scale_emb"),
    "scale_depth": number(hf, "scale_depth", None),  # null: no scaling, as in transformers
    "dim_model_base": integer(hf, "dim_model_base", None),
    "mup_denominator": integer(hf, "mup_denominator", None),
  }


def _activation(hf: dict[str, Any]) -> tuple[str, float]:
  act = hf.get("hidden_act", "silu")
  _check(act in ("silu", "fatrelu"), "hidden_act", act, "one of ['silu', 'fatrelu']")
  if act == "silu":
    return act, 0.0
  threshold = hf.get("hidden_act_param", _REQUIRED)
  ok = isinstance(threshold, int | float) and not isinstance(threshold, bool)
  _check(ok and threshold >= 0, "hidden_act_param", threshold, "the threshold >= 0 of fatrelu")
  return act, float(threshold)


def _moe(hf: dict[str, Any], arch: str) -> config.MoEConfig | None:
  """Experts: by `num_experts` > 0 in the MiniCPM class; Mixtral always has them."""
  is_mixtral = hf["architectures"][0] == "MixtralForCausalLM"
  key = "num_local_experts" if is_mixtral else "num_experts"
  if not is_mixtral and hf.get(key) in (None, 0):
    return None
  num_experts = integer(hf, key)
  _check(is_mixtral or arch == "minicpm", key, num_experts, f"no experts in {_CLASSES[arch]}")
  used = integer(hf, "num_experts_per_tok")
  _check(used <= num_experts, "num_experts_per_tok", used, f"at most {key} {num_experts}")
  return config.MoEConfig(num_experts=num_experts, experts_per_token=used)


def _mla(hf: dict[str, Any], model_dim: int, num_heads: int) -> config.MLAConfig:
  """Latent attention of MiniCPM3; a stored `head_dim` (transformers writes the rotary width) is
  not the width of a head here and is left alone."""
  derived = model_dim // num_heads
  return config.MLAConfig(
    q_lora_rank=integer(hf, "q_lora_rank"),
    kv_lora_rank=integer(hf, "kv_lora_rank"),
    qk_nope_head_dim=integer(hf, "qk_nope_head_dim"),
    qk_rope_head_dim=integer(hf, "qk_rope_head_dim"),
    v_head_dim=integer(hf, "v_head_dim", derived),
  )


_SPARSE_RULES = {"selection": ("joint", "split"), "lse": ("exact", "coarse")}


def _sparse(hf: dict[str, Any]) -> config.SparseAttentionConfig | None:
  sparse = hf.get("sparse_config")
  if sparse is None:
    found = hf.get("sparse_rules")
    _check(found is None, "sparse_rules", found, "none without a sparse_config")
    return None
  _check(isinstance(sparse, dict), "sparse_config", sparse, "a dict or null")
  defaults = config.SparseAttentionConfig().to_hf()
  for key, value in sparse.items():
    kind = type(defaults.get(key, value))  # from_hf refuses unknown keys
    _check(type(value) is kind, f"sparse_config.{key}", value, f"of type {kind.__name__}")
  rules = hf.get("sparse_rules", {})  # ours: what sparse_config has no keys for
  _check(isinstance(rules, dict), "sparse_rules", rules, "a dict or no such key")
  for key, value in rules.items():
    _check(key in _SPARSE_RULES, "sparse_rules", key, f"only the keys {list(_SPARSE_RULES)}")
    _check(
      value in _SPARSE_RULES[key], f"sparse_rules.{key}", value, f"one of {_SPARSE_RULES[key]}"
    )
  try:
    return config.SparseAttentionConfig.from_hf(sparse, **rules)
  except ValueError as error:  # names our field
    text = str(error).replace("sparse.", "sparse_config.", 1)
    raise errors.ConfigError(f"config.json: {text}") from error


def _rope(hf: dict[str, Any], rotary_dim: int) -> config.RopeConfig:
  """From `rope_scaling` (+ `rope_theta`), or `rope_parameters` as transformers 5 writes it."""
  found = [
    _rope_from(hf, key, hf[key], rotary_dim)
    for key in ("rope_parameters", "rope_scaling")
    if hf.get(key)
  ]
  if not found:
    return config.RopeConfig(theta=number(hf, "rope_theta", 10000.0))
  expected = "the same as rope_parameters"
  _check(found[0] == found[-1], "rope_scaling", hf.get("rope_scaling"), expected)
  return found[0]


def _rope_from(hf: dict[str, Any], key: str, scaling: Any, rotary_dim: int) -> config.RopeConfig:
  _check(isinstance(scaling, dict), key, scaling, "a dict or null")
  spelled = {scaling[k] for k in ("rope_type", "type") if isinstance(scaling.get(k), str)}
  expected = f"one of {list(_ROPE_KINDS)} under rope_type (or type)"
  found = sorted(spelled) or sorted(scaling)
  _check(len(spelled) == 1 and spelled <= set(_ROPE_KINDS), f"{key}.rope_type", found, expected)
  kind = _ROPE_KINDS[spelled.pop()]
  known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
  unknown = sorted(k for k, v in scaling.items() if k not in known and v is not None)
  _check(not unknown, f"{key} ({kind})", unknown, f"only the keys {sorted(known)}")
  partial = scaling.get("partial_rotary_factor")
  _check(partial in (None, 1), f"{key}.partial_rotary_factor", partial, "1.0 (the whole head)")
  theta = number(hf, "rope_theta", 10000.0)
  theta = number(scaling, "rope_theta", theta, where=f"{key}.")
  if kind == "none":
    return config.RopeConfig(theta=theta)
  factor = number(scaling, "factor", None, where=f"{key}.")
  if kind != "longrope":
    _check(factor is not None and factor >= 1, f"{key}.factor", factor, f"a number >= 1 for {kind}")
    original = scaling.get("original_max_position_embeddings")
    expected = "max_position_embeddings, from which dynamic scaling starts"
    same = original in (None, hf.get("max_position_embeddings"))
    _check(same, f"{key}.original_max_position_embeddings", original, expected)
    return config.RopeConfig(kind=kind, theta=theta, factor=factor)
  nested = integer(scaling, "original_max_position_embeddings", None)
  top = integer(hf, "original_max_position_embeddings", nested)
  name = f"{key}.original_max_position_embeddings"
  _check(nested in (None, top), name, nested, f"{top} as stored beside {key}")
  return config.RopeConfig(
    kind=kind,
    theta=theta,
    factor=factor,
    short_factor=_factors(scaling, key, "short_factor", rotary_dim),
    long_factor=_factors(scaling, key, "long_factor", rotary_dim),
    original_max_position=top or integer(hf, "max_position_embeddings"),
  )


def _factors(scaling: dict[str, Any], key: str, name: str, rotary_dim: int) -> tuple[float, ...]:
  values = scaling.get(name, _REQUIRED)
  where = f"{key}.{name}"
  _check(isinstance(values, list), where, values, f"a list of {rotary_dim // 2} numbers")
  count = f"{len(values)} factors"
  _check(
    len(values) == rotary_dim // 2, where, count, f"rotary_dim / 2 = {rotary_dim // 2} factors"
  )
  for i, x in enumerate(values):
    ok = isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
    _check(ok, f"{where}[{i}]", x, "a positive number")
  return tuple(float(x) for x in values)


def to_hf(cfg: config.ModelConfig, params_dtype: config.DTypeName | None = None) -> dict[str, Any]:
  """The config.json of `cfg` in the released form; `from_hf` of it gives `cfg` back.

  `params_dtype` is the stored dtype, default `cfg.param_dtype`. muP multipliers that are switched
  off (None) are written as the constants that make them 1. MTP has no place in the file.
  """
  if cfg.arch == "llama":
    has_mup = cfg.scale_emb != 1 or cfg.residual_scale != 1 or cfg.logit_divisor != 1
    found = (cfg.scale_emb, cfg.scale_depth, cfg.dim_model_base)
    if has_mup:
      raise errors.ConfigError(
        f"model.scale_emb, scale_depth, dim_model_base: found {found}, expected no multipliers in "
        "arch 'llama' (models.convert.fold_to_llama folds them)"
      )
  hf: dict[str, Any] = {
    "architectures": [_CLASSES[cfg.arch]],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": cfg.bos_id,
    "eos_token_id": _eos(cfg),
    "hidden_act": cfg.act,
    "hidden_size": cfg.model_dim,
    "initializer_range": cfg.init_std,
    "intermediate_size": cfg.mlp_dim,
    "max_position_embeddings": cfg.max_position,
    "model_type": cfg.arch,
    "num_attention_heads": cfg.num_heads,
    "num_hidden_layers": cfg.num_layers,
    "num_key_value_heads": cfg.num_kv_heads,
    "rms_norm_eps": cfg.norm_eps,
    "rope_scaling": _rope_to_hf(cfg.rope),
    "rope_theta": cfg.rope.theta,
    "tie_word_embeddings": cfg.tie_embeddings,
    "torch_dtype": _HF_DTYPES[params_dtype or cfg.param_dtype],
    "use_cache": True,
    "vocab_size": cfg.vocab_size,
  }
  if cfg.pad_id is not None:
    hf["pad_token_id"] = cfg.pad_id
  if cfg.act == "fatrelu":
    hf["hidden_act_param"] = cfg.act_threshold
  if cfg.arch == "llama" or (cfg.mla is None and cfg.head_dim * cfg.num_heads != cfg.model_dim):
    hf["head_dim"] = cfg.head_dim
  if cfg.arch != "llama":
    depth = math.sqrt(cfg.num_layers) if cfg.scale_depth is None else cfg.scale_depth
    hf["scale_emb"] = _as_written(cfg.scale_emb)
    hf["scale_depth"] = _as_written(depth)
    hf["dim_model_base"] = cfg.model_dim if cfg.dim_model_base is None else cfg.dim_model_base
    if cfg.mup_denominator is not None:
      hf["mup_denominator"] = cfg.mup_denominator
  if cfg.mla is not None:
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
      hf[key] = getattr(cfg.mla, key)
    hf["v_head_dim"] = cfg.mla.v_head_dim
  if cfg.moe is not None:
    if cfg.arch == "llama":
      hf |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    key = "num_local_experts" if cfg.arch == "llama" else "num_experts"
    hf[key] = cfg.moe.num_experts
    hf["num_experts_per_tok"] = cfg.moe.experts_per_token
  if cfg.sparse is not None:
    hf["sparse_config"] = cfg.sparse.to_hf()
    served = config.SparseAttentionConfig.from_hf(hf["sparse_config"])
    names = [n for n in _SPARSE_RULES if getattr(cfg.sparse, n) != getattr(served, n)]
    if names:
      hf["sparse_rules"] = {name: getattr(cfg.sparse, name) for name in names}
  if (qat := hf_qat.to_hf(cfg.quant)) is not None:
    hf["qat"] = qat
  return hf


def generation_to_hf(cfg: config.ModelConfig) -> dict[str, Any]:
  """generation_config.json: what was read of one, with the special ids of the config."""
  ids = {"bos_token_id": cfg.bos_id, "eos_token_id": _eos(cfg), "pad_token_id": cfg.pad_id}
  more = json.loads(cfg.generation or "{}")
  return dict(sorted((more | {k: v for k, v in ids.items() if v is not None}).items()))


def _eos(cfg: config.ModelConfig) -> int | list[int] | None:
  return list(cfg.stop_ids) if len(cfg.stop_ids) > 1 else cfg.stop_ids[0] if cfg.stop_ids else None


def _as_written(x: float) -> int | float:
  """Whole constants as integers: the released files say `"scale_emb": 12`."""
  return int(x) if float(x).is_integer() else x


def _rope_to_hf(rope: config.RopeConfig) -> dict[str, Any] | None:
  if rope.kind == "none":
    return None
  hf: dict[str, Any] = {"rope_type": rope.kind}
  if rope.factor is not None:
    hf["factor"] = rope.factor
  if rope.kind == "longrope":
    hf["long_factor"] = list(rope.long_factor)
    hf["short_factor"] = list(rope.short_factor)
    hf["original_max_position_embeddings"] = rope.original_max_position
  return hf
