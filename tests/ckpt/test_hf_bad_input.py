"""Damaged, incomplete and foreign folders: one clear error each (models.md 10, issue section 8)."""

import json
import re

import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.ckpt import errors
from tests.ckpt import hf_folder

HF = hf_folder.UNTIED


@pytest.fixture(scope="module")
def weights():
  return hf_folder.tensors(HF)


def _refused(folder, *matches, kind=errors.CheckpointError):
  with pytest.raises(kind) as info:
    ckpt.load_hf(folder)
  for match in matches:
    assert re.search(match, str(info.value)), f"{match!r} not in: {info.value}"


@pytest.mark.smoke
def test_missing_and_unexpected_tensors_are_listed(tmp_path, weights):
  gone = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
  part = {n: x for n, x in weights.items() if n not in gone}
  part |= {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
  hf_folder.write(tmp_path, HF, part)
  _refused(tmp_path, "2 missing", *gone, "1 unexpected", "q_proj.bias")


def test_a_layer_too_many_or_too_few(tmp_path, weights):
  hf_folder.write(tmp_path / "more", HF | {"num_hidden_layers": 3}, weights)
  _refused(tmp_path / "more", "9 missing", "model.layers.2.self_attn.q_proj.weight")
  hf_folder.write(tmp_path / "less", HF | {"num_hidden_layers": 1}, weights)
  _refused(tmp_path / "less", "9 unexpected", "model.layers.1.self_attn.q_proj.weight")


def test_an_untied_llama_without_head_is_missing_it(tmp_path):
  """Trap 1: no tie key means untied for Llama, tied for MiniCPM, on the same tensors."""
  hf = {k: v for k, v in hf_folder.LLAMA.items() if k != "tie_word_embeddings"}
  weights = hf_folder.tensors(hf | {"tie_word_embeddings": True})
  hf_folder.write(tmp_path, hf, weights)
  _refused(tmp_path, "1 missing tensors: lm_head.weight")


@pytest.mark.parametrize(
  "name, shape",
  [
    ("model.embed_tokens.weight", (104, 32)),  # rows padded in the file, not in the config
    ("model.layers.1.self_attn.k_proj.weight", (32, 32)),
    ("model.layers.0.mlp.down_proj.weight", (48, 32)),  # transposed
    ("model.norm.weight", (1, 32)),
  ],
)
def test_wrong_shapes_name_tensor_found_and_expected(tmp_path, weights, name, shape):
  want = list(weights[name].shape)
  hf_folder.write(tmp_path, HF, weights | {name: np.zeros(shape, np.float32)})
  _refused(tmp_path, re.escape(f"{name}: found {list(shape)}, expected {want}"))


def test_a_stored_head_width_that_was_derived_wrongly(tmp_path):
  """MiniCPM5: 4 heads of 16 on a width of 32; without head_dim the shapes cannot fit."""
  weights = hf_folder.tensors(hf_folder.LLAMA)
  hf = {k: v for k, v in hf_folder.LLAMA.items() if k != "head_dim"}
  hf_folder.write(tmp_path, hf | {"tie_word_embeddings": False}, weights)
  _refused(tmp_path, r"q_proj.weight: found \[64, 32\], expected \[32, 32\]")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, weights, keep):
  hf_folder.write(tmp_path, HF, weights)
  file = tmp_path / "model.safetensors"
  data = file.read_bytes()
  file.write_bytes(data[: int(len(data) * keep)])
  _refused(tmp_path, "model.safetensors", "truncated")


def test_other_damage_of_the_file(tmp_path, weights):
  hf_folder.write(tmp_path, HF, weights)
  file = tmp_path / "model.safetensors"
  data = file.read_bytes()
  file.write_bytes(data + b"\0" * 8)
  _refused(tmp_path, "model.safetensors", "data after the last tensor")
  length = int.from_bytes(data[:8], "little")
  file.write_bytes(data[:8] + b"x" * length + data[8 + length :])
  _refused(tmp_path, "model.safetensors", "header")
  header = json.loads(data[8 : 8 + length])
  header["model.norm.weight"]["data_offsets"][0] += 4
  text = json.dumps(header, separators=(",", ":")).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  _refused(tmp_path, "model.safetensors", "found bytes")
  header = json.loads(data[8 : 8 + length])
  header["model.norm.weight"]["dtype"] = "F16"  # half the bytes that the offsets hold
  text = json.dumps(header, separators=(",", ":")).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  _refused(tmp_path, "model.norm.weight: found 128 bytes, expected shape")
  file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
  _refused(tmp_path, "git lfs pull")


