"""Every config refuses bad values with field, found and expected; derived values."""

import dataclasses
import math

import pytest

from minicpm_jax import config
from minicpm_jax.models import zoo


def untyped(kind, **fields):
  """The config without beartype's look at the arguments, as outside the tests."""
  made = object.__new__(kind)
  for name, value in (vars(kind()) | fields).items():
    object.__setattr__(made, name, value)
  made.__post_init__()


@pytest.mark.parametrize(
  "build, message",
  [
    (lambda: config.MeshConfig(dp=0), r"mesh\.dp: found 0"),
    (lambda: untyped(config.EngineConfig, capacity="x"), "engine.capacity: found 'x', expected an"),
    (lambda: untyped(config.EngineConfig, max_batch=1.5), "engine.max_batch: found 1.5"),
    (lambda: untyped(config.EngineConfig, min_span=math.inf), "engine.min_span: found inf"),
    (lambda: untyped(config.SamplingConfig, top_p=None), "sampling.top_p: found None, expected a"),
    (lambda: untyped(config.SamplingConfig, top_k=True), "sampling.top_k: found True"),
    (lambda: config.SamplingConfig(max_new_tokens=2**31), "sampling.max_new_tokens: found 2147"),
    (lambda: untyped(config.ServerConfig, max_queue=[]), r"server.max_queue: found \[\]"),
    (lambda: config.MeshConfig(dp=-1, tp=-1), "at most one axis of size -1"),
    (lambda: config.MeshConfig(pp=2), r"mesh\.pp: found 2.*not built"),
    (lambda: config.RopeConfig(kind="dynamic"), r"rope\.factor: found None"),
    (
      lambda: config.RopeConfig(
        kind="longrope", short_factor=(1.0,), long_factor=(1.0, 2.0), original_max_position=8
      ),
      r"short_factor/long_factor: found \(1, 2\)",
    ),
    (
      lambda: config.RopeConfig(kind="longrope", short_factor=(1.0,), long_factor=(1.0,)),
      "original_max_position: found None",
    ),
    (lambda: config.MoEConfig(num_experts=4, experts_per_token=5), "experts_per_token: found 5"),
    (lambda: config.SparseAttentionConfig(block_size=60), r"sparse\.block_size: found 60"),
    (lambda: config.SparseAttentionConfig(dense_len=-2), r"sparse\.dense_len: found -2"),
    (lambda: config.SparseAttentionConfig.from_hf({"block": 1}), r"sparse_config: found \['block'"),
    (lambda: untyped(config.SparseAttentionConfig, topk=64.5), r"sparse\.topk: found 64\.5"),
    (lambda: config.SparseAttentionConfig(topk=2**26), r"sparse\.topk: found .*of 31 bits"),
    (
      lambda: config.SparseAttentionConfig(window_size=2**40),
      r"sparse\.window_size: found .*31 bits",
    ),
    (lambda: untyped(config.SparseAttentionConfig, use_nope="no"), r"sparse\.use_nope: found 'no'"),
    (lambda: zoo.nano(num_heads=3), r"model\.num_heads: found 3, expected a multiple"),
    (lambda: zoo.nano(arch="minicpm3"), r"model\.mla: found None"),
    (lambda: zoo.nano(head_dim=31), r"model\.head_dim: found 31"),
    (lambda: zoo.nano(norm_eps=-1.0), r"model\.norm_eps: found -1\.0"),
    (lambda: zoo.minicpm4_8b(head_dim=64), "64 factors.*expected rotary_dim / 2 = 32 factors"),
    (lambda: config.ScheduleConfig(min_ratio=0.0), "> 0 for exp_to"),
    # A value outside its Literal would fall through to the last branch of some `if`.
    (lambda: untyped(config.ScheduleConfig, decay_shape="x"), r"schedule\.decay_shape: found 'x'"),
    (lambda: untyped(config.OptimConfig, decay_coupling="x"), r"optim\.decay_coupling: found 'x'"),
    (lambda: untyped(config.MoEConfig, aux_counts="x"), r"moe\.aux_counts: found 'x'"),
    (lambda: untyped(config.DataConfig, packing="x"), r"data\.packing: found 'x'"),
    (lambda: untyped(config.QuantConfig, scale_dtype="x"), r"quant\.scale_dtype: found 'x'"),
    (lambda: untyped(config.QuantConfig, act_bits=4), r"quant\.act_bits: found 4.*\(8, None\)"),
    (lambda: config.DataConfig(prefetch=-1), r"data\.prefetch: found -1"),
    (lambda: config.OptimConfig(eps=math.nan), r"optim\.eps: found nan"),
    (lambda: zoo.nano(scale_emb=-1.0), r"model\.scale_emb: found -1\.0"),
    (lambda: config.MoEConfig(aux_loss_weight=math.nan), r"moe\.aux_loss_weight: found nan"),
    (lambda: config.OptimConfig(b2=1.0), r"optim\.b2: found 1\.0"),
    (lambda: config.OptimConfig(clip_norm=-1.0), r"optim\.clip_norm"),
    (lambda: config.PhaseConfig(weights=()), r"phase\.weights"),
    (lambda: config.PhaseConfig(weights=(("a", 0.0),)), "a positive sum"),
    (
      lambda: config.DataConfig(phases=(config.PhaseConfig(weights=(("a", 1.0),)),)),
      r"phases\[stable\]\.weights: found 'a'",
    ),
    (lambda: config.DataConfig(seq_len=100, align=64), r"data\.seq_len: found 100"),
    (lambda: config.SamplingConfig(top_p=0.0), r"sampling\.top_p: found 0\.0"),
    (lambda: config.SamplingConfig(min_p=1.1), r"sampling\.min_p: found 1\.1"),
    (lambda: config.SamplingConfig(temperature=float("inf")), r"sampling\.temperature: found inf"),
    (lambda: config.SamplingConfig(repetition_penalty=float("inf")), "sampling.repetition_penalty"),
    (lambda: config.SamplingConfig(seed=2**63), "sampling.seed: found 9223372036854775808"),
    (lambda: config.CheckpointConfig(keep_last=0), r"checkpoint\.keep_last: found 0"),
    (lambda: config.TrainConfig(model=zoo.nano(), grad_accum=3), "grad_accum: found 3.*divisor"),
    (
      lambda: config.TrainConfig(model=zoo.nano(), init_from="a", branch_from="b"),
      "only one of init_from and branch_from",
    ),
    (lambda: config.TrainConfig(model=zoo.nano(), eval_sources=("x",)), "eval_sources: found 'x'"),
  ],
)
def test_bad_values_are_refused_with_field_found_and_expected(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_derived_values_are_the_formulas():
  cfg = zoo.minicpm_2b()
  assert cfg.residual_scale == 1.4 / math.sqrt(40)
  assert cfg.width_ratio == cfg.logit_divisor == 9
  assert cfg.padded_vocab_size == 122753
  assert dataclasses.replace(cfg, vocab_multiple=128).padded_vocab_size == 122880
  llama = zoo.minicpm5_1b()
  assert (llama.residual_scale, llama.width_ratio, llama.logit_divisor) == (1.0, 1.0, 1.0)
  latent = zoo.minicpm3_4b()
  assert (latent.rotary_dim, latent.v_head_dim, latent.head_dim) == (32, 64, 96)
  schedule = config.ScheduleConfig(warmup_steps=1, stable_steps=2, decay_steps=4)
  assert (schedule.total_steps, schedule.decay_start) == (7, 3)


def test_sparse_config_round_trips_in_its_released_form():
  released = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
  }
  parsed = config.SparseAttentionConfig.from_hf(released, lse="exact")
  assert parsed == config.SparseAttentionConfig() and parsed.to_hf() == released


def test_configs_are_frozen_and_hashable():
  cfg = zoo.minicpm4_8b()
  with pytest.raises(dataclasses.FrozenInstanceError):
    cfg.num_layers = 3
  assert hash(cfg) == hash(zoo.minicpm4_8b()) and cfg == zoo.minicpm4_8b()
