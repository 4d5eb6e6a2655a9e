"""GPTQ and Marlin folders: a float64 reader written from the format, round trips, refusals."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minicpm_jax import ckpt
from minicpm_jax.ckpt import errors
from minicpm_jax.config import MeshConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.deploy import quantize
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import gptq, qtensor
from tests.models import common

HF_NAMES = {"attn/q": "self_attn.q_proj", "attn/o": "self_attn.o_proj", "mlp/down": "mlp.down_proj"}


def make(method="rtn", group=16, **solver):
  """A two-layer model with QTensor kernels."""
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=2))
  cfg = gptq.GPTQConfig(group_size=group, scale_dtype="f16", **solver)
  batches = []
  if method == "gptq":
    tokens = np.random.default_rng(0).integers(0, 256, (4, 24)).astype(np.int32)
    batches = [(tokens, np.ones_like(tokens))]
  quant = quantize.QuantizeConfig(method=method, solver=cfg)
  return model, quantize.quantize_model(model, params, batches, quant).params


def float64_kernel(tensors, base, version):
  """W [in, out] from the stored words, as the format defines it."""
  qweight, qzeros = (tensors[f"{base}.{n}"].view(np.uint32) for n in ("qweight", "qzeros"))
  code = np.stack([(qweight >> np.uint32(4 * j)) & 15 for j in range(8)], 1)
  code = code.reshape(-1, qweight.shape[1]).astype(np.int64)
  zero = np.stack([(qzeros >> np.uint32(4 * j)) & 15 for j in range(8)], 2)
  zero = zero.reshape(qzeros.shape[0], -1).astype(np.int64)
  zero = (zero + 1) % 16 if version == "gptq" else zero
  g = tensors[f"{base}.g_idx"]
  return tensors[f"{base}.scales"].astype(np.float64)[g] * (code - zero[g])


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
  "method, solver",
  [("rtn", {}), ("rtn", {"symmetric": False}), ("gptq", {"act_order": True, "symmetric": False})],
  ids=["sym", "asym", "act_order"],
)
def test_folders_hold_the_model(tmp_path, version, method, solver):
  model, params = make(method, **solver)
  ckpt.save_gptq(tmp_path / "m", model, params, version=version)
  tensors = load_file(tmp_path / "m/model.safetensors")
  config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
  assert config["checkpoint_format"] == version and config["quant_method"] == "gptq"
  assert config["desc_act"] == ("act_order" in solver)
  assert config["sym"] == solver.get("symmetric", True)
  for ours, theirs in HF_NAMES.items():
    part, name = ours.split("/")
    leaf = params["layers"][part][name]["kernel"]
    for i in range(2):
      found = float64_kernel(tensors, f"model.layers.{i}.{theirs}", version)
      one = jax.tree.map(lambda x, i=i: x[i], leaf)
      wanted = np.asarray(qtensor.dequantize(one)).reshape(found.shape)
      np.testing.assert_allclose(found, wanted, rtol=1e-6)
  for scan in (True, False):
    loaded, back, tok = ckpt.load_hf(tmp_path / "m", scan_layers=scan)
    assert tok is None and loaded.cfg.quant.group_size == 16
    cfg, expected = model.cfg, params
    if not scan:
      cfg, expected = convert.unstack_layers(cfg, params)
    a, b = (trees.flatten_paths(t) for t in (back, expected))
    assert set(a) == set(b)
    for path in a:
      np.testing.assert_array_equal(
        np.asarray(a[path], np.float32), np.asarray(b[path], np.float32)
      )
  tokens = common.tokens((1, 12))
  np.testing.assert_allclose(
    common.apply(transformer.Transformer(cfg), expected, tokens).logits,
    common.apply(loaded, back, tokens).logits,
    atol=1e-5,
  )


def test_on_a_mesh(tmp_path):
  model, params = make()
  ckpt.save_gptq(tmp_path / "m", model, params)
  mesh = mesh_lib.make_mesh(MeshConfig(fsdp=2, tp=2), jax.devices()[:4])
  _, sharded, _ = ckpt.load_hf(tmp_path / "m", mesh=mesh)
  up = sharded["layers"]["mlp"]["up"]["kernel"]
  assert up.codes.sharding.num_devices == 4 and not up.codes.sharding.is_fully_replicated
  _, plain, _ = ckpt.load_hf(tmp_path / "m")
  for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(plain), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def marlin_model(group=128, symmetric=True):
  cfg = common.config("minicpm4_0p5b", num_layers=1)
  cfg = dataclasses.replace(
    cfg, model_dim=128, mlp_dim=256, num_heads=4, num_kv_heads=2, head_dim=32, dim_model_base=64
  )
  model, params = common.build(cfg)
  solver = gptq.GPTQConfig(group_size=group, symmetric=symmetric, scale_dtype="f16")
  quant = quantize.QuantizeConfig(method="rtn", solver=solver)
  return model, quantize.quantize_model(model, params, [], quant).params


@pytest.mark.parametrize("group", [128, -1])
def test_marlin_folder_round_trip(tmp_path, group):
  model, params = marlin_model(group)
  ckpt.save_marlin(tmp_path / "m", model, params)
  tensors = load_file(tmp_path / "m/model_gptq.safetensors")
  prefix = "model.layers.0."
  assert tensors[prefix + "self_attn.qkv_proj.qweight"].shape == (8, 2 * (4 + 2 * 2) * 32)
  assert tensors[prefix + "mlp.gate_up_proj.scales"].shape == (1, 512)
  assert tensors[prefix + "mlp.down_proj.qweight"].shape == (16, 256)
  assert not [n for n in tensors if "q_proj" in n or "qzeros" in n or "g_idx" in n]
  _, back, _ = ckpt.load_hf(tmp_path / "m")
  a, b = (trees.flatten_paths(t) for t in (back, params))
  for path in b:
    np.testing.assert_array_equal(np.asarray(a[path], np.float32), np.asarray(b[path], np.float32))


def test_marlin_refusals(tmp_path):
  model, params = marlin_model(64)
  with pytest.raises(errors.CheckpointError, match="save_marlin: .*found group_size 64"):
    ckpt.save_marlin(tmp_path / "m", model, params)
  model, params = marlin_model(128, symmetric=False)
  with pytest.raises(errors.CheckpointError, match="asymmetric"):
    ckpt.save_marlin(tmp_path / "m", model, params)
  assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("fused", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_joined_projections_hold_exactly_their_parts(tmp_path, fused):
  """64 outputs less: k and v, found from the end, would be columns of q."""
  model, params = marlin_model(128)
  ckpt.save_marlin(tmp_path / "m", model, params)
  file, name = tmp_path / "m/model_gptq.safetensors", f"model.layers.0.{fused}"
  tensors = load_file(file)
  for part, width in (("qweight", 128), ("scales", 64)):
    tensors[f"{name}.{part}"] = np.ascontiguousarray(tensors[f"{name}.{part}"][:, :-width])
  save_file(tensors, file)
  with pytest.raises(errors.CheckpointError, match=rf"{name}.qweight: found shape \[8, "):
    ckpt.load_hf(tmp_path / "m")
  ckpt.save_marlin(tmp_path / "m", model, params)
  whole = load_file(file)
  save_file(whole | {f"{name}.scales": whole[f"{name}.scales"][None]}, file)
  with pytest.raises(errors.CheckpointError, match=f"{file.name}: .*expected two matrices"):
    ckpt.load_hf(tmp_path / "m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("gptq") / "m"
  model, params = make()
  ckpt.save_gptq(path, model, params)
  return path


def edited(folder, tmp_path, *, config=None, tensors=None, drop=()):
  """A copy of the folder with keys of quantization_config and tensors replaced."""
  hf = json.loads((folder / "config.json").read_text())
  hf["quantization_config"] |= config or {}
  for key in [k for k, v in (config or {}).items() if v is None]:
    del hf["quantization_config"][key]
  stored = load_file(folder / "model.safetensors") | (tensors or {})
  out = tmp_path / "edited"
  out.mkdir(parents=True)
  (out / "config.json").write_text(json.dumps(hf))
  kept = {n: x for n, x in stored.items() if n not in drop}
  save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
  return out


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
  "config, match",
  [
    ({"quant_method": "awq"}, "config.json: quantization_config.quant_method: found 'awq'"),
    ({"quant_method": None}, "quant_method: found no such key, expected 'gptq'"),
    ({"bits": 3}, "quantization_config.bits: found 3, expected 4"),
    ({"checkpoint_format": "bitblas"}, "checkpoint_format: found 'bitblas', expected one of"),
    ({"checkpoint_format": "gptq_v2"}, "qzeros: found word 0x77777777, expected 0x88888888"),
    ({"group_size": 24}, "group_size: found 24, expected a divisor of 32"),
    ({"group_size": 32}, "scales: found shape"),
    ({"group_size": "128"}, "group_size: found '128'"),
    ({"lm_head": True}, "lm_head: found True"),
    ({"desc_act": "no"}, "desc_act: found 'no', expected true or false"),
    ({"sym": 0}, "sym: found 0, expected true or false"),
    ({"dynamic": {"a": {}}}, "dynamic: found"),
  ],
)
def test_bad_settings(folder, tmp_path, config, match):
  with pytest.raises(errors.CheckpointError, match=match):
    ckpt.load_hf(edited(folder, tmp_path, config=config))


def test_bad_tensors(folder, tmp_path):
  stored = load_file(folder / "model.safetensors")
  zeros = stored[f"{Q}.qzeros"].copy()
  zeros[0, 0] ^= 16
  cases = [
    ({f"{Q}.qzeros": zeros}, (), rf"model.safetensors: {Q}.qzeros: found word 0x77777767"),
    ({f"{Q}.scales": stored[f"{Q}.scales"] * np.float16(np.inf)}, (), f"{Q}.scales: found inf"),
    ({f"{Q}.scales": np.full((2, 32), 1e-6, np.float32)}, (), f"{Q}.scales: found float32 scales "),
    ({f"{Q}.qweight": stored[f"{Q}.qweight"][:2]}, (), rf"{Q}.qweight: found shape \[2, 32\]"),
    ({f"{Q}.qweight": stored[f"{Q}.qweight"].astype(np.float32)}, (), "found dtype F32, expected"),
    ({f"{Q}.g_idx": stored[f"{Q}.g_idx"] + 2}, (), f"{Q}.g_idx: found groups 2..3, expected 0..1"),
    ({f"{Q}.extra": np.zeros(32, np.float16)}, (), f"unexpected tensors: {Q}.extra"),
    ({}, (f"{Q}.scales",), f"1 missing tensors: {Q}.scales"),
    ({f"{Q}.weight": np.zeros((32, 32), np.float16)}, (f"{Q}.qweight",), "mixed formats"),
  ]
  for i, (tensors, drop, match) in enumerate(cases):
    work = tmp_path / str(i)
    work.mkdir()
    with pytest.raises(errors.CheckpointError, match=match):
      ckpt.load_hf(edited(folder, work, tensors=tensors, drop=drop))


def test_biases_of_zeros_are_read_and_others_refused(folder, tmp_path):
  names = [n for n in load_file(folder / "model.safetensors") if n.endswith(".scales")]
  widths = {n: load_file(folder / "model.safetensors")[n].shape[1] for n in names}
  zeros = {f"{n[:-7]}.bias": np.zeros(width, np.float16) for n, width in widths.items()}
  found = ckpt.load_hf(edited(folder, tmp_path / "a", tensors=zeros))[1]
  jax.tree.map(np.testing.assert_array_equal, found, ckpt.load_hf(folder)[1])
  zeros[f"{Q}.bias"][3] = 1
  with pytest.raises(errors.CheckpointError, match=rf"{Q}.bias: found values other than 0"):
    ckpt.load_hf(edited(folder, tmp_path / "b", tensors=zeros))


def test_old_folders(folder, tmp_path):
  """Settings in quantize_config.json, no checkpoint_format, no g_idx: version 1 is meant."""
  names = load_file(folder / "model.safetensors")
  out = edited(folder, tmp_path, drop=[n for n in names if "g_idx" in n])
  hf = json.loads((out / "config.json").read_text())
  settings = hf.pop("quantization_config")
  (out / "config.json").write_text(json.dumps(hf))
  old = {k: settings[k] for k in ("bits", "group_size", "sym", "desc_act")}
  (out / "quantize_config.json").write_text(json.dumps(old))
  _, back, _ = ckpt.load_hf(out)
  _, expected, _ = ckpt.load_hf(folder)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_only_quantised_trees_are_written(tmp_path):
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
  with pytest.raises(errors.CheckpointError, match="found floats at layers/attn/q/kernel"):
    ckpt.save_gptq(tmp_path / "m", model, params)
  quant = quantize.QuantizeConfig(method="ternary")
  ternary = quantize.quantize_model(model, params, [], quant).params
  with pytest.raises(errors.CheckpointError, match="ternary.*expected one kind, scheme int4"):
    ckpt.save_gptq(tmp_path / "m", model, ternary)


def test_scales_that_float16_cannot_hold_are_named(tmp_path, caplog):
  model, params = make("rtn")
  down = params["layers"]["mlp"]["down"]
  for power, is_told in ((-17, True), (-4, False)):
    scale = np.asarray(down["kernel"].scale, np.float32)
    small = scale * np.float32(2.0**power / scale.max())
    down["kernel"] = dataclasses.replace(down["kernel"], scale=small)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
      ckpt.save_gptq(tmp_path / f"m{power}", model, params)
    assert ("layers.0.mlp.down_proj.scales: " in caplog.text) == is_told
    assert ("below float16's normal range" in caplog.text) == is_told


@pytest.mark.oracle
def test_a_folder_read_by_the_format_runs_in_transformers(tmp_path):
  """transformers' own GPTQ loader needs gptqmodel (no wheel): the float64 reader stands for it, the
  rest (config, names, arithmetic) is transformers'. Act order, asymmetric, in the Llama form."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  model, params = common.build(common.config("minicpm5_1b", num_layers=2))
  cfg = gptq.GPTQConfig(group_size=16, scale_dtype="f16", act_order=True, symmetric=False)
  tokens = np.random.default_rng(0).integers(0, 256, (4, 24)).astype(np.int32)
  quant = quantize.QuantizeConfig(method="gptq", solver=cfg)
  params = quantize.quantize_model(model, params, [(tokens, np.ones_like(tokens))], quant).params
  ckpt.save_gptq(tmp_path / "m", model, params)
  hf = json.loads((tmp_path / "m/config.json").read_text())
  assert hf.pop("quantization_config")["desc_act"]
  (tmp_path / "plain").mkdir()
  (tmp_path / "plain/config.json").write_text(json.dumps(hf))
  module = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.from_pretrained(tmp_path / "plain"), dtype=torch.float32
  )
  stored, state = load_file(tmp_path / "m/model.safetensors"), {}
  for name, x in stored.items():
    base, _, part = name.rpartition(".")
    if part == "qweight":
      state[f"{base}.weight"] = float64_kernel(stored, base, "gptq").T.astype(np.float32)
    elif part == "weight":
      state[name] = np.asarray(x, np.float32)
  module.load_state_dict({n: torch.from_numpy(x.copy()) for n, x in state.items()})
  loaded, back, _ = ckpt.load_hf(tmp_path / "m")
  with torch.no_grad():
    theirs = module.eval()(torch.from_numpy(tokens).long()).logits.numpy()
  for m, p in ((model, params), (loaded, back)):
    np.testing.assert_allclose(common.apply(m, p, tokens).logits, theirs, atol=1e-4)
