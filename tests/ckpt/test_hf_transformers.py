"""Exports against transformers: same logits in the classes that hold the same arithmetic."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.models import convert, transformer
from tests.ckpt import hf_folder

pytestmark = pytest.mark.oracle
TOKENS = np.random.default_rng(5).integers(0, 99, (2, 12))


def _ours(folder, **options):
  model, params, _ = ckpt.load_hf(folder, **options)
  apply = jax.jit(model.apply)
  return model, params, np.asarray(apply({"params": params}, jnp.asarray(TOKENS, jnp.int32)).logits)


def _theirs(module):
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    return module.eval()(torch.from_numpy(TOKENS)).logits.float().numpy()


def _granite(folder):
  """MiniCPM's arithmetic under another name, and with the same tensor names (models.md 1)."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  hf = json.loads((folder / "config.json").read_text())
  D, L, N = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
  rope = hf["rope_scaling"] or {"rope_type": "default"}
  granite = transformers.GraniteConfig(
    hidden_size=D, intermediate_size=hf["intermediate_size"], num_hidden_layers=L,
    num_attention_heads=N, num_key_value_heads=hf["num_key_value_heads"],
    vocab_size=hf["vocab_size"], max_position_embeddings=hf["max_position_embeddings"],
    rms_norm_eps=hf["rms_norm_eps"], tie_word_embeddings=hf["tie_word_embeddings"],
    rope_parameters=rope | {"rope_theta": hf["rope_theta"]},
    embedding_multiplier=float(hf["scale_emb"]), attention_multiplier=(D // N) ** -0.5,
    residual_multiplier=hf["scale_depth"] / L**0.5, logits_scaling=D / hf["dim_model_base"],
  )  # fmt: skip
  module = transformers.GraniteForCausalLM(granite)
  state = {n: torch.from_numpy(x) for n, x in hf_folder.read(folder).items()}
  if hf["tie_word_embeddings"]:
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
  module.load_state_dict(state)  # strict: names and shapes
  return module


@pytest.mark.parametrize("case", ["tied", "untied", "longrope"])
def test_an_exported_minicpm_runs_in_granite(tmp_path, case):
  hf = {"tied": hf_folder.MINICPM, "untied": hf_folder.UNTIED}.get(case, hf_folder.MINICPM)
  if case == "longrope":
    hf = hf | {"rope_scaling": hf_folder.LONGROPE, "max_position_embeddings": 32}
  hf_folder.write(tmp_path / "in", hf, hf_folder.tensors(hf))
  model, params, logits = _ours(tmp_path / "in")
  ckpt.save_hf(tmp_path / "out", model, params)
  np.testing.assert_allclose(logits, _theirs(_granite(tmp_path / "out")), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mla"])
def test_native_classes_load_our_exports(tmp_path, kind):
  transformers = pytest.importorskip("transformers")
  hf = hf_folder.ALL[kind]
  if kind == "mla":
    hf = hf | {"rope_scaling": hf_folder.LONGROPE | {"long_factor": [1.0, 1.5]}}
    hf["rope_scaling"] |= {"short_factor": [1.0, 1.25]}
    hf["max_position_embeddings"] = 32
  hf_folder.write(tmp_path / "in", hf, hf_folder.tensors(hf))
  model, params, logits = _ours(tmp_path / "in")
  ckpt.save_hf(tmp_path / "out", model, params, max_shard_bytes=30_000)
  module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
  assert type(module).__name__ == hf["architectures"][0]
  np.testing.assert_allclose(logits, _theirs(module), atol=1e-4)


@pytest.mark.parametrize("kind", ["tied", "untied", "moe"])
def test_the_llama_form_of_a_minicpm_loads_directly(tmp_path, kind):
  """Folded: LlamaForCausalLM, or Mixtral for experts, with the original's logits."""
  transformers = pytest.importorskip("transformers")
  hf = hf_folder.ALL[kind]
  hf_folder.write(tmp_path / "in", hf, hf_folder.tensors(hf))
  model, params, logits = _ours(tmp_path / "in")
  cfg, folded = convert.fold_to_llama(model.cfg, params)
  ckpt.save_hf(tmp_path / "out", transformer.Transformer(cfg), folded)
  module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
  np.testing.assert_allclose(logits, _theirs(module), atol=1e-4)
  again, _, same = _ours(tmp_path / "out")
  assert again.cfg.arch == "llama" and (again.cfg.moe is None) == (kind != "moe")
  np.testing.assert_allclose(logits, same, atol=1e-4)


def test_a_folder_written_by_transformers(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
  llama = transformers.LlamaConfig(
    **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
  )
  module = transformers.LlamaForCausalLM(llama)
  module.save_pretrained(tmp_path, max_shard_size="20KB")
  assert (tmp_path / "model.safetensors.index.json").exists()
  model, _, logits = _ours(tmp_path)
  assert model.cfg.tie_embeddings and model.cfg.head_dim == 16
  np.testing.assert_allclose(logits, _theirs(module), atol=1e-4)
