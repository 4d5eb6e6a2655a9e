"""Small GGUF files for the tests: random weights in Hugging Face names."""

import math

import gguf
import numpy as np

D, F, N, K, H, L, V = 64, 96, 4, 2, 16, 2, 40  # widths are multiples of 32, the quantiser's block
MUP = {"embedding_scale": 12.0, "residual_scale": 1.4 / math.sqrt(L), "logit_scale": D / 16}
TYPES = {
  "f32": gguf.GGMLQuantizationType.F32,
  "f16": gguf.GGMLQuantizationType.F16,
  "bf16": gguf.GGMLQuantizationType.BF16,
  "q8_0": gguf.GGMLQuantizationType.Q8_0,
  "q4_0": gguf.GGMLQuantizationType.Q4_0,
  "q4_1": gguf.GGMLQuantizationType.Q4_1,
}


def random_weights(seed=0, *, tied=True, experts=0) -> dict[str, np.ndarray]:
  """Hugging Face names and [out, in] layout (half-split RoPE rows)."""
  rng = np.random.default_rng(seed)

  def matrix(*shape):
    return rng.normal(0, 0.15, shape).astype(np.float32)

  weights = {"model.embed_tokens.weight": matrix(V, D), "model.norm.weight": 1 + matrix(D)}
  if not tied:
    weights["lm_head.weight"] = matrix(V, D)
  for i in range(L):
    p = f"model.layers.{i}."
    for name in ("input_layernorm", "post_attention_layernorm"):
      weights[p + name + ".weight"] = 1 + matrix(D)
    shapes = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
    for name, shape in shapes.items():
      weights[f"{p}self_attn.{name}_proj.weight"] = matrix(*shape)
    if experts:
      weights[p + "block_sparse_moe.gate.weight"] = matrix(experts, D)
      for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
        weights[f"{p}experts.{name}"] = matrix(experts, *shape)
    else:
      for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        weights[f"{p}mlp.{name}_proj.weight"] = matrix(*shape)
  return weights


NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "block_sparse_moe.gate": "ffn_gate_inp",
  "experts.w1": "ffn_gate_exps",
  "experts.w3": "ffn_up_exps",
  "experts.w2": "ffn_down_exps",
}


def gguf_name(name: str) -> str:
  name = name.removesuffix(".weight")
  if not name.startswith("model.layers."):
    return NAMES[name] + ".weight"
  layer, rest = name.removeprefix("model.layers.").split(".", 1)
  return f"blk.{layer}.{NAMES[rest]}.weight"


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
  """Row j of a head's first half goes to 2j, of its second half to 2j + 1."""
  out, half = np.empty_like(w), w.shape[0] // heads // 2
  for head in range(heads):
    for j in range(half):
      base = head * 2 * half
      out[base + 2 * j] = w[base + j]
      out[base + 2 * j + 1] = w[base + half + j]
  return out


def stored(weights, kind: str) -> dict[str, tuple[np.ndarray, object]]:
  """GGUF name -> (stored bytes or floats, quantisation type); vectors stay float32."""
  result = {}
  for name, w in weights.items():
    if "q_proj" in name:
      w = interleave(w, N)
    elif "k_proj" in name:
      w = interleave(w, K)
    qtype = TYPES["f32"] if w.ndim == 1 else TYPES[kind]
    result[gguf_name(name)] = (gguf.quantize(w, qtype), qtype)
  return result


def write(path, tensors, *, arch="llama", keys=(), vocab=None, drop=()):
  """A small file; `keys` override or add `<arch>.` metadata, `drop` leaves such keys out."""
  writer = gguf.GGUFWriter(path, arch)
  metadata = {
    "block_count": L,
    "context_length": 64,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": K,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": H,
    "rope.freq_base": 10000.0,
    **(MUP if arch == "minicpm" else {}),
    **dict(keys),
  }
  for key, value in metadata.items():
    if key not in drop:
      add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
      add[type(value)](f"{arch}.{key}", value)
  (vocab or small_vocab)(writer)
  for name, (data, qtype) in tensors.items():
    writer.add_tensor(name, data, raw_dtype=qtype)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def small_vocab(writer):
  writer.add_tokenizer_model("none")
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)


# Text for comparing tokenizers.
STRINGS = [
  "Hello, world! 12",
  "  two  spaces\t\ttabs\n\n\nnewlines \n",
  "Digits 12345, 3.14 and ١٢٣",
  "naïve café, 你好，世界。MiniCPM",
  "emoji 😀👩‍👩‍👧",
  "def f(x):\n    return {'a': x[0]}  # code\r\n",
  "it's I'll WE'RE",
  "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
  "",
]
