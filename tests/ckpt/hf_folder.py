"""Random Hugging Face folders for tests, written with the safetensors package.

Names and shapes are spelled out here from models.md 7, independently of ckpt/hf_names.py.
"""

import json

import ml_dtypes
import numpy as np
from safetensors import numpy as st

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

MINICPM = {
  "architectures": ["MiniCPMForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 32,
  "initializer_range": 0.1,
  "intermediate_size": 48,
  "max_position_embeddings": 64,
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "torch_dtype": "float32",
  "vocab_size": 99,
  "scale_emb": 12,
  "dim_model_base": 16,
  "scale_depth": 1.4,
}
UNTIED = MINICPM | {"tie_word_embeddings": False}
MOE = MINICPM | {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA = {k: v for k, v in MINICPM.items() if k not in ("scale_emb", "scale_depth")}
LLAMA = {k: v for k, v in LLAMA.items() if k != "dim_model_base"} | {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "head_dim": 16,
}
MLA = MINICPM | {
  "architectures": ["MiniCPM3ForCausalLM"],
  "model_type": "minicpm3",
  "num_key_value_heads": 4,
  "q_lora_rank": 12,
  "kv_lora_rank": 8,
  "qk_nope_head_dim": 6,
  "qk_rope_head_dim": 4,
}
LONGROPE = {
  "rope_type": "longrope",
  "long_factor": [1.0, 1.5, 2.25, 3.5],
  "short_factor": [1.0, 1.25, 1.5, 2.0],
  "original_max_position_embeddings": 32,
}
ALL = {"tied": MINICPM, "untied": UNTIED, "moe": MOE, "llama": LLAMA, "mla": MLA}


def shapes(hf):
  """HF tensor name -> shape."""
  D, F, V = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
  N = hf["num_attention_heads"]
  K = hf.get("num_key_value_heads") or N
  H = hf.get("head_dim") or D // N
  arch = hf["architectures"][0]
  found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  if not hf.get("tie_word_embeddings", arch != "LlamaForCausalLM"):
    found["lm_head.weight"] = (V, D)
  for i in range(hf["num_hidden_layers"]):
    p = f"model.layers.{i}."
    found[p + "input_layernorm.weight"] = (D,)
    found[p + "post_attention_layernorm.weight"] = (D,)
    if arch == "MiniCPM3ForCausalLM":
      Rq, Rkv = hf["q_lora_rank"], hf["kv_lora_rank"]
      nope, rope = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
      found[p + "self_attn.q_a_proj.weight"] = (Rq, D)
      found[p + "self_attn.q_a_layernorm.weight"] = (Rq,)
      found[p + "self_attn.q_b_proj.weight"] = (N * (nope + rope), Rq)
      found[p + "self_attn.kv_a_proj_with_mqa.weight"] = (Rkv + rope, D)
      found[p + "self_attn.kv_a_layernorm.weight"] = (Rkv,)
      found[p + "self_attn.kv_b_proj.weight"] = (N * (nope + D // N), Rkv)
      found[p + "self_attn.o_proj.weight"] = (D, N * (D // N))
    else:
      found[p + "self_attn.q_proj.weight"] = (N * H, D)
      found[p + "self_attn.k_proj.weight"] = (K * H, D)
      found[p + "self_attn.v_proj.weight"] = (K * H, D)
      found[p + "self_attn.o_proj.weight"] = (D, N * H)
    if hf.get("num_experts"):
      found[p + "mlp.gate.weight"] = (hf["num_experts"], D)
      for e in range(hf["num_experts"]):
        found[p + f"mlp.experts.{e}.w1.weight"] = (F, D)
        found[p + f"mlp.experts.{e}.w2.weight"] = (D, F)
        found[p + f"mlp.experts.{e}.w3.weight"] = (F, D)
    else:
      found[p + "mlp.gate_proj.weight"] = (F, D)
      found[p + "mlp.up_proj.weight"] = (F, D)
      found[p + "mlp.down_proj.weight"] = (D, F)
  return found


def tensors(hf, seed=0, std=0.1):
  rng = np.random.default_rng(seed)
  dtype = DTYPES[hf.get("torch_dtype", "float32")]
  return {
    name: (rng.normal(size=shape) * std + (len(shape) == 1)).astype(np.float32).astype(dtype)
    for name, shape in shapes(hf).items()
  }


def write(folder, hf, weights, num_shards=1):
  """A folder as released; with several shards, tensors are dealt out in turn."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf))
  if num_shards == 1:
    st.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  weight_map = {}
  for k in range(num_shards):
    file = f"model-{k + 1:05d}-of-{num_shards:05d}.safetensors"
    part = {n: weights[n] for n in list(weights)[k::num_shards]}
    st.save_file(part, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  total = sum(x.nbytes for x in weights.values())
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def read(folder):
  """All tensors of a folder, by the safetensors package."""
  found = {}
  for file in sorted(folder.glob("*.safetensors")):
    part = st.load_file(file)
    assert not set(part) & set(found)
    found |= part
  return found


def same_bits(a, b):
  assert a.dtype == b.dtype and a.shape == b.shape
  return a.tobytes() == b.tobytes()
