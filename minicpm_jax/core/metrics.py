"""Weighted means that add up exactly over micro-batches and devices; FLOPs and MFU.

FLOPs convention (stated wherever MFU is printed): model FLOPs of forward and backward,
  per token = 6 * (parameters in matmuls) + 3 * T * N * (H_qk + H_v) * L.
The head counts as a matmul whether tied or not, the embedding look-up does not; a MoE layer counts
its active experts; attention is causal, so half of the T x T square. Rematerialised work, norms,
softmax and padding rows are not counted.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from minicpm_jax import config
from minicpm_jax.core import types


class Metric(NamedTuple):
  """A sum and its weight (a number of tokens, rows, ...); metrics add, means do not."""

  sum: Any
  weight: Any

  @property
  def mean(self) -> Float[types.Array, ""]:
    """sum / weight; 0 where nothing was counted."""
    weight = jnp.asarray(self.weight, jnp.float32)
    return jnp.where(weight == 0, 0.0, self.sum / jnp.where(weight == 0, 1.0, weight))


def add(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> dict[str, Metric]:
  """Joins two sets of metrics; names that only one has are kept."""
  joint = {**a, **b}
  for name in a.keys() & b.keys():
    joint[name] = Metric(a[name].sum + b[name].sum, a[name].weight + b[name].weight)
  return joint


def reduce(sets: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
  """Sum of any number of sets of metrics."""
  total: dict[str, Metric] = {}
  for metrics in sets:
    total = add(total, metrics)
  return total


def means(metrics: Mapping[str, Metric]) -> dict[str, float]:
  """Host floats (0 where nothing was counted); waits for the device."""
  host = jax.device_get(dict(metrics))
  return {name: float(m.sum) / float(m.weight) if m.weight else 0.0 for name, m in host.items()}


def matmul_params(cfg: config.ModelConfig) -> int:
  """Parameters that a token is multiplied with in training (active experts, head, MTP block)."""
  head = cfg.model_dim * cfg.vocab_size
  mlp = 3 * cfg.model_dim * cfg.mlp_dim
  layer_mlp = mlp
  if cfg.moe is not None:
    layer_mlp = mlp * cfg.moe.experts_per_token + cfg.model_dim * cfg.moe.num_experts
  total = cfg.num_layers * (_attention_params(cfg) + layer_mlp) + head
  if cfg.mtp is not None:
    total += 2 * cfg.model_dim**2 + _attention_params(cfg) + mlp + head
  return total


def _attention_params(cfg: config.ModelConfig) -> int:
  d, n = cfg.model_dim, cfg.num_heads
  if cfg.mla is None:
    return 2 * d * n * cfg.head_dim + 2 * d * cfg.num_kv_heads * cfg.head_dim
  m = cfg.mla
  q = d * m.q_lora_rank + m.q_lora_rank * n * cfg.head_dim
  kv = d * (m.kv_lora_rank + m.qk_rope_head_dim)
  kv += m.kv_lora_rank * n * (m.qk_nope_head_dim + m.v_head_dim)
  return q + kv + n * m.v_head_dim * d


def flops_per_token(cfg: config.ModelConfig, seq_len: int) -> float:
  """Training FLOPs per token of a `seq_len` row (module docstring); a forward alone is a third."""
  layers = cfg.num_layers + (cfg.mtp is not None)
  attention = 3 * seq_len * cfg.num_heads * (cfg.head_dim + cfg.v_head_dim) * layers
  return float(6 * matmul_params(cfg) + attention)


# Dense peak FLOP/s by substring of `jax.Device.device_kind` (first match wins). f32 is TF32 on
# NVIDIA, which XLA uses by default; TPUs run f32 matmuls as bf16 passes and are listed as bf16.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
  ("H100 PCIe", {"bf16": 756e12, "f16": 756e12, "f32": 378e12}),
  ("H100", {"bf16": 989e12, "f16": 989e12, "f32": 494e12}),
  ("H200", {"bf16": 989e12, "f16": 989e12, "f32": 494e12}),
  ("GH200", {"bf16": 989e12, "f16": 989e12, "f32": 494e12}),
  ("B200", {"bf16": 2250e12, "f16": 2250e12, "f32": 1125e12}),
  ("A100", {"bf16": 312e12, "f16": 312e12, "f32": 156e12}),
  ("L40S", {"bf16": 362e12, "f16": 362e12, "f32": 183e12}),
  ("L40", {"bf16": 181e12, "f16": 181e12, "f32": 90.5e12}),
  ("L4", {"bf16": 121e12, "f16": 121e12, "f32": 60e12}),
  ("RTX 4090", {"bf16": 165e12, "f16": 165e12, "f32": 82.6e12}),
  ("V100", {"f16": 125e12, "f32": 15.7e12}),
  ("T4", {"f16": 65e12, "f32": 8.1e12}),
  ("TPU v4", {"bf16": 275e12}),
  ("TPU v5 lite", {"bf16": 197e12}),
  ("TPU v5e", {"bf16": 197e12}),
  ("TPU v5", {"bf16": 459e12}),
  ("TPU v6", {"bf16": 918e12}),
  ("TPU7x", {"bf16": 2307e12}),
)


def peak_flops(device_kind: str, dtype: str = "bf16") -> float | None:
  """Peak dense FLOP/s of one device, or None where the table has no entry (every CPU)."""
  for name, peaks in _PEAKS:
    if name.lower() in device_kind.lower():
      return peaks.get(dtype)
  return None


def mfu(
  cfg: config.ModelConfig,
  *,
  seq_len: int,
  tokens_per_second: float,
  device_kind: str,
  num_devices: int = 1,
) -> float | None:
  """Model FLOPs utilisation in [0, 1] over all devices; None where the peak is unknown."""
  peak = peak_flops(device_kind, cfg.dtype)
  if peak is None:
    return None
  return tokens_per_second * flops_per_token(cfg, seq_len) / (peak * num_devices)
