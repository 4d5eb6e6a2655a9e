"""The `qat` entry of config.json: latent weights that every forward quantises (quantization.md 2).

{"type": "ternary", "group_size": -1}, and where they are not the default "scale_dtype" and
"scale_shards". Fused checkpoints have no such entry: they are ordinary models.
"""

import typing
from typing import Any

from minicpm_jax import config
from minicpm_jax.ckpt import errors

_HF_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _check(ok: bool, key: str, found: Any, expected: str) -> None:
  if not ok:
    raise errors.ConfigError(f"config.json: {key}: found {found!r}, expected {expected}")


def from_hf(hf: dict[str, Any]) -> config.QuantConfig | None:
  """The `qat` entry of latent weights: every forward quantises them (quantization.md 2)."""
  qat = hf.get("qat")
  if qat is None:
    return None
  _check(isinstance(qat, dict), "qat", qat, "a dict or no such key")
  known = {"type", "group_size", "scale_dtype", "scale_shards"}
  _check(set(qat) <= known, "qat", sorted(set(qat) - known), f"only the keys {sorted(known)}")
  schemes = [s for s in typing.get_args(config.quant.SchemeName) if s != "none"]
  scheme, size = qat.get("type", None), qat.get("group_size", None)
  _check(scheme in schemes, "qat.type", scheme, f"one of {schemes}")
  ok = isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0)
  _check(ok, "qat.group_size", size, "-1 or an integer > 0")
  dtype = qat.get("scale_dtype", "float32")
  short = {v: k for k, v in _HF_DTYPES.items()}.get(dtype)
  _check(short is not None, "qat.scale_dtype", dtype, f"one of {list(_HF_DTYPES.values())}")
  shards = qat.get("scale_shards", 1)
  is_count = isinstance(shards, int) and not isinstance(shards, bool) and shards > 0
  _check(is_count, "qat.scale_shards", shards, "an integer > 0")
  return config.QuantConfig(
    scheme=scheme,
    group_size=size,
    scale_dtype=short,
    scale_shards=shards,
  )


def to_hf(quant: config.QuantConfig | None) -> dict[str, Any] | None:
  """The `qat` entry of latent weights; codes are exported as plain (fused) floats."""
  if quant is None or quant.scheme == "none" or quant.weights != "latent":
    return None
  default = config.QuantConfig()
  if (quant.include, quant.exclude) != (default.include, default.exclude):
    raise errors.ConfigError(
      f"model.quant.include, exclude: found {quant.include}, {quant.exclude}, expected the default "
      "projections (config.json has no place for others)"
    )
  if quant.act_bits is not None:
    raise errors.ConfigError(
      f"model.quant.act_bits: found {quant.act_bits}, expected None (config.json has no "
      "place for it)"
    )
  qat: dict[str, Any] = {"type": quant.scheme, "group_size": quant.group_size}
  if quant.scale_dtype != "f32":
    qat["scale_dtype"] = _HF_DTYPES[quant.scale_dtype]
  if quant.scale_shards != 1:
    qat["scale_shards"] = quant.scale_shards
  return qat
