"""Weighted sums add up; FLOPs against a count of every matmul by hand; MFU."""

import jax.numpy as jnp
import pytest

from minicpm_jax import config
from minicpm_jax.core import metrics


def dense(**kw):
  base = dict(
    vocab_size=50,
    model_dim=16,
    mlp_dim=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
  )
  return config.ModelConfig(**{**base, **kw})


def forward_matmuls(cfg, t):
  """FLOPs of every matmul of one forward over a row of t tokens: 2 m n k each, attention full."""
  d, f, n, k, h = cfg.model_dim, cfg.mlp_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
  qkvo = 2 * t * d * (n * h) + 2 * 2 * t * d * (k * h) + 2 * t * (n * h) * d
  mlp = 3 * 2 * t * d * f
  if cfg.moe:
    mlp = cfg.moe.experts_per_token * mlp + 2 * t * d * cfg.moe.num_experts
  attend = 2 * n * t * t * h * 2
  return cfg.num_layers * (qkvo + mlp), cfg.num_layers * attend, 2 * t * d * cfg.vocab_size


@pytest.mark.smoke
@pytest.mark.parametrize("moe", [None, config.MoEConfig(num_experts=4, experts_per_token=2)])
def test_flops_per_token_counts_every_matmul_and_half_the_attention(moe):
  cfg, t = dense(moe=moe), 32
  linear, attend, head = forward_matmuls(cfg, t)
  want = 3 * (linear + attend / 2 + head) / t
  assert metrics.flops_per_token(cfg, t) == want
  assert metrics.flops_per_token(dense(moe=moe, tie_embeddings=False), t) == want


def test_mtp_adds_a_dense_block_a_projection_and_a_head():
  cfg, t, d = dense(), 32, 16
  linear, attend, head = forward_matmuls(dense(num_layers=1), t)
  extra = linear + attend / 2 + head + 2 * t * (2 * d) * d
  got = metrics.flops_per_token(dense(mtp=config.MTPConfig()), t)
  assert got - metrics.flops_per_token(cfg, t) == 3 * extra / t


def test_latent_attention_counts_its_five_matmuls():
  mla = config.MLAConfig(
    q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3
  )
  cfg = dense(arch="minicpm3", mla=mla, head_dim=6)
  d, n = 16, 4
  per_layer = d * 6 + 6 * n * 6 + d * (5 + 2) + 5 * n * (4 + 3) + n * 3 * d
  assert metrics.matmul_params(cfg) == 3 * (per_layer + 3 * d * 24) + d * 50
  attend = 3 * (2 * n * 32 * 32 * 6 + 2 * n * 32 * 32 * 3) / 2
  want = 6 * metrics.matmul_params(cfg) + 3 * attend / 32
  assert metrics.flops_per_token(cfg, 32) == want


def test_metrics_of_micro_batches_add_to_the_mean_over_all_tokens():
  parts = [(3.0, 2.0), (9.0, 4.0), (0.0, 0.0)]
  total = metrics.reduce({"loss": metrics.Metric(jnp.float32(s), w)} for s, w in parts)
  assert metrics.means(total) == {"loss": 2.0}
  assert float(total["loss"].mean) == 2.0
  empty = {"loss": metrics.Metric(jnp.float32(0), jnp.float32(0))}
  assert metrics.means(empty) == {"loss": 0.0} and float(empty["loss"].mean) == 0.0
  joint = metrics.add(total, {"mtp": metrics.Metric(1.0, 4.0)})
  assert metrics.means(joint) == {"loss": 2.0, "mtp": 0.25}


@pytest.mark.parametrize(
  "kind, dtype, peak",
  [
    ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
    ("NVIDIA H100 PCIe", "bf16", 756e12),
    ("NVIDIA H200", "bf16", 989e12),
    ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
    ("NVIDIA L40S", "bf16", 362e12),
    ("Tesla V100-SXM2-16GB", "bf16", None),
    ("TPU v5 lite", "bf16", 197e12),
    ("TPU v5p", "bf16", 459e12),
    ("cpu", "f32", None),
  ],
)
def test_peak_flops_table(kind, dtype, peak):
  assert metrics.peak_flops(kind, dtype) == peak


def test_mfu_is_the_share_of_the_peak():
  cfg = dense(dtype="bf16")
  rate = 989e12 * 2 * 0.5 / metrics.flops_per_token(cfg, 64)
  got = metrics.mfu(
    cfg, seq_len=64, tokens_per_second=rate, device_kind="NVIDIA H200", num_devices=2
  )
  assert got == pytest.approx(0.5)
  assert metrics.mfu(cfg, seq_len=64, tokens_per_second=1.0, device_kind="cpu") is None
