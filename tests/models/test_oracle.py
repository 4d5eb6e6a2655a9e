"""Logits of the whole model against transformers on torch, float32 (models.md 1)."""

import jax
import numpy as np
import pytest

from minicpm_jax.models import convert
from tests.models import common

pytestmark = pytest.mark.oracle


def hf_weights(cfg, params):
  """Our stacked tree under Hugging Face's names, [out, in]: a second, minimal mapping."""
  layers = params["layers"]
  names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "q_a": "q_a_proj", "q_b": "q_b_proj"}
  names |= {"kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj"}
  norms = {"q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm"}
  out = {"model.embed_tokens.weight": params["embed"]["embedding"]}
  out["model.norm.weight"] = params["final_norm"]["scale"]
  head = params["embed"]["embedding"]
  out["lm_head.weight"] = head if cfg.tie_embeddings else params["lm_head"]["kernel"].T
  for i in range(cfg.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), layers)
    pre = f"model.layers.{i}."
    out[pre + "input_layernorm.weight"] = layer["attn_norm"]["scale"]
    out[pre + "post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
    for ours, leaf in layer["attn"].items():
      if ours in norms:
        out[f"{pre}self_attn.{norms[ours]}.weight"] = leaf["scale"]
      elif ours == "o":
        out[pre + "self_attn.o_proj.weight"] = leaf["kernel"].reshape(-1, cfg.model_dim).T
      else:
        kernel = leaf["kernel"].reshape(leaf["kernel"].shape[0], -1)
        out[f"{pre}self_attn.{names[ours]}.weight"] = kernel.T
    if "mlp" in layer:
      for ours in ("gate", "up", "down"):
        out[f"{pre}mlp.{ours}_proj.weight"] = layer["mlp"][ours]["kernel"].T
  return out


def expert_weights(params, pre, router):
  """Fused expert tensors as transformers 5 holds them: [E, 2F, D] (gate first) and [E, D, F]."""
  out = {}
  for i in range(params["layers"]["moe"]["router"]["kernel"].shape[0]):
    moe = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["layers"]["moe"])
    gate_up = np.concatenate((moe["gate"]["kernel"], moe["up"]["kernel"]), axis=2)
    name = f"model.layers.{i}.{pre}."
    out[name + router] = moe["router"]["kernel"].T
    out[name + "experts.gate_up_proj"] = gate_up.transpose(0, 2, 1)
    out[name + "experts.down_proj"] = moe["down"]["kernel"].transpose(0, 2, 1)
  return out


def torch_logits(model, weights, tokens_BT):
  import torch

  state = {name: torch.tensor(np.array(leaf)) for name, leaf in weights.items()}
  model.load_state_dict(state, strict=True)
  with torch.no_grad():
    return model.eval()(torch.tensor(np.asarray(tokens_BT)).long()).logits.numpy()


def base_kwargs(cfg):
  rope = {"rope_type": "default", "rope_theta": cfg.rope.theta}
  if cfg.rope.kind in ("linear", "dynamic"):
    rope |= {"rope_type": cfg.rope.kind, "factor": cfg.rope.factor}
  if cfg.rope.kind == "longrope":
    rope |= {
      "rope_type": "longrope",
      "short_factor": list(cfg.rope.short_factor),
      "long_factor": list(cfg.rope.long_factor),
      "original_max_position_embeddings": cfg.rope.original_max_position,
    }
  return {
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.model_dim,
    "intermediate_size": cfg.mlp_dim,
    "num_hidden_layers": cfg.num_layers,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.num_kv_heads,
    "max_position_embeddings": cfg.max_position,
    "rms_norm_eps": cfg.norm_eps,
    "tie_word_embeddings": cfg.tie_embeddings,
    "rope_parameters": rope,
    "attn_implementation": "eager",
  }


def granite_kwargs(cfg):
  return base_kwargs(cfg) | {
    "embedding_multiplier": cfg.scale_emb,
    "residual_multiplier": cfg.scale_depth / cfg.num_layers**0.5,
    "logits_scaling": cfg.model_dim / cfg.dim_model_base,
    "attention_multiplier": cfg.head_dim**-0.5,
  }


