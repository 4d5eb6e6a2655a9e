"""load_hf and save_hf: where every number goes, round trips, dtypes, shards, what is left out."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.ckpt import hf_io
from minicpm_jax.models import transformer
from tests.ckpt import hf_folder


def _at(tree, path):
  for key in path.split("/"):
    tree = tree[key]
  return np.asarray(tree)


@pytest.mark.smoke
def test_every_projection_lands_where_the_equations_need_it(tmp_path):
  """y = W x of the HF matrix equals the contraction with our kernel, per layer."""
  weights = hf_folder.tensors(hf_folder.UNTIED)
  _, params, tok = ckpt.load_hf(hf_folder.write(tmp_path, hf_folder.UNTIED, weights))
  assert tok is None
  rng = np.random.default_rng(1)
  x_D, x_NH, x_F = rng.normal(size=32), rng.normal(size=(4, 8)), rng.normal(size=48)
  for i in range(2):
    hf = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items()}
    q_DNH = _at(params, "layers/attn/q/kernel")[i]
    want = (hf["self_attn.q_proj.weight"] @ x_D).reshape(4, 8)  # rows are head-major
    np.testing.assert_allclose(np.einsum("D,DNH->NH", x_D, q_DNH), want, rtol=1e-6)
    v_DKH = _at(params, "layers/attn/v/kernel")[i]
    want = (hf["self_attn.v_proj.weight"] @ x_D).reshape(2, 8)
    np.testing.assert_allclose(np.einsum("D,DKH->KH", x_D, v_DKH), want, rtol=1e-6)
    o_NHD = _at(params, "layers/attn/o/kernel")[i]
    want = hf["self_attn.o_proj.weight"] @ x_NH.reshape(-1)
    np.testing.assert_allclose(np.einsum("NH,NHD->D", x_NH, o_NHD), want, rtol=1e-6)
    gate, down = _at(params, "layers/mlp/gate/kernel")[i], _at(params, "layers/mlp/down/kernel")[i]
    np.testing.assert_allclose(x_D @ gate, hf["mlp.gate_proj.weight"] @ x_D, rtol=1e-6)
    np.testing.assert_allclose(x_F @ down, hf["mlp.down_proj.weight"] @ x_F, rtol=1e-6)
    assert hf_folder.same_bits(
      _at(params, "layers/mlp_norm/scale")[i], hf["post_attention_layernorm.weight"]
    )
  assert hf_folder.same_bits(_at(params, "embed/embedding"), weights["model.embed_tokens.weight"])
  np.testing.assert_array_equal(_at(params, "lm_head/kernel"), weights["lm_head.weight"].T)


def test_expert_names_w1_is_gate_w3_is_up_w2_is_down(tmp_path):
  weights = hf_folder.tensors(hf_folder.MOE)
  _, params, _ = ckpt.load_hf(hf_folder.write(tmp_path, hf_folder.MOE, weights))
  for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
    leaf_LEio = _at(params, f"layers/moe/{ours}/kernel")
    for i in range(2):
      for e in range(4):
        want = weights[f"model.layers.{i}.mlp.experts.{e}.{theirs}.weight"]
        np.testing.assert_array_equal(leaf_LEio[i, e], want.T)
  router = _at(params, "layers/moe/router/kernel")
  np.testing.assert_array_equal(router[1], weights["model.layers.1.mlp.gate.weight"].T)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("kind", list(hf_folder.ALL))
def test_round_trip_is_bit_equal(tmp_path, kind, scan_layers):
  hf = hf_folder.ALL[kind] | {"torch_dtype": "bfloat16"}
  weights = hf_folder.tensors(hf)
  hf_folder.write(tmp_path / "in", hf, weights, num_shards=3)
  model, params, _ = ckpt.load_hf(tmp_path / "in", scan_layers=scan_layers)
  assert model.cfg.param_dtype == model.cfg.dtype == "bf16"
  ckpt.save_hf(tmp_path / "out", model, params)
  written = hf_folder.read(tmp_path / "out")
  assert set(written) == set(weights)
  assert all(hf_folder.same_bits(written[n], weights[n]) for n in weights)
  out = json.loads((tmp_path / "out" / "config.json").read_text())
  assert {k: out[k] for k in hf} == hf
  again, params_again, _ = ckpt.load_hf(tmp_path / "out", scan_layers=scan_layers)
  assert again.cfg == model.cfg
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_dtypes_are_kept_and_casts_round_to_nearest_even(tmp_path, dtype):
  hf = hf_folder.MINICPM | {"torch_dtype": dtype}
  weights = hf_folder.tensors(hf)
  hf_folder.write(tmp_path, hf, weights)
  model, params, _ = ckpt.load_hf(tmp_path)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
  model, params, _ = ckpt.load_hf(tmp_path, dtype="bf16")
  got = _at(params, "embed/embedding")
  bits = weights["model.embed_tokens.weight"].astype(np.float32).view(np.uint32).astype(np.int64)
  want = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # nearest, ties to even
  np.testing.assert_array_equal(got.view(np.uint16), want)
  for name in ("bf16", "bfloat16", jnp.bfloat16):
    assert ckpt.load_hf(tmp_path, dtype=name)[0].cfg.dtype == "bf16"


def test_mixed_dtypes_stay_per_tensor(tmp_path):
  weights = hf_folder.tensors(hf_folder.MINICPM | {"torch_dtype": "bfloat16"})
  norms = {n: x.astype(np.float32) * 1.001 for n, x in weights.items() if x.ndim == 1}
  hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights | norms)
  model, params, _ = ckpt.load_hf(tmp_path / "in")
  assert params["final_norm"]["scale"].dtype == np.float32
  assert params["embed"]["embedding"].dtype == ml_dtypes.bfloat16
  assert model.cfg.dtype == "bf16"
  ckpt.save_hf(tmp_path / "out", model, params)
  written = hf_folder.read(tmp_path / "out")
  assert all(hf_folder.same_bits(written[n], x) for n, x in (weights | norms).items())


def test_save_casts_on_request(tmp_path):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights))
  ckpt.save_hf(tmp_path / "out", model, params, dtype="bf16")
  written = hf_folder.read(tmp_path / "out")
  for name, x in weights.items():
    assert hf_folder.same_bits(written[name], x.astype(ml_dtypes.bfloat16))
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["torch_dtype"] == "bfloat16"


def test_shards_have_an_index_and_respect_the_limit(tmp_path):
  hf = hf_folder.UNTIED
  weights = hf_folder.tensors(hf)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf, weights))
  limit = 20_000
  ckpt.save_hf(tmp_path / "out", model, params, max_shard_bytes=limit)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights.values())
  files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
  assert files == [f"model-{k + 1:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))]
  assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
  for file in files:
    part = hf_folder.st.load_file(tmp_path / "out" / file)
    assert {n for n, f in index["weight_map"].items() if f == file} == set(part)
    assert sum(x.nbytes for x in part.values()) <= limit or len(part) == 1
  _, params_again, _ = ckpt.load_hf(tmp_path / "out")
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again))


def test_written_metadata_says_pt(tmp_path):
  from safetensors import safe_open

  weights = hf_folder.tensors(hf_folder.MINICPM)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights))
  ckpt.save_hf(tmp_path / "out", model, params)
  with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as f:
    assert f.metadata() == {"format": "pt"}


def test_rope_buffers_and_the_head_of_a_tied_model_are_ignored(tmp_path, caplog):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  table = weights["model.embed_tokens.weight"]
  buffers = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((64, 8), np.float32),
    "model.layers.1.self_attn.rotary_emb.sin_cached": np.ones((64, 8), np.float32),
    "model.rotary_emb.inv_freq": np.ones(4, np.float32),
  }
  extra = buffers | {"lm_head.weight": table.copy()}
  hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights | extra)
  with caplog.at_level("WARNING"):
    model, params, _ = ckpt.load_hf(tmp_path / "in")
  assert "lm_head" not in params and "lm_head.weight" not in caplog.text
  ckpt.save_hf(tmp_path / "out", model, params)
  assert set(hf_folder.read(tmp_path / "out")) == set(weights)  # no lm_head when tied


def test_a_tied_model_with_another_head_is_loaded_with_a_warning(tmp_path, caplog):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  head = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
  hf_folder.write(tmp_path, hf_folder.MINICPM, weights | head)
  with caplog.at_level("WARNING"):
    _, params, _ = ckpt.load_hf(tmp_path)
  assert "lm_head.weight: ignored" in caplog.text and "tie_word_embeddings" in caplog.text
  got = _at(params, "embed/embedding")
  np.testing.assert_array_equal(got, weights["model.embed_tokens.weight"])


def test_stop_ids_come_from_both_files_and_go_back(tmp_path):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights)
  generation = {"bos_token_id": 1, "eos_token_id": [2, 73], "temperature": 0.8}
  (tmp_path / "in" / "generation_config.json").write_text(json.dumps(generation))
  model, params, _ = ckpt.load_hf(tmp_path / "in")
  assert model.cfg.stop_ids == (2, 73)
  ckpt.save_hf(tmp_path / "out", model, params)
  written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert written == generation


def test_mtp_head_is_left_out(tmp_path):
  from minicpm_jax import config
  from minicpm_jax.models import zoo

  cfg = zoo.tiny(zoo.minicpm4_0p5b(), mtp=config.MTPConfig())
  model = transformer.Transformer(cfg)
  shapes, _ = transformer.abstract_params(model)
  params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
  ckpt.save_hf(tmp_path, model, params)
  again, params_again, _ = ckpt.load_hf(tmp_path)
  assert again.cfg.mtp is None and "mtp" in params and "mtp" not in params_again
  assert not any("mtp" in name for name in hf_folder.read(tmp_path))


def test_saving_over_an_older_export_leaves_no_stale_shard(tmp_path):
  weights = hf_folder.tensors(hf_folder.UNTIED)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf_folder.UNTIED, weights))
  out = tmp_path / "out"
  ckpt.save_hf(out, model, params, max_shard_bytes=10_000)
  (out / "README.md").write_text("mine")
  ckpt.save_hf(out, model, jax.tree.map(lambda x: x * 2, params))
  found = sorted(p.name for p in out.iterdir())
  assert found == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
  name = "model.norm.weight"
  np.testing.assert_array_equal(hf_folder.read(out)[name], weights[name] * 2)


def test_a_failing_save_leaves_nothing(tmp_path):
  class Broken:
    def save(self, folder):
      raise RuntimeError("disk full")

  weights = hf_folder.tensors(hf_folder.MINICPM)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights))
  with pytest.raises(RuntimeError, match="disk full"):
    ckpt.save_hf(tmp_path / "out", model, params, Broken())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
  before = {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()}
  with pytest.raises(RuntimeError, match="disk full"):
    ckpt.save_hf(tmp_path / "in", model, params, Broken())
  assert {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before


def test_numpy_and_boxed_parameters_are_saved_too(tmp_path):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights))
  ckpt.save_hf(tmp_path / "numpy", model, jax.tree.map(np.asarray, params))
  written = hf_folder.read(tmp_path / "numpy")
  assert all(hf_folder.same_bits(written[n], weights[n]) for n in weights)
  boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, names=(None,) * x.ndim), params)
  ckpt.save_hf(tmp_path / "boxed", model, boxed)
  assert set(hf_folder.read(tmp_path / "boxed")) == set(weights)


def test_params_of_another_model_are_refused(tmp_path):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path / "in", hf_folder.MINICPM, weights))
  wrong = params | {"final_norm": {"scale": np.ones(7, np.float32)}}
  with pytest.raises(ValueError, match=r"final_norm/scale: found \[7\], expected \[32\]"):
    ckpt.save_hf(tmp_path / "out", model, wrong)
  less = {k: v for k, v in params.items() if k != "final_norm"} | {"head": params["final_norm"]}
  with pytest.raises(ValueError, match="missing leaves: final_norm/scale; unexpected.*head/scale"):
    ckpt.save_hf(tmp_path / "out", model, less)
  assert not (tmp_path / "out").exists()


def test_large_values_do_not_become_infinite_in_float16(tmp_path):
  weights = hf_folder.tensors(hf_folder.MINICPM)
  weights["model.norm.weight"][3] = 1e5
  hf_folder.write(tmp_path, hf_folder.MINICPM, weights)
  with pytest.raises(ValueError, match="model.norm.weight: found a value beyond 65504"):
    ckpt.load_hf(tmp_path, dtype="f16")


def test_the_real_tokenizer_travels_with_the_model(tmp_path, shared_dir):
  """MiniCPM4's tokenizer files beside a small model of its vocabulary; ids from their README."""
  source = shared_dir / "models" / "minicpm4-0.5b-tokenizer"
  hf = hf_folder.MINICPM | {"vocab_size": 73448, "hidden_size": 8, "num_hidden_layers": 1}
  hf_folder.write(tmp_path / "in", hf, hf_folder.tensors(hf))
  for file in source.iterdir():
    if file.name != "config.json":
      (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
  text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  ids = [73441, 1836, 5, 6920, 73440, 5, 73441, 43686, 5]
  model, params, tok = ckpt.load_hf(tmp_path / "in")
  assert model.cfg.stop_ids == (2, 73440) and tok.encode(text) == ids
  ckpt.save_hf(tmp_path / "out", model, params, tok)
  _, _, again = ckpt.load_hf(tmp_path / "out")
  assert again.encode(text) == ids and again.chat_template == tok.chat_template


def test_a_shard_holds_bytes():
  with pytest.raises(ValueError, match="max_shard_bytes: found 0"):
    hf_io.split({"a": 1}, 0)
