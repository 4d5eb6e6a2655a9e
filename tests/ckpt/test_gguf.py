"""GGUF: synthetic files against transformers and the quantiser's own values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.ckpt import errors, gguf_io
from minicpm_jax.config import MeshConfig
from minicpm_jax.core import mesh, trees

gguf = pytest.importorskip("gguf")

from tests.ckpt import gguf_files  # noqa: E402
from tests.ckpt.gguf_files import MUP, TYPES, D, F, H, K, L, N, V  # noqa: E402
from tests.models import common as models  # noqa: E402

TOKENS = np.array([[1, 5, 9, 2, 33, 7, 7, 20]], np.int32)


def logits(model, params) -> np.ndarray:
  return np.asarray(models.apply(model, params, jnp.asarray(TOKENS)).logits)


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
  weights = gguf_files.random_weights(tied=tied)
  path = gguf_files.write(tmp_path / "m.gguf", gguf_files.stored(weights, "f32"), arch=arch)
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
  weights = gguf_files.random_weights(tied=False)
  tensors = gguf_files.stored(weights, kind)
  _, params, _ = gguf_io.load_gguf(gguf_files.write(tmp_path / "m.gguf", tensors))
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
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.stored(gguf_files.random_weights(), "f32"), arch="minicpm"
  )
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
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.stored(gguf_files.random_weights(), "q8_0")
  )
  model, params, _ = gguf_io.load_gguf(path, dtype="bf16")
  assert model.cfg.dtype == model.cfg.param_dtype == "bf16"
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.oracle
def test_experts(tmp_path):
  """Mixtral on the same weights: softmax over all, top 2, renormalised (models.md 4)."""
  weights = gguf_files.random_weights(experts=4, tied=False)
  keys = {"expert_count": 4, "expert_used_count": 2}
  path = gguf_files.write(tmp_path / "m.gguf", gguf_files.stored(weights, "f32"), keys=keys)
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
  tensors = gguf_files.stored(gguf_files.random_weights(), "f32")
  weights = gguf_files.random_weights()
  factors = np.linspace(1, 3, H // 2).astype(np.float32)
  for name in ("long", "short"):
    tensors[f"rope_factors_{name}.weight"] = (factors, TYPES["f32"])
  path = gguf_files.write(
    tmp_path / "m.gguf", tensors, arch="minicpm", keys={"rope.scaling.type": "longrope"}
  )
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
  tensors = gguf_files.stored(gguf_files.random_weights(), "f32")
  for name in ("long", "short"):
    tensors[f"rope_factors_{name}.weight"] = (np.ones(H // 2, np.float32), TYPES["f32"])
  keys = {
    "rope.scaling.type": "longrope",
    "rope.scaling.original_context_length": 32,
    "rope.scaling.attn_factor": 1.25,
  }
  model, _, _ = gguf_io.load_gguf(
    gguf_files.write(tmp_path / "m.gguf", tensors, arch="minicpm", keys=keys)
  )
  factor = model.cfg.rope.factor
  assert math.isclose(math.sqrt(1 + math.log(factor) / math.log(32)), 1.25, rel_tol=1e-6)


# ------------------------------------------------------------------------------ the config


def test_minicpm_multipliers_are_read_exactly(tmp_path):
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.stored(gguf_files.random_weights(), "f32"), arch="minicpm"
  )
  cfg = gguf_io.load_gguf(path)[0].cfg
  assert (cfg.arch, cfg.scale_emb, cfg.scale_depth, cfg.dim_model_base) == ("minicpm", 12, 1.4, 16)
  assert (cfg.norm_eps, cfg.rope.theta, cfg.stop_ids, cfg.bos_id) == (1e-5, 10000.0, (2,), 1)


def test_minicpm_without_logit_scale_is_refused_unless_told(tmp_path):
  path = gguf_files.write(
    tmp_path / "m.gguf",
    gguf_files.stored(gguf_files.random_weights(), "f32"),
    arch="minicpm",
    drop=["logit_scale"],
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
    ({"block_count": 10**9}, "block_count: found 1000000000"),  # not as many names
    ({"block_count": L + 1}, f"blk.{L}.attn_norm.weight: found no such tensor"),
    ({"block_count": L - 1}, "tensors: found unexpected blk.1.attn_k.weight"),
    ({"feed_forward_length": 128}, r"blk.0.ffn_gate.weight: found shape \(96, 64\), expected"),
    ({"attention.head_count": 0}, "attention.head_count: found 0, expected an integer > 0"),
    ({"attention.head_count": 3}, "m.gguf: model.num_heads: found 3, expected a multiple"),
    ({"rope.freq_base": 0.0}, "m.gguf: rope.theta: found 0.0, expected a positive number"),
    ({"rope.freq_base": math.inf}, "m.gguf: llama.rope.freq_base: found inf, expected a finite"),
    ({"expert_count": 2, "expert_used_count": 3}, "m.gguf: moe.experts_per_token: found 3"),
  ],
)
def test_mismatched_metadata(tmp_path, keys, match):
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.stored(gguf_files.random_weights(), "f32"), keys=keys
  )
  with pytest.raises(ValueError, match=match):
    gguf_io.load_gguf(path)


def test_values_that_are_not_finite_are_refused(tmp_path):
  tensors = gguf_files.stored(gguf_files.random_weights(), "q8_0")
  data, kind = tensors["blk.1.attn_v.weight"]
  data = data.copy()
  data[0, :2] = np.array([np.nan], np.float16).view(np.uint8)  # the scale of its first block
  tensors["blk.1.attn_v.weight"] = (data, kind)
  with pytest.raises(errors.CheckpointError, match="m.gguf: blk.1.attn_v.weight: found inf or nan"):
    gguf_io.load_gguf(gguf_files.write(tmp_path / "m.gguf", tensors))


def test_bias_is_refused(tmp_path):
  tensors = gguf_files.stored(gguf_files.random_weights(), "f32")
  tensors["blk.0.attn_q.bias"] = (np.zeros(N * H, np.float32), TYPES["f32"])
  with pytest.raises(errors.CheckpointError, match="unexpected blk.0.attn_q.bias"):
    gguf_io.load_gguf(gguf_files.write(tmp_path / "m.gguf", tensors))


def test_other_architecture(tmp_path):
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.stored(gguf_files.random_weights(), "f32"), arch="minicpm3"
  )
  with pytest.raises(errors.CheckpointError, match="architecture: found 'minicpm3', expected one"):
    gguf_io.load_gguf(path)


def test_integer_tensor_is_refused(tmp_path):
  tensors = gguf_files.stored(gguf_files.random_weights(), "f32")
  tensors["output_norm.weight"] = (np.ones(D, np.int32), gguf.GGMLQuantizationType.I32)
  with pytest.raises(errors.CheckpointError, match="output_norm.weight: found type I32"):
    gguf_io.load_gguf(gguf_files.write(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize("keep", [2, 20, 400, 5000, -1])
def test_truncated_file(tmp_path, keep):
  path = gguf_files.write(
    tmp_path / "m.gguf", gguf_files.stored(gguf_files.random_weights(), "q4_0")
  )
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(errors.CheckpointError, match="m.gguf: (damaged or truncated|found first)"):
    gguf_io.load_gguf(path)


def test_no_file_and_no_gguf(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no such file"):
    gguf_io.load_gguf(tmp_path / "nothing.gguf")
  (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 10)
  with pytest.raises(errors.CheckpointError, match="expected b'GGUF'"):
    gguf_io.load_gguf(tmp_path / "x.gguf")
