"""Released members of the family as configs (models.md 2): shapes and constants only.

Every function takes field overrides (`minicpm4_0p5b(dtype="bf16")`). Parameter counts are tested to
the unit in `tests/models/test_zoo.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from minicpm_jax.config import (
  MLAConfig,
  ModelConfig,
  MoEConfig,
  RopeConfig,
)
from minicpm_jax.models import transformer
from minicpm_jax.nn import rope

_MUP = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}
_CHATML_STOPS = (2, 73440)


def longrope(
  family: rope.Family, original_max_position: int, extension: float | int = 1
) -> RopeConfig:
  """LongRoPE with the family's closed-form factors, short and long alike as released.

  An extension replaces both lists, leaves the original length, and adds no attention factor
  (`factor` 1.0, models.md 3.6).
  """
  factors = rope.longrope_factors(family, extension=extension)
  return RopeConfig(
    kind="longrope",
    short_factor=factors,
    long_factor=factors,
    original_max_position=original_max_position,
    factor=None if extension == 1 else 1.0,
  )


def _build(base: dict[str, Any], overrides: dict[str, Any]) -> ModelConfig:
  return ModelConfig(**{**base, **overrides})


def _minicpm_1b() -> dict[str, Any]:
  shape = {"model_dim": 1536, "mlp_dim": 3840, "num_layers": 52, "num_heads": 24}
  shape |= {"num_kv_heads": 8, "head_dim": 64, "vocab_size": 73440, "max_position": 4096}
  return {"name": "minicpm_1b", **shape, **_MUP}


def _minicpm_2b() -> dict[str, Any]:
  shape = {"model_dim": 2304, "mlp_dim": 5760, "num_layers": 40, "num_heads": 36}
  shape |= {"num_kv_heads": 36, "head_dim": 64, "vocab_size": 122753, "max_position": 4096}
  return {"name": "minicpm_2b", **shape, **_MUP}


def minicpm_1b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM-1B-sft-bf16 (MiniCPM Table 2)."""
  return _build(_minicpm_1b(), overrides)


def minicpm_2b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM-2B-{sft,dpo}-* (MiniCPM Table 2); the vocabulary is odd."""
  return _build(_minicpm_2b(), overrides)


def minicpm_2b_128k(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM-2B-128k: dynamic NTK beyond 65536, untied, table padded by 7 rows."""
  base = _minicpm_2b() | {
    "name": "minicpm_2b_128k",
    "vocab_size": 122760,
    "max_position": 65536,
    "rope": RopeConfig(kind="dynamic", theta=1e6, factor=4.0),
    "tie_embeddings": False,
  }
  return _build(base, overrides)


def minicpm_moe_8x2b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM-MoE-8x2B: MiniCPM-2B with 8 experts of its FFN's size, top 2."""
  base = _minicpm_2b() | {"name": "minicpm_moe_8x2b", "moe": MoEConfig()}
  return _build(base, overrides)


def minicpm_s_1b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM-S-1B-sft: MiniCPM-1B with FATReLU at 0.03."""
  base = _minicpm_1b() | {"name": "minicpm_s_1b", "act": "fatrelu", "act_threshold": 0.03}
  return _build(base, overrides)


def minicpm3_4b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM3-4B: latent attention."""
  base = {
    "name": "minicpm3_4b",
    "arch": "minicpm3",
    "model_dim": 2560,
    "mlp_dim": 6400,
    "num_layers": 62,
    "num_heads": 40,
    "num_kv_heads": 40,
    "head_dim": 96,
    "vocab_size": 73448,
    "max_position": 32768,
    "rope": longrope("minicpm3_4b", 32768),
    "mla": MLAConfig(),
    "stop_ids": _CHATML_STOPS,
    **_MUP,
  }
  return _build(base, overrides)


def minicpm4_0p5b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM4-0.5B (tied, eps 1e-5)."""
  base = {
    "name": "minicpm4_0p5b",
    "model_dim": 1024,
    "mlp_dim": 4096,
    "num_layers": 24,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 73448,
    "max_position": 32768,
    "rope": longrope("minicpm4_0p5b", 32768),
    "stop_ids": _CHATML_STOPS,
    **_MUP,
  }
  return _build(base, overrides)


def minicpm4_8b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM4-8B (untied, eps 1e-6), dense at every length unless `sparse` is given."""
  base = {
    "name": "minicpm4_8b",
    "model_dim": 4096,
    "mlp_dim": 16384,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 2,
    "head_dim": 128,
    "vocab_size": 73448,
    "max_position": 32768,
    "rope": longrope("minicpm4_8b", 32768),
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "mup_denominator": 32,
    "stop_ids": _CHATML_STOPS,
    "pad_id": 2,
    **_MUP,
  }
  return _build(base, overrides)


def minicpm4p1_8b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM4.1-8B: MiniCPM4-8B with a 64k base window."""
  rope_cfg = longrope("minicpm4p1_8b", 65536)
  base = {"name": "minicpm4p1_8b", "max_position": 65536, "rope": rope_cfg}
  return minicpm4_8b(**{**base, **overrides})


def bitcpm4_0p5b(**overrides: Any) -> ModelConfig:
  """openbmb/BitCPM4-0.5B: MiniCPM4-0.5B's shape; weights are stored fake-quantised."""
  return minicpm4_0p5b(**{"name": "bitcpm4_0p5b", **overrides})


def bitcpm4_1b(**overrides: Any) -> ModelConfig:
  """openbmb/BitCPM4-1B: MiniCPM-1B's layers with the 73448 vocabulary (only shapes were seen)."""
  base = _minicpm_1b() | {
    "name": "bitcpm4_1b",
    "vocab_size": 73448,
    "max_position": 32768,
    "rope": longrope("minicpm4_0p5b", 32768),
    "stop_ids": _CHATML_STOPS,
  }
  return _build(base, overrides)


