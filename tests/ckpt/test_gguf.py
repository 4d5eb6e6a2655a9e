"""GGUF: synthetic files against transformers and the quantiser; the real 135M model."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.ckpt import errors, gguf_io
from minicpm_jax.config import MeshConfig
from minicpm_jax.core import fetch, mesh, trees
from minicpm_jax.text import chat, tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")

D, F, N, K, H, L, V = 64, 96, 4, 2, 16, 2, 40  # widths are multiples of 32, the quantiser's block
TOKENS = np.array([[1, 5, 9, 2, 33, 7, 7, 20]], np.int32)
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


def logits(model, params) -> np.ndarray:
  with jax.default_matmul_precision("highest"):
    return np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)).logits)


def torch_logits(weights, *, arch, experts=0, **config) -> np.ndarray:
  """Llama, Mixtral or Granite of transformers on the same float32 weights (environment.md 10)."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(1)  # spinning threads cost more than they bring at this size
  tied = "lm_head.weight" not in weights
  common = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": tied,
    **config,
  }
  names = {"llama": "Llama", "minicpm": "Granite", "mixtral": "Mixtral"}
  if arch == "minicpm":
    common |= {
      "embedding_multiplier": 12.0,
      "residual_multiplier": MUP["residual_scale"],
      "logits_scaling": MUP["logit_scale"],
      "attention_multiplier": H**-0.5,
    }
  cfg = getattr(transformers, names[arch] + "Config")(**common)
  model = getattr(transformers, names[arch] + "ForCausalLM")(cfg).eval()
  state = {name: torch.from_numpy(w) for name, w in weights.items()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}
  if tied:
    model.tie_weights()
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits.numpy()


# ------------------------------------------------------------------------------ the network


