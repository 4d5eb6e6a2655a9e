"""Traps of low-bit files (quantization.md 2 and 8, inference.md 20.1): read right, or refused."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minicpm_jax import ckpt
from minicpm_jax.ckpt import errors, gguf_write, orbax_io
from minicpm_jax.config import MeshConfig, QuantConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.deploy import quantize
from minicpm_jax.infer import generate
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import gguf_types, gptq, int4, qtensor, ternary, tree
from tests.models import common

TOKENS = common.tokens((1, 12))


def act_ordered(seed=0, symmetric=True):
  """(model, params): int4 kernels whose groups are drawn, one set of groups for each input."""
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=2))
  rng = np.random.default_rng(seed)

  def one(path, w, *, num_in, num_lead):
    block = path.split("/")[-2]
    own = np.random.default_rng((seed, {"o": 1, "down": 2}.get(block, 0)))  # q, k, v: one input
    size, lead = 8, w.shape[:num_lead]
    width = int(np.prod(w.shape[num_lead : num_lead + num_in]))
    groups = (*lead, width // size, *w.shape[num_lead + num_in :])
    index = np.stack([own.permutation(np.arange(width) // size) for _ in range(lead[0])])
    return qtensor.make(
      rng.integers(-8, 8, w.shape),
      jnp.asarray(rng.uniform(0.02, 0.1, groups), jnp.float16),
      "int4",
      group_size=size,
      num_in=num_in,
      num_lead=num_lead,
      g_idx=index,
      zero=None if symmetric else rng.integers(-8, 8, groups),
    )

  return model, tree.map_kernels(one, QuantConfig(), params)


def logits(model, params):
  return np.asarray(jax.jit(lambda p: model.apply({"params": p}, TOKENS).logits)(params))


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_decodes_by_sorted_groups(tmp_path, symmetric):
  """The decoding form permutes inputs alone: packed matmuls, the floats' logits, the same file."""
  model, params = act_ordered(symmetric=symmetric)
  expected = logits(model, tree.dequantize_params(params, jnp.float32))
  fast, low = generate.for_decoding(model, params)
  kernels = [x for x in jax.tree.leaves(low, is_leaf=qtensor.is_qtensor) if qtensor.is_qtensor(x)]
  assert len(kernels) == 2 * 4  # q|k|v and gate|up joined: their groups are equal
  assert all(qtensor.has_packed_matmul(x) and x.order is not None for x in kernels)
  np.testing.assert_allclose(logits(fast, low), expected, atol=1e-5)
  for name, one in (("a", (model, params)), ("b", (fast, low))):
    ckpt.save_gptq(tmp_path / name, *one)
  a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
  assert set(a) == set(b)
  for name, x in a.items():
    if "proj" in name:
      np.testing.assert_array_equal(b[name], x, err_msg=name)


def test_kernels_of_different_act_order_stay_apart():
  model, params = act_ordered()
  cfg, params = convert.unstack_layers(model.cfg, params)
  k = params["layers_0"]["attn"]["k"]["kernel"]
  params["layers_0"]["attn"]["k"]["kernel"] = k.replace(g_idx=k.g_idx[::-1])
  model = transformer.Transformer(cfg)
  expected = logits(model, tree.dequantize_params(params, jnp.float32))
  fast, low = generate.for_decoding(model, params)
  assert "k" in low["layers_0"]["attn"] and "qkv" in low["layers_1"]["attn"]
  np.testing.assert_allclose(logits(fast, low), expected, atol=1e-5)