def minicpm5_1b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM5-1B: Llama form, no muP; heads of 128 although 1536 / 16 = 96."""
  base = {
    "name": "minicpm5_1b",
    "arch": "llama",
    "model_dim": 1536,
    "mlp_dim": 4608,
    "num_layers": 24,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 128,
    "vocab_size": 130560,
    "max_position": 131072,
    "rope": RopeConfig(theta=5e6),
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "bos_id": 0,
    "stop_ids": (1, 130073),
    "pad_id": 1,
    "init_std": 0.02,
  }
  return _build(base, overrides)


def minicpm5_2b(**overrides: Any) -> ModelConfig:
  """openbmb/MiniCPM5-2B: shapes from third parties' detection code, the rest as MiniCPM5-1B."""
  base = {"name": "minicpm5_2b", "model_dim": 2048, "mlp_dim": 6144, "num_layers": 42}
  return minicpm5_1b(**{**base, **overrides})


# MiniCPM Table 8: (model_dim, mlp_dim, num_heads, num_layers).
_TUNNEL = {
  "9m": (320, 800, 5, 8),
  "30m": (512, 1280, 8, 12),
  "70m": (640, 1600, 10, 14),
  "0p1b": (768, 1920, 12, 16),
  "0p17b": (896, 2240, 14, 18),
  "0p2b": (1024, 2560, 16, 20),
  "0p5b": (1344, 3360, 21, 24),
}


def tunnel(size: str, **overrides: Any) -> ModelConfig:
  """A wind-tunnel model of MiniCPM Table 8: multi-head attention, heads of 64, d_ff = 2.5 d_m."""
  if size not in _TUNNEL:
    raise ValueError(f"size: found {size!r}, expected one of {list(_TUNNEL)}")
  width, mlp_dim, heads, num_layers = _TUNNEL[size]
  base = _minicpm_2b() | {
    "name": f"tunnel_{size}",
    "model_dim": width,
    "mlp_dim": mlp_dim,
    "num_layers": num_layers,
    "num_heads": heads,
    "num_kv_heads": heads,
  }
  return _build(base, overrides)


def nano(**overrides: Any) -> ModelConfig:
  """Quickstart size, about 1M parameters: MiniCPM4 in small (GQA, tied, muP constants)."""
  base = {
    "name": "nano",
    "model_dim": 128,
    "mlp_dim": 384,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position": 1024,
    "scale_emb": 12.0,
    "scale_depth": 1.4,
    "dim_model_base": 64,
  }
  return _build(base, overrides)


def tiny(cfg: ModelConfig, **overrides: Any) -> ModelConfig:
  """`cfg` shrunk to test size with every kind kept: rope, activation, experts, MLA, MTP, ties."""
  heads = 4
  kv_heads = heads if cfg.num_kv_heads == cfg.num_heads else 2
  mla = cfg.mla
  if mla is not None:
    mla = dataclasses.replace(
      mla, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
    )
  head_dim = 8 if mla is None else 16
  half = (8 if mla is None else mla.qk_rope_head_dim) // 2
  rope_cfg = cfg.rope
  if rope_cfg.kind == "longrope":
    step = max(1, len(rope_cfg.long_factor) // half)
    rope_cfg = dataclasses.replace(
      rope_cfg,
      short_factor=rope_cfg.short_factor[::step][:half],
      long_factor=rope_cfg.long_factor[::step][:half],
      original_max_position=64,
    )
  moe = cfg.moe
  if moe is not None:
    moe = dataclasses.replace(moe, num_experts=4, experts_per_token=min(2, moe.experts_per_token))
  changes = {
    "name": f"tiny_{cfg.name}",
    "vocab_size": 256,
    "model_dim": 32,
    "mlp_dim": 64,
    "num_layers": 2,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "head_dim": head_dim,
    "max_position": 64,
    "rope": rope_cfg,
    "mla": mla,
    "moe": moe,
    "dim_model_base": None if cfg.dim_model_base is None else 16,
    "bos_id": 1,
    "stop_ids": (2,),
    "pad_id": None if cfg.pad_id is None else 2,
  }
  return dataclasses.replace(cfg, **{**changes, **overrides})


ZOO: dict[str, Callable[..., ModelConfig]] = {
  f.__name__: f
  for f in (
    minicpm_1b,
    minicpm_2b,
    minicpm_2b_128k,
    minicpm_moe_8x2b,
    minicpm_s_1b,
    minicpm3_4b,
    minicpm4_0p5b,
    minicpm4_8b,
    minicpm4p1_8b,
    bitcpm4_0p5b,
    bitcpm4_1b,
    minicpm5_1b,
    minicpm5_2b,
    nano,
  )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamCounts:
  """Numbers of stored parameters; embeddings are the table and an untied head."""

  total: int
  non_embedding: int
  active_non_embedding: int  # experts counted by the share that a token uses


def param_counts(cfg: ModelConfig) -> ParamCounts:
  """Exact counts from shapes alone, without vocabulary padding; the MTP module counts too."""
  cfg = dataclasses.replace(cfg, vocab_multiple=1, scan_layers=True, remat="none", quant=None)
  params, _ = transformer.abstract_params(transformer.Transformer(cfg))

  def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  total = count(params)
  outside = count(params["embed"]) + count(params.get("lm_head", {}))
  idle = 0
  if cfg.moe is not None:
    experts = count([params["layers"]["moe"][name] for name in ("gate", "up", "down")])
    idle = experts * (cfg.moe.num_experts - cfg.moe.experts_per_token) // cfg.moe.num_experts
  return ParamCounts(
    total=total, non_embedding=total - outside, active_non_embedding=total - outside - idle
  )