@pytest.mark.oracle
@pytest.mark.parametrize("arch", ["llama", "minicpm"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_transformers(tmp_path, arch, tied):
  weights = random_weights(tied=tied)
  path = write(tmp_path / "m.gguf", stored(weights, "f32"), arch=arch)
  model, params, tok = gguf_io.load_gguf(path)
  assert tok is None
  assert model.cfg.tie_embeddings == tied
  np.testing.assert_allclose(
    logits(model, params), torch_logits(weights, arch=arch), atol=1e-4, rtol=0
  )


@pytest.mark.smoke
@pytest.mark.parametrize("kind", TYPES)
def test_parameters_of_every_type(tmp_path, kind):
  """Leaves equal the dequantised file, un-permuted and transposed by the equations here."""
  weights = random_weights(tied=False)
  tensors = stored(weights, kind)
  _, params, _ = gguf_io.load_gguf(write(tmp_path / "m.gguf", tensors))
  dense = {n: gguf.dequantize(*pair) for n, pair in tensors.items()}
  leaves = {p: np.asarray(x) for p, x in trees.flatten_paths(params).items()}
  np.testing.assert_array_equal(leaves["embed/embedding"], dense["token_embd.weight"])
  np.testing.assert_array_equal(leaves["lm_head/kernel"], dense["output.weight"].T)
  np.testing.assert_array_equal(leaves["final_norm/scale"], dense["output_norm.weight"])
  for i in range(L):
    layer = {p.removeprefix("layers/"): x[i] for p, x in leaves.items() if p.startswith("layers/")}
    for head in range(K):
      for j in range(H):  # channel j of the half-split head: row 2j, or 2(j - H/2) + 1
        row = head * H + (2 * j if j < H // 2 else 2 * (j - H // 2) + 1)
        np.testing.assert_array_equal(
          layer["attn/k/kernel"][:, head, j], dense[f"blk.{i}.attn_k.weight"][row]
        )
        np.testing.assert_array_equal(
          layer["attn/v/kernel"][:, head, j], dense[f"blk.{i}.attn_v.weight"][head * H + j]
        )
    np.testing.assert_array_equal(
      layer["attn/o/kernel"].reshape(N * H, D), dense[f"blk.{i}.attn_output.weight"].T
    )
    for ours, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
      np.testing.assert_array_equal(
        layer[f"mlp/{ours}/kernel"], dense[f"blk.{i}.ffn_{theirs}.weight"].T
      )
    np.testing.assert_array_equal(layer["attn_norm/scale"], dense[f"blk.{i}.attn_norm.weight"])
    np.testing.assert_array_equal(layer["mlp_norm/scale"], dense[f"blk.{i}.ffn_norm.weight"])
  error = np.abs(leaves["embed/embedding"] - weights["model.embed_tokens.weight"]).max()
  assert error <= {"f32": 0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 5e-3}.get(kind, 0.1)


def test_unrolled_and_sharded_equal_stacked(tmp_path):
  path = write(tmp_path / "m.gguf", stored(random_weights(), "f32"), arch="minicpm")
  model, params, _ = gguf_io.load_gguf(path)
  expected = logits(model, params)
  unrolled, layers, _ = gguf_io.load_gguf(path, scan_layers=False)
  assert "layers_1" in layers
  np.testing.assert_allclose(logits(unrolled, layers), expected, atol=1e-5)
  devices = mesh.make_mesh(MeshConfig(fsdp=2, tp=2), jax.devices()[:4])
  _, sharded, _ = gguf_io.load_gguf(path, mesh=devices)
  assert sharded["layers"]["attn"]["q"]["kernel"].sharding.num_devices == 4
  assert not sharded["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
  jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_dtype(tmp_path):
  path = write(tmp_path / "m.gguf", stored(random_weights(), "q8_0"))
  model, params, _ = gguf_io.load_gguf(path, dtype="bf16")
  assert model.cfg.dtype == model.cfg.param_dtype == "bf16"
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.oracle
def test_experts(tmp_path):
  """Mixtral on the same weights: softmax over all, top 2, renormalised (models.md 4)."""
  weights = random_weights(experts=4, tied=False)
  keys = {"expert_count": 4, "expert_used_count": 2}
  path = write(tmp_path / "m.gguf", stored(weights, "f32"), keys=keys)
  model, params, _ = gguf_io.load_gguf(path)
  assert (model.cfg.moe.num_experts, model.cfg.moe.experts_per_token) == (4, 2)
  theirs = {n: w for n, w in weights.items() if ".experts." not in n and "sparse_moe" not in n}
  for i in range(L):
    p = f"model.layers.{i}."
    w1, w2, w3 = (weights[f"{p}experts.{n}"] for n in ("w1", "w2", "w3"))
    theirs[p + "mlp.gate.weight"] = weights[p + "block_sparse_moe.gate.weight"]
    theirs[p + "mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
    theirs[p + "mlp.experts.down_proj"] = w2
  expected = torch_logits(
    theirs,
    arch="mixtral",
    num_local_experts=4,
    num_experts_per_tok=2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
  )
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4, rtol=0)


@pytest.mark.oracle
def test_longrope(tmp_path):
  tensors = stored(random_weights(), "f32")
  weights = random_weights()
  factors = np.linspace(1, 3, H // 2).astype(np.float32)
  for name in ("long", "short"):
    tensors[f"rope_factors_{name}.weight"] = (factors, TYPES["f32"])
  path = write(tmp_path / "m.gguf", tensors, arch="minicpm", keys={"rope.scaling.type": "longrope"})
  model, params, _ = gguf_io.load_gguf(path)
  assert model.cfg.rope.kind == "longrope"
  assert model.cfg.rope.original_max_position == 64  # the stock converter leaves it out: M = O
  rope = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": factors.tolist(),
    "short_factor": factors.tolist(),
    "original_max_position_embeddings": 64,
    "factor": 1.0,
  }
  expected = torch_logits(weights, arch="minicpm", rope_parameters=rope)
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4, rtol=0)


def test_longrope_attention_factor(tmp_path):
  """The stored m comes out of our factor rule again: m = sqrt(1 + ln(factor) / ln(O))."""
  tensors = stored(random_weights(), "f32")
  for name in ("long", "short"):
    tensors[f"rope_factors_{name}.weight"] = (np.ones(H // 2, np.float32), TYPES["f32"])
  keys = {
    "rope.scaling.type": "longrope",
    "rope.scaling.original_context_length": 32,
    "rope.scaling.attn_factor": 1.25,
  }
  model, _, _ = gguf_io.load_gguf(write(tmp_path / "m.gguf", tensors, arch="minicpm", keys=keys))
  factor = model.cfg.rope.factor
  assert math.isclose(math.sqrt(1 + math.log(factor) / math.log(32)), 1.25, rel_tol=1e-6)


# ------------------------------------------------------------------------------ the config


def test_minicpm_multipliers_are_read_exactly(tmp_path):
  path = write(tmp_path / "m.gguf", stored(random_weights(), "f32"), arch="minicpm")
  cfg = gguf_io.load_gguf(path)[0].cfg
  assert (cfg.arch, cfg.scale_emb, cfg.scale_depth, cfg.dim_model_base) == ("minicpm", 12, 1.4, 16)
  assert (cfg.norm_eps, cfg.rope.theta, cfg.stop_ids, cfg.bos_id) == (1e-5, 10000.0, (2,), 1)


def test_minicpm_without_logit_scale_is_refused_unless_told(tmp_path):
  path = write(
    tmp_path / "m.gguf", stored(random_weights(), "f32"), arch="minicpm", drop=["logit_scale"]
  )
  with pytest.raises(errors.CheckpointError, match="minicpm.logit_scale: found no such key"):
    gguf_io.load_gguf(path)
  assert gguf_io.load_gguf(path, logit_scale=4.0)[0].cfg.dim_model_base == 16


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  "keys, match",
  [
    ({"rope.scaling.type": "yarn"}, "rope.scaling.type: found 'yarn', expected none, linear"),
    ({"rope.scaling.type": "linear"}, "rope.factor"),
    ({"rope.dimension_count": 8, "attention.key_length": H}, "found .8, 16., expected both 16"),
    ({"vocab_size": V + 1}, f"vocab_size: found {V + 1}, expected {V}"),
    ({"block_count": L + 1}, f"blk.{L}.attn_norm.weight: found no such tensor"),
    ({"block_count": L - 1}, "tensors: found unexpected blk.1.attn_k.weight"),
    ({"feed_forward_length": 128}, r"blk.0.ffn_gate.weight: found shape \(96, 64\), expected"),
    ({"attention.head_count": 0}, "attention.head_count: found 0, expected an integer > 0"),
  ],
)
def test_mismatched_metadata(tmp_path, keys, match):
  path = write(tmp_path / "m.gguf", stored(random_weights(), "f32"), keys=keys)
  with pytest.raises(ValueError, match=match):
    gguf_io.load_gguf(path)


def test_bias_is_refused(tmp_path):
  tensors = stored(random_weights(), "f32")
  tensors["blk.0.attn_q.bias"] = (np.zeros(N * H, np.float32), TYPES["f32"])
  with pytest.raises(errors.CheckpointError, match="unexpected blk.0.attn_q.bias"):
    gguf_io.load_gguf(write(tmp_path / "m.gguf", tensors))


def test_other_architecture(tmp_path):
  path = write(tmp_path / "m.gguf", stored(random_weights(), "f32"), arch="minicpm3")
  with pytest.raises(errors.CheckpointError, match="architecture: found 'minicpm3', expected one"):
    gguf_io.load_gguf(path)


def test_integer_tensor_is_refused(tmp_path):
  tensors = stored(random_weights(), "f32")
  tensors["output_norm.weight"] = (np.ones(D, np.int32), gguf.GGMLQuantizationType.I32)
  with pytest.raises(errors.CheckpointError, match="output_norm.weight: found type I32"):
    gguf_io.load_gguf(write(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize("keep", [2, 20, 400, 5000, -1])
def test_truncated_file(tmp_path, keep):
  path = write(tmp_path / "m.gguf", stored(random_weights(), "q4_0"))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(errors.CheckpointError, match="m.gguf: (damaged or truncated|found first)"):
    gguf_io.load_gguf(path)


def test_no_file_and_no_gguf(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no such file"):
    gguf_io.load_gguf(tmp_path / "nothing.gguf")
  (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 10)
  with pytest.raises(errors.CheckpointError, match="expected b'GGUF'"):
    gguf_io.load_gguf(tmp_path / "x.gguf")


# ------------------------------------------------------------------------------- tokenizers

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


def write_vocab(path, num_tokens, vocab, drop=()):
  """A one-block file of width 32 whose embedding has a row for each token."""
  rng = np.random.default_rng(0)
  shapes = {
    "token_embd": (num_tokens, 32),
    "output_norm": (32,),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
    **{f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")},
    **{f"blk.0.ffn_{n}": (32, 32) for n in ("gate", "up", "down")},
  }
  tensors = {
    f"{n}.weight": (rng.normal(size=s).astype(np.float32), TYPES["f32"]) for n, s in shapes.items()
  }
  keys = {
    "block_count": 1,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
  }
  return write(path, tensors, keys=keys, vocab=vocab, drop=drop)


def add_bpe(writer, *, tokens, types, merges, pre):
  writer.add_tokenizer_model("gpt2")
  if pre is not None:
    writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_token_merges(merges)


def test_sentencepiece_inside_gives_the_reference_ids(tmp_path, shared_dir):
  """The released MiniCPM4 model file, written as llama.cpp's converter writes it."""
  folder = shared_dir / "models/minicpm4-0.5b-tokenizer"
  expected = tokenizer.load_tokenizer(folder)
  processor = expected.processor
  size = processor.get_piece_size()
  kinds = [
    6 if processor.is_byte(i) else 3 if processor.is_control(i) else 2 if i == 0 else 1
    for i in range(size)
  ]
  names = [processor.id_to_piece(i) for i in range(size)]
  user_defined = {"\n", "\t", "<SEP>", "<CLS>", "!", ".", "+", "-", "=", "?", "...", "```", "---"}
  kinds = [4 if n in user_defined else k for n, k in zip(names, kinds, strict=True)]
  added = sorted(expected.added_tokens.items(), key=lambda item: item[1])[3:]

  def vocab(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*names, *(t for t, _ in added)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)] + [-1000.0] * len(added))
    writer.add_token_types([*kinds, *[3] * len(added)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(73440)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("T")

  _, _, tok = gguf_io.load_gguf(write_vocab(tmp_path / "m.gguf", 73448, vocab))
  for text in STRINGS:
    assert tok.encode(text) == expected.encode(text), text
    assert tok.decode(tok.encode(text)) == expected.decode(expected.encode(text))
  assert tok.encode("hi", add_bos=True) == [1, 6920]
  assert (tok.bos_id, tok.eos_id, tok.stop_ids, tok.add_bos) == (1, 73440, (73440, 2), True)
  assert tok.chat_template == "T"
  tok.save(tmp_path / "saved")
  assert tokenizer.load_tokenizer(tmp_path / "saved").encode(STRINGS[7]) == tok.encode(STRINGS[7])


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "default", None])
def test_byte_level_bpe_inside(tmp_path, shared_dir, pre):
  spec = json.loads((shared_dir / "models/smollm2-135m-instruct/tokenizer.json").read_text())
  merges = [tuple(m) for m in spec["model"]["merges"]][:600]
  base = sorted(c for c in spec["model"]["vocab"] if len(c) == 1)
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokens = list(dict.fromkeys([*special, *base, *("".join(m) for m in merges)]))

  def vocab(writer):
    types = [3] * 3 + [1] * (len(tokens) - 3)
    add_bpe(writer, tokens=tokens, types=types, merges=[" ".join(m) for m in merges], pre=pre)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

  _, _, tok = gguf_io.load_gguf(write_vocab(tmp_path / "m.gguf", len(tokens), vocab))
  expected = {  # by llama.cpp's list of regular expressions for each kind
    "smollm": [*["I", "'ll", " pay", " "], *"12345", " $$(", "5", ").", "\n\n", " ok"],
    "gpt-2": ["I", "'ll", " pay", " 12345", " $$(", "5", ").", "\n\n", " ok"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", " $$(", "5", ").\n\n", " ok"],
    "default": ["I", "'", "ll", " pay", " ", "123", "45", " ", "$$(", "5", ").", "\n\n", " ok"],
  }
  split = tok.backend.pre_tokenizer.pre_tokenize_str("I'll pay 12345 $$(5).\n\n ok")
  found = [tok.decode_bytes([tok.backend.token_to_id(c) for c in p]).decode() for p, _ in split]
  assert found == expected["default" if pre is None else pre]
  assert tok.stop_ids == (2, 0)
  assert tok.add_bos == (pre == "llama-bpe")


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"pre": "tekken"}, "tokenizer.ggml.pre: found 'tekken', expected one of"),
    ({"types": [1]}, "token_type: found 1 entries, expected 3"),
    ({"tokens": ["a", "b", "a"]}, "'a' stands there twice"),
    ({"merges": ["a c"]}, "tokenizer.ggml.merges: "),
    ({"tokens": ["a", "b", "ab", "c"], "types": [1] * 4}, "number of tokens: found 4, expected 3"),
    ({"eos": 7}, "eos_token_id: found 7, expected < 3"),
  ],
)
def test_bad_vocabulary(tmp_path, changes, match):
  eos = changes.pop("eos", 1)
  fields = {"tokens": ["a", "b", "ab"], "types": [1, 1, 1], "merges": ["a b"], "pre": "gpt-2"}

  def vocab(writer):
    add_bpe(writer, **(fields | changes))
    writer.add_eos_token_id(eos)

  with pytest.raises(errors.CheckpointError, match=match):
    gguf_io.load_gguf(write_vocab(tmp_path / "m.gguf", 3, vocab))


def test_other_vocabulary_kind(tmp_path):
  path = write_vocab(tmp_path / "m.gguf", 3, lambda writer: writer.add_tokenizer_model("t5"))
  with pytest.raises(errors.CheckpointError, match="ggml.model: found 't5', expected one of"):
    gguf_io.load_gguf(path)


# ---------------------------------------------------------------------- the real 135M model


@pytest.fixture(scope="module")
def smollm():
  path = fetch.cached()
  if path is None:
    pytest.skip(f"the 135M model is not in {fetch.cache_dir()}: run `{fetch.COMMAND}`")
  return gguf_io.load_gguf(path, scan_layers=False)


PROMPT = [
  {
    "role": "system",
    "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
  },
  {"role": "user", "content": "What is the capital of France? Answer in one sentence."},
]


def padded_logits(model):
  """One compiled forward of 64 tokens; rows are padded on the right, which causality hides."""
  forward = jax.jit(lambda params, x: model.apply({"params": params}, x).logits[0])

  def run(params, ids):
    row = np.zeros((1, 64), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(forward(params, row))[len(ids) - 1]

  return run


def test_real_model_log_probabilities_and_greedy_text(smollm):
  """The values of shared/models/smollm2-135m-instruct/README.md."""
  model, params, tok = smollm
  ids = chat.encode_chat(PROMPT, tok)
  assert len(ids) == 42
  run = padded_logits(model)
  first = run(params, ids).astype(np.float64)
  logprobs = np.sort(first - np.log(np.exp(first - first.max()).sum()) - first.max())[::-1]
  np.testing.assert_allclose(logprobs[:5], [-0.6014, -2.0829, -3.3161, -3.4189, -3.4273], atol=1e-4)
  answer = []
  while len(answer) < 20 and (not answer or answer[-1] not in tok.stop_ids):
    answer.append(int(np.argmax(run(params, ids + answer))))
  text = tok.decode(answer, skip_special=False)
  assert text == "The capital of France is Paris.<|im_end|>"


def test_real_model_config_and_tokenizer(smollm, shared_dir):
  model, params, tok = smollm
  assert trees.num_params(params) == 134_515_008
  assert model.cfg.arch == "llama" and model.cfg.rope.theta == 1e5
  assert (tok.eos_id, tok.pad_id, tok.stop_ids, tok.add_bos) == (2, 2, (2, 0), False)
  folder = shared_dir / "models/smollm2-135m-instruct"
  released = tokenizer.load_tokenizer(folder)
  assert tok.chat_template == (folder / "chat_template.jinja").read_text()
  ours, theirs = (json.loads(t.backend.to_str()) for t in (tok, released))
  assert ours["model"] == theirs["model"]
  assert ours["added_tokens"] == theirs["added_tokens"]
  specs = (folder.parents[1] / "specs").glob("*.md")
  for text in [*STRINGS, *(path.read_text()[:20000] for path in specs)]:
    assert tok.encode(text) == released.encode(text)


@pytest.mark.slow
@pytest.mark.oracle
def test_real_model_logits_are_those_of_transformers(smollm):
  """The file's tensors, renamed and un-permuted here, in transformers' Llama."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, params, tok = smollm
  cfg = model.cfg
  config = transformers.LlamaConfig(
    vocab_size=cfg.vocab_size,
    hidden_size=cfg.model_dim,
    intermediate_size=cfg.mlp_dim,
    num_hidden_layers=cfg.num_layers,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    tie_word_embeddings=True,
  )
  theirs = transformers.LlamaForCausalLM(config).eval()
  stored = {t.name: t for t in gguf.GGUFReader(fetch.cached()).tensors}
  state = theirs.state_dict()
  for name, value in state.items():
    if name == "lm_head.weight":
      continue
    tensor = stored[gguf_name(name)]
    w = gguf.dequantize(tensor.data, tensor.tensor_type)
    heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
    if heads:
      pairs = w.reshape(heads, 32, 2, 576)
      w = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(w.shape)
    value.copy_(torch.from_numpy(w.copy()))
  ids = tok.encode("The three laws of robotics are 1. A robot may not injure a human being")
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits[0].numpy()
  found = np.asarray(model.apply({"params": params}, jnp.asarray([ids])).logits[0])
  np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