def test_sorted_groups_are_the_same_tensor():
  """Values from the definition; stacked layers, an output projection, groups of unequal size."""
  rng = np.random.default_rng(0)
  codes, scale = rng.integers(-8, 8, (3, 4, 2, 5)), rng.random((3, 2, 5)).astype(np.float32)
  g_idx = np.stack([rng.permutation(np.arange(8) // 4) for _ in range(3)])
  more = dict(group_size=4, num_in=2, num_lead=1)
  qt = qtensor.make(codes, jnp.asarray(scale), "int4", g_idx=g_idx, **more)
  found = qtensor.sort_groups(qt)
  assert found.g_idx is None and found.is_packed and found.codes.shape == (3, 4, 5)
  wanted = np.stack([s[g] for s, g in zip(scale, g_idx, strict=True)]) * codes.reshape(3, 8, 5)
  np.testing.assert_allclose(qtensor.dequantize(found), wanted.reshape(codes.shape), rtol=1e-6)
  back = qtensor.unpack(found)
  assert jax.tree.structure(back) == jax.tree.structure(qt)
  jax.tree.map(np.testing.assert_array_equal, back, qt)
  x = rng.normal(size=(6, 4, 2)).astype(np.float32)
  one = jax.tree.map(lambda leaf: leaf[1], found)
  product = x.reshape(6, 8).astype(np.float64) @ wanted[1]
  np.testing.assert_allclose(qtensor.matmul(jnp.asarray(x), one), product, rtol=1e-5, atol=1e-5)
  odd = qtensor.make(codes, jnp.asarray(scale), "int4", g_idx=np.maximum(g_idx, 1), **more)
  assert qtensor.sort_groups(odd) is odd


@pytest.mark.parametrize("weights", ["codes", "packed"])
def test_act_order_and_zero_points_go_through_a_run_folder(tmp_path, weights):
  """Arrays that no config foresees; the form of decoding comes back in that of the config."""
  model, params = act_ordered(symmetric=False)
  ckpt.save_gptq(tmp_path / "m", model, params)
  model, params, _ = ckpt.load_hf(tmp_path / "m")
  cfg, params = convert.to_codes(model.cfg, params, weights)
  model = transformer.Transformer(cfg)
  orbax_io.import_params(tmp_path / "a", model.cfg, params)
  mesh = mesh_lib.make_mesh(MeshConfig(tp=2, fsdp=2, dp=1), jax.devices()[:4])
  for found in (ckpt.load_run(tmp_path / "a")[1], ckpt.load_run(tmp_path / "a", mesh=mesh)[1]):
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
  fast, low = generate.for_decoding(model, params)
  orbax_io.import_params(tmp_path / "b", fast.cfg, low)
  found, wanted = ckpt.load_run(tmp_path / "b")[1], convert.unstack_layers(model.cfg, params)[1]
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_codes_that_a_run_folder_could_not_give_back_are_refused(tmp_path):
  model, params = act_ordered()
  with pytest.raises(errors.CheckpointError, match="attn/k/kernel: found a QTensor .int4., expec"):
    orbax_io.import_params(tmp_path / "a", model.cfg, params)
  quant = QuantConfig(scheme="int4", group_size=8, weights="codes", scale_dtype="bf16")
  with pytest.raises(errors.CheckpointError, match="k/kernel/scale: found float16 scales that mod"):
    orbax_io.import_params(tmp_path / "a", dataclasses.replace(model.cfg, quant=quant), params)
  for wrong in ({"scheme": "five"}, {"group_size": 16}):  # five: arrays of the same types
    quant = QuantConfig(**{"scheme": "half", "group_size": 8, "weights": "codes"} | wrong)
    latent = dataclasses.replace(quant, scheme="half", group_size=8, weights="latent")
    floats = common.build(model.cfg)[1]
    codes = convert.to_codes(dataclasses.replace(model.cfg, quant=latent), floats)[1]
    with pytest.raises(errors.CheckpointError, match="k/kernel: found 'half' codes in 4 groups"):
      orbax_io.import_params(tmp_path / "a", dataclasses.replace(model.cfg, quant=quant), codes)
  assert not (tmp_path / "a").exists()


def folder_of(tmp_path, model, params, drop="", **settings):
  """A GPTQ folder with settings replaced and tensors whose name ends in `drop` left out."""
  ckpt.save_gptq(tmp_path / "m", model, params)
  hf = json.loads((tmp_path / "m/config.json").read_text())
  hf["quantization_config"] |= settings
  (tmp_path / "m/config.json").write_text(json.dumps(hf))
  tensors = load_file(tmp_path / "m/model.safetensors")
  kept = {n: x for n, x in tensors.items() if not drop or not n.endswith(drop)}
  save_file(kept, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
  return tmp_path / "m"


def test_act_order_without_its_index_is_refused(tmp_path):
  """Consecutive groups would be a wrong guess, unless scales are static."""
  model, params = act_ordered()
  path = folder_of(tmp_path, model, params, drop="g_idx")
  with pytest.raises(
    errors.CheckpointError, match="proj.g_idx: found no such tensor, expected the"
  ):
    ckpt.load_hf(path)
  path = folder_of(tmp_path, model, params, drop="g_idx", static_groups=True)
  assert ckpt.load_hf(path)[1]["layers"]["attn"]["q"]["kernel"].g_idx is None


def test_one_group_for_each_output_and_act_order(tmp_path):
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
  solver = gptq.GPTQConfig(group_size=-1, act_order=True, symmetric=False, scale_dtype="f16")
  tokens = np.random.default_rng(0).integers(0, 256, (4, 24)).astype(np.int32)
  cfg = quantize.QuantizeConfig(method="gptq", solver=solver)
  low = quantize.quantize_model(model, params, [(tokens, np.ones_like(tokens))], cfg).params
  _, back, _ = ckpt.load_hf(folder_of(tmp_path, model, low))
  assert jax.tree.structure(back["layers"]) == jax.tree.structure(low["layers"])
  jax.tree.map(np.testing.assert_array_equal, back, low)


@pytest.mark.parametrize("g", [16, 64])
def test_ternary_weights_are_refused_whatever_their_group_size(g):
  """Quantised again by channel they would shrink; the config cannot know the group size."""
  quant = QuantConfig(scheme="ternary", group_size=-1)
  model, params = common.build(common.config("minicpm4_0p5b", model_dim=64, quant=quant))
  ternary.check_latent(quant, params)
  fine = dataclasses.replace(quant, group_size=g, weights="codes", include=("up/kernel",))
  fused = tree.dequantize_params(tree.quantize_params(fine, params), jnp.bfloat16)
  with pytest.raises(
    ternary.FusedWeightsError, match="mlp/up/kernel: found weights that are quant"
  ):
    convert.to_codes(model.cfg, fused)
  jax.eval_shape(lambda p: convert.to_codes(model.cfg, p)[1], fused)  # traced: no host check


def test_codes_of_16_bit_weights_are_those_of_the_same_values_in_float32():
  """Statistics are float32 whatever the weights are, in every way that codes are made."""
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=1))
  low = trees.cast(params, "bfloat16")
  wide = trees.cast(low, "float32")
  for scheme in ("ternary", "int4", "int8"):
    quant = QuantConfig(scheme=scheme, group_size=8, weights="codes")
    a, b = (tree.quantize_params(quant, p)["layers"]["mlp"] for p in (low, wide))
    jax.tree.map(np.testing.assert_array_equal, a, b)
  cfg16 = dataclasses.replace(model.cfg, param_dtype="bf16")
  rtn = quantize.QuantizeConfig(method="rtn", solver=gptq.GPTQConfig(group_size=8))
  models = (transformer.Transformer(cfg16), low), (model, wide)
  a, b = (quantize.quantize_model(m, p, [], rtn).params["layers"]["attn"] for m, p in models)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_recovering_groups_of_zeros_and_the_two_ends_of_the_int4_grid():
  """-8 and 7 as the largest code, one group of zeros, in bf16."""
  codes = np.random.default_rng(0).integers(-6, 7, (96, 4))
  codes[0], codes[32], codes[64:] = -8, 7, 0
  scale = np.asarray([[0.011], [0.37], [1.0]], np.float32) * np.ones((1, 4), np.float32)
  fused = (codes * np.repeat(scale, 32, axis=0)).astype(np.float32)
  found = int4.recover(jnp.asarray(fused, jnp.bfloat16), 32)
  np.testing.assert_array_equal(found.codes, codes)
  np.testing.assert_allclose(found.scale[:2], scale[:2], rtol=2**-7)
  np.testing.assert_allclose(qtensor.dequantize(found), fused, rtol=2**-7)


# ---------------------------------------------------------------------------------------- GGUF


def gguf_model(**changes):
  pytest.importorskip("gguf")
  return common.build(common.config("minicpm4_0p5b", num_layers=1, **changes))


def test_a_head_that_the_config_does_not_know_is_not_dropped(tmp_path):
  model, params = gguf_model()
  _, untied = convert.untie(model.cfg, params)
  with pytest.raises(
    errors.CheckpointError, match="lm_head/kernel: found a leaf that the model do"
  ):
    ckpt.save_gguf(tmp_path / "m.gguf", model, untied)


def test_latent_weights_are_not_written_as_the_model(tmp_path):
  quant = QuantConfig(scheme="ternary")
  model, params = gguf_model(quant=quant)
  with pytest.raises(errors.CheckpointError, match="kernel: found latent weights .*convert.fuse"):
    ckpt.save_gguf(tmp_path / "m.gguf", model, params, kind="f32")
  expected = logits(model, params)
  for change in (convert.fuse, convert.to_codes):
    cfg, forward = change(model.cfg, params)
    ckpt.save_gguf(tmp_path / "m.gguf", transformer.Transformer(cfg), forward, kind="f32")
    np.testing.assert_allclose(
      logits(*ckpt.load_gguf(tmp_path / "m.gguf")[:2]), expected, atol=1e-4
    )


def test_a_gptq_folder_becomes_a_gguf_file(tmp_path, caplog):
  """Codes as they are, those of experts too; rows of 48 no block of 32 fits: F16; other groups and
  zero points are rounded again, which is said."""
  gguf = pytest.importorskip("gguf")
  changes = dict(model_dim=64, mlp_dim=48, num_layers=1)
  model, params = common.build(common.config("minicpm_moe_8x2b", **changes))
  quant = QuantConfig(scheme="int4", group_size=16, weights="codes", scale_dtype="f16")
  coarse = dataclasses.replace(quant, group_size=32, exclude=("down",))
  low = tree.quantize_params(coarse, params)
  low = tree.quantize_params(dataclasses.replace(quant, include=("down/kernel",)), low)
  with caplog.at_level(logging.WARNING):
    ckpt.save_gguf(tmp_path / "m.gguf", model, low, kind="q4_0")
  assert "rows of 48 are no multiple of" in caplog.text and "second time" not in caplog.text
  types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
  assert types["blk.0.ffn_down_exps.weight"] == "F16" and types["blk.0.attn_q.weight"] == "Q4_0"
  back = trees.flatten_paths(ckpt.load_gguf(tmp_path / "m.gguf")[1]["layers"])
  wanted = trees.flatten_paths(tree.dequantize_params(low, jnp.float32)["layers"])
  for path, x in wanted.items():
    np.testing.assert_allclose(back[path], x, rtol=2**-10, atol=1e-7, err_msg=path)
  with caplog.at_level(logging.WARNING):
    fine = tree.quantize_params(quant, params)
    ckpt.save_gguf(tmp_path / "m.gguf", model, fine, kind="q4_0")
  assert "kernels are rounded a second time" in caplog.text
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    ckpt.save_gguf(tmp_path / "m.gguf", model, low, kind="q8_0")
  assert "kernels are rounded a second time" in caplog.text


@pytest.mark.parametrize("scheme, limit", [("int4", 2**-6), ("ternary", 2**-11)])
def test_which_codes_q8_0_holds(scheme, limit):
  """Codes times a scale in blocks of 32: seven levels are no multiples of 1/127, one is."""
  w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  qt = qtensor.quantize(jnp.asarray(w), scheme, 32)
  x = np.ascontiguousarray(np.asarray(qtensor.dequantize(qt)).T)
  off = np.abs(gguf_types.unpack(gguf_types.pack(x, "q8_0"), "q8_0") - x).max() / np.abs(x).max()
  assert 0 < off <= limit and gguf_write._fits("q8_0", qt) == (off < 2**-10)


def test_a_loaded_gptq_model_is_exported_with_its_own_config(tmp_path):
  model, params = gguf_model(model_dim=64, mlp_dim=64)
  quant = QuantConfig(scheme="int4", group_size=32, weights="codes", scale_dtype="f16")
  ckpt.save_gptq(tmp_path / "m", model, tree.quantize_params(quant, params))
  loaded, low, _ = ckpt.load_hf(tmp_path / "m")
  assert loaded.cfg.quant.weights == "codes"
  ckpt.save_gguf(tmp_path / "m.gguf", loaded, low, kind="q4_0", embedding_kind="f32")
  found = logits(*ckpt.load_gguf(tmp_path / "m.gguf")[:2])
  np.testing.assert_allclose(found, logits(loaded, low), atol=1e-4)