def test_missing_shard_and_wrong_index(tmp_path, weights):
  hf_folder.write(tmp_path, HF, weights, num_shards=3)
  index_file = tmp_path / "model.safetensors.index.json"
  index = json.loads(index_file.read_text())
  for change, match in (
    ({"model.extra.weight": "model-00001-of-00003.safetensors"}, "not stored: model.extra.weight"),
    ({"model.norm.weight": "model-00009-of-00003.safetensors"}, "model-00009-of-00003"),
    ({"model.norm.weight": "../elsewhere.safetensors"}, "elsewhere"),
    ({"model.norm.weight": 3}, "weight_map"),
  ):
    weight_map = index["weight_map"] | change
    index_file.write_text(json.dumps(index | {"weight_map": weight_map}))
    _refused(tmp_path, match)
  weight_map = {n: f for n, f in index["weight_map"].items() if n != "model.norm.weight"}
  index_file.write_text(json.dumps(index | {"weight_map": weight_map}))
  _refused(tmp_path, "stored but not named: model.norm.weight")
  index_file.write_text(json.dumps(index)[:-9])
  _refused(tmp_path, "index.json: found broken JSON")
  index_file.write_text(json.dumps(index))
  second = tmp_path / "model-00002-of-00003.safetensors"
  second.write_bytes(second.read_bytes()[:-100])
  _refused(tmp_path, "model-00002-of-00003.safetensors: truncated")
  second.unlink()
  _refused(tmp_path, "missing shard files", "model-00002-of-00003", kind=FileNotFoundError)
  index_file.unlink()
  _refused(tmp_path, "model-00001-of-00003", "index.json", kind=errors.MissingFileError)


def test_pickles_are_refused_with_advice(tmp_path, weights):
  (tmp_path / "config.json").write_text(json.dumps(HF))
  (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
  _refused(tmp_path, "pytorch_model.bin", "Convert once", "save_pretrained")
  hf_folder.write(tmp_path, HF, weights)  # with safetensors beside it, the pickle is not looked at
  ckpt.load_hf(tmp_path)


def test_quantised_tensors_are_refused_by_name(tmp_path, weights):
  name = "model.layers.0.self_attn.q_proj."
  part = {n: x for n, x in weights.items() if not n.startswith(name)}
  part |= {name + "qweight": np.zeros((4, 32), np.int32), name + "scales": np.ones((1, 32))}
  hf_folder.write(tmp_path / "a", HF, part)
  _refused(tmp_path / "a", "quantised", "q_proj.qweight", kind=errors.QuantizedCheckpointError)
  hf_folder.write(tmp_path / "b", HF | {"quantization_config": {"bits": 4}}, weights)
  _refused(tmp_path / "b", "quantization_config", kind=errors.QuantizedCheckpointError)
  as_int = {"model.layers.0.self_attn.q_proj.weight": np.zeros((32, 32), np.int8)}
  hf_folder.write(tmp_path / "c", HF, weights | as_int)
  _refused(tmp_path / "c", "q_proj.weight", "I8", "BF16")


def test_folders_that_are_not_models(tmp_path, weights):
  _refused(tmp_path / "nowhere", "no such folder", kind=FileNotFoundError)
  _refused(tmp_path, "config.json: found no such file", kind=FileNotFoundError)
  (tmp_path / "config.json").write_text("{")
  _refused(tmp_path, "config.json: found broken JSON")
  (tmp_path / "config.json").write_text("[]")
  _refused(tmp_path, "config.json: found a list")
  (tmp_path / "config.json").write_text(json.dumps(HF))
  _refused(tmp_path, "no safetensors file", kind=FileNotFoundError)
  with pytest.raises(ValueError, match="dtype: found 'int8'"):
    ckpt.load_hf(hf_folder.write(tmp_path, HF, weights), dtype="int8")


def test_a_number_of_layers_that_no_file_holds(tmp_path, weights):
  hf_folder.write(tmp_path, HF | {"num_hidden_layers": 10**9}, weights)
  _refused(
    tmp_path, "config.json: num_hidden_layers", "found 1000000000 layers", "tensors can hold"
  )


@pytest.mark.parametrize(
  "change, key",
  [
    ({"head_dim": 10**9}, r"head_dim: found 4000000000, expected what the tensors"),
    (
      {"intermediate_size": 10**9},
      "intermediate_size: found 1000000000, expected what the tensors",
    ),
    ({"vocab_size": 2**70}, f"vocab_size: found {2**70}, expected an integer > 0 of 31 bits"),
  ],
)
def test_widths_that_no_tensor_holds(tmp_path, weights, change, key):
  """Refused before a table of that width is made (rotation: 8 bytes an entry)."""
  hf_folder.write(tmp_path, HF | change, weights)
  _refused(tmp_path, re.escape(f"{tmp_path}/config.json: "), key)


def test_errors_of_the_config_name_the_folder(tmp_path, weights):
  hf_folder.write(tmp_path, {k: v for k, v in HF.items() if k != "hidden_size"}, weights)
  _refused(tmp_path, re.escape(f"{tmp_path}/config.json: hidden_size"), kind=errors.ConfigError)