@pytest.mark.parametrize(
  "name, changes",
  [
    ("minicpm4_0p5b", {}),
    ("minicpm4_8b", {"rope": "linear"}),
    ("minicpm_2b_128k", {"rope": "dynamic", "max_position": 16}),
    ("minicpm4_8b", {"rope": "longrope", "max_position": 12}),
    ("minicpm4_8b", {"rope": "longrope", "max_position": 48}),
  ],
  ids=["tied", "untied-linear", "dynamic-beyond", "longrope-beyond", "longrope-m"],
)
def test_dense_equals_granite(name, changes):
  transformers = pytest.importorskip("transformers")
  cfg = common.config(name, **changes)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  oracle = transformers.GraniteForCausalLM(transformers.GraniteConfig(**granite_kwargs(cfg)))
  expected = torch_logits(oracle, hf_weights(cfg, params), tokens_BT)
  found = common.apply(model, params, tokens_BT).logits
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_experts_equal_granite_moe():
  transformers = pytest.importorskip("transformers")
  cfg = common.config("minicpm_moe_8x2b")
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  kwargs = granite_kwargs(cfg) | {"num_local_experts": 4, "num_experts_per_tok": 2}
  oracle = transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**kwargs))
  weights = hf_weights(cfg, params) | expert_weights(params, "block_sparse_moe", "router.weight")
  expected = torch_logits(oracle, weights, tokens_BT)
  found = common.apply(model, params, tokens_BT).logits
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["minicpm_2b", "minicpm5_1b"])
def test_folded_weights_equal_llama(name):
  transformers = pytest.importorskip("transformers")
  cfg = common.config(name, head_dim=16)
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  folded_cfg, folded = convert.fold_to_llama(cfg, params)
  config = transformers.LlamaConfig(**base_kwargs(folded_cfg), head_dim=16)
  weights = hf_weights(folded_cfg, folded)
  expected = torch_logits(transformers.LlamaForCausalLM(config), weights, tokens_BT)
  found = common.apply(model, params, tokens_BT).logits
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_folded_experts_equal_mixtral():
  transformers = pytest.importorskip("transformers")
  cfg = common.config("minicpm_moe_8x2b")
  model, params = common.build(cfg)
  tokens_BT = common.tokens((2, 24))
  folded_cfg, folded = convert.fold_to_llama(cfg, params)
  config = transformers.MixtralConfig(
    **base_kwargs(folded_cfg), num_local_experts=4, num_experts_per_tok=2, sliding_window=None
  )
  weights = hf_weights(folded_cfg, folded) | expert_weights(folded, "mlp", "gate.weight")
  expected = torch_logits(transformers.MixtralForCausalLM(config), weights, tokens_BT)
  found = common.apply(model, params, tokens_BT).logits
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("latent_scale", [1.0, 1e-3], ids=["unit", "small-latents"])
def test_latent_attention_equals_minicpm3(latent_scale):
  """Small latents make the norm's eps count: 1e-6, whatever rms_norm_eps says."""
  transformers = pytest.importorskip("transformers")
  cfg = common.config("minicpm3_4b", rope="longrope", max_position=12, norm_eps=1e-3)
  model, params = common.build(cfg)
  for name in ("q_a", "kv_a"):
    kernel = params["layers"]["attn"][name]["kernel"]
    params["layers"]["attn"][name]["kernel"] = kernel * latent_scale
  tokens_BT = common.tokens((2, 24))
  config = transformers.MiniCPM3Config(
    **base_kwargs(cfg),
    q_lora_rank=cfg.mla.q_lora_rank,
    kv_lora_rank=cfg.mla.kv_lora_rank,
    qk_nope_head_dim=cfg.mla.qk_nope_head_dim,
    qk_rope_head_dim=cfg.mla.qk_rope_head_dim,
    v_head_dim=cfg.mla.v_head_dim,
    scale_emb=cfg.scale_emb,
    scale_depth=cfg.scale_depth,
    dim_model_base=cfg.dim_model_base,
  )
  weights = hf_weights(cfg, params)
  expected = torch_logits(transformers.MiniCPM3ForCausalLM(config), weights, tokens_BT)
  found = common.apply(model, params, tokens_BT).logits
  np.testing.assert_allclose(found, expected, atol=1e-4)
