"""Joined projections: the same logits, the same files, and the way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.config import FP8Config, MoEConfig, QuantConfig
from minicpm_jax.core import trees
from minicpm_jax.models import convert, joined, transformer
from minicpm_jax.nn import output_major
from minicpm_jax.quant import awq, qtensor, rotate, tree
from tests.models import common

TOKENS = common.tokens((2, 24))


def logits(cfg, params):
  model = transformer.Transformer(cfg)
  return np.asarray(jax.jit(lambda p: model.apply({"params": p}, TOKENS).logits)(params))


@pytest.fixture(scope="module")
def dense():
  """Two query heads a key head, so that q, k and v differ in width."""
  cfg, params = convert.unstack_layers(*(common.config(), common.build(common.config())[1]))
  return cfg, params, logits(cfg, params)


def test_joined_model_gives_equal_logits_and_splits_back_bit_for_bit(dense):
  cfg, params, expected = dense
  new = joined.join_projections(cfg, params)
  assert set(new["layers_0"]["attn"]) == {"qkv", "o"}
  assert set(new["layers_0"]["mlp"]) == {"gate_up", "down"}
  heads = cfg.num_heads + 2 * cfg.num_kv_heads
  assert new["layers_1"]["attn"]["qkv"]["kernel"].shape == (cfg.model_dim, heads, cfg.head_dim)
  np.testing.assert_allclose(logits(cfg, new), expected, atol=1e-5)
  back = joined.split_projections(cfg, new)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert joined.split_projections(cfg, params).keys() == params.keys()


def test_stacked_layers_are_joined_too(dense):
  cfg, params, expected = dense
  cfg, params = convert.stack_layers(cfg, params)
  new = joined.join_projections(cfg, params)
  assert new["layers"]["mlp"]["gate_up"]["kernel"].shape[0] == cfg.num_layers
  np.testing.assert_allclose(logits(cfg, new), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["codes", "packed"])
@pytest.mark.parametrize("scheme,size", [("int4", 16), ("ternary", -1), ("int8", -1)])
def test_quantised_kernels_join_as_codes(dense, scheme, size, form):
  cfg = dataclasses.replace(dense[0], quant=QuantConfig(scheme=scheme, group_size=size))
  cfg, params = convert.to_codes(cfg, dense[1], form)
  new = joined.join_projections(cfg, params)
  kernel = new["layers_0"]["attn"]["qkv"]["kernel"]
  assert isinstance(kernel, qtensor.QTensor) and kernel.is_packed == (form == "packed")
  parts = [params["layers_0"]["attn"][name]["kernel"] for name in "qkv"]
  whole = np.concatenate([np.asarray(qtensor.dequantize(p)) for p in parts], axis=1)
  np.testing.assert_array_equal(qtensor.dequantize(kernel), whole)
  np.testing.assert_allclose(logits(cfg, new), logits(cfg, params), atol=1e-5)
  back = trees.flatten_paths(joined.split_projections(cfg, new))
  for path, leaf in trees.flatten_paths(params).items():
    np.testing.assert_array_equal(back[path], leaf, err_msg=path)


def test_latent_weights_and_unlike_kernels_stay_apart(dense):
  cfg, params, _ = dense
  latent = dataclasses.replace(cfg, quant=QuantConfig(scheme="ternary"))
  assert "qkv" not in joined.join_projections(latent, params)["layers_0"]["attn"]
  mixed = jax.tree.map(lambda x: x, params)
  kernel = mixed["layers_0"]["attn"]["q"]["kernel"]
  mixed["layers_0"]["attn"]["q"]["kernel"] = qtensor.quantize(kernel, "int8")
  new = joined.join_projections(cfg, mixed)
  assert "q" in new["layers_0"]["attn"] and "qkv" in new["layers_1"]["attn"]
  codes = tree.quantize_params(QuantConfig(scheme="int8", weights="codes"), params)
  for exclude, is_apart in ((("attn/v",), True), (("attn/",), False)):
    part = QuantConfig(scheme="int8", weights="codes", act_bits=8, exclude=exclude)
    new = joined.join_projections(dataclasses.replace(cfg, quant=part), codes)
    assert ("q" in new["layers_0"]["attn"]) == is_apart


QKV = r"attn/[qkv]/"


@pytest.mark.parametrize(
  "quant,block",
  [
    (QuantConfig(scheme="none", fp8=FP8Config()), {"q", "k", "v", "o"}),
    (QuantConfig(scheme="ternary", exclude=(QKV,)), {"qkv", "o"}),
    (
      QuantConfig(scheme="int8", weights="packed", include=("layers.*kernel",), exclude=(QKV,)),
      {"q", "k", "v", "o"},
    ),
  ],
  ids=["fp8", "excluded", "joined_path_included"],
)
def test_floats_are_quantised_as_before(dense, quant, block):
  cfg, params = dataclasses.replace(dense[0], quant=quant), dense[1]
  if quant.weights == "packed":
    params = tree.quantize_params(quant, params)
  new = joined.join_projections(cfg, params)
  assert set(new["layers_0"]["attn"]) == block
  np.testing.assert_allclose(logits(cfg, new), logits(cfg, params), atol=1e-5)


def test_files_are_written_of_the_split_form(dense, tmp_path):
  cfg, params, _ = dense
  model = transformer.Transformer(cfg)
  ckpt.save_hf(tmp_path / "split", model, params)
  ckpt.save_hf(tmp_path / "joined", model, joined.join_projections(cfg, params))
  one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("split", "joined"))
  assert one == other


def test_converters_split_or_refuse_the_joined_form(dense, tmp_path):
  """What rewrites kernels by name gives the split model's result, or names the joined kernel."""
  cfg, params, _ = dense
  new = joined.join_projections(cfg, params)
  quant = QuantConfig(scheme="int8", weights="codes")
  for call in (
    lambda: tree.quantize_params(quant, new),
    lambda: tree.num_weights(quant, new),
    lambda: rotate.rotate(cfg, new),
  ):
    with pytest.raises(ValueError, match=r"layers_0/attn/qkv/kernel: found joined .*attn/q/kernel"):
      call()
  mlp_only = dataclasses.replace(quant, include=("mlp/down/", "mlp/up/"))
  with pytest.raises(ValueError, match="layers_0/mlp/gate_up/kernel: found joined projections"):
    tree.quantize_params(mlp_only, new)
  down = dataclasses.replace(quant, include=("mlp/down/",))  # no part of a joined kernel
  assert tree.num_weights(down, new) == cfg.num_layers * cfg.mlp_dim * cfg.model_dim
  t_D, t_F = jnp.ones(cfg.model_dim), jnp.ones(cfg.mlp_dim)
  for call in (
    lambda layer: awq.fold_norm(layer, "attn_norm", ("attn/q", "attn/k", "attn/v"), t_D),
    lambda layer: awq.fold_up_down(layer, t_F),
  ):
    with pytest.raises(ValueError, match="^attn/qkv/kernel: found joined projections"):
      call(new["layers_0"])
    call(params["layers_0"])
  with pytest.raises(ValueError, match=r"attn_norm: kernels: found \['attn/q'\], expected all"):
    awq.fold_norm(params["layers_0"], "attn_norm", ("attn/q",), t_D)

  def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

  moe, key = MoEConfig(num_experts=2, experts_per_token=1), jax.random.key(0)
  same(*(convert.upcycle(cfg, p, key, moe)[1] for p in (new, params)))
  codes = dataclasses.replace(cfg, quant=QuantConfig(scheme="int4", group_size=16))
  same(*(convert.to_codes(codes, p)[1] for p in (new, params)))
  orbax_io.import_params(tmp_path / "run", cfg, new)
  same(ckpt.load_run(tmp_path / "run")[1], params)


def test_upcycled_codes_and_quantised_kernels_by_name(dense):
  """Experts of a quantised model are its codes; what wants floats names the QTensor."""
  cfg, params, _ = dense
  low = tree.quantize_params(QuantConfig(scheme="int8", weights="packed"), params)
  new_cfg, new = convert.upcycle(cfg, low, jax.random.key(0), MoEConfig(num_experts=3))
  assert new["layers_0"]["moe"]["up"]["kernel"].codes.shape[0] == 3
  np.testing.assert_allclose(logits(new_cfg, new), logits(cfg, low), atol=1e-5)
  with pytest.raises(ValueError, match="layers_0/attn/k/kernel: found a QTensor .int8., expected"):
    rotate.rotate(cfg, low)
  with pytest.raises(ValueError, match="found a QTensor"):
    awq.fold_up_down(low["layers_0"], jnp.ones(cfg.mlp_dim))


def test_output_major_kernels_give_equal_logits_and_come_back(dense, tmp_path):
  cfg, params, expected = dense
  new = joined.store_by_output(cfg, joined.join_projections(cfg, params))
  attn = new["layers_0"]["attn"]
  heads = cfg.num_heads + 2 * cfg.num_kv_heads
  assert attn["qkv"]["kernel"].values.shape == (heads, cfg.head_dim, cfg.model_dim)
  assert attn["o"]["kernel"].values.shape == (cfg.model_dim, cfg.num_heads, cfg.head_dim)
  kernel = np.asarray(params["layers_0"]["attn"]["o"]["kernel"])
  np.testing.assert_array_equal(attn["o"]["kernel"].values, np.moveaxis(kernel, 2, 0))
  np.testing.assert_allclose(logits(cfg, new), expected, atol=1e-5)
  again = joined.store_by_output(cfg, new)
  assert jax.tree.structure(again) == jax.tree.structure(new)
  back = joined.split_projections(cfg, new)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  model = transformer.Transformer(cfg)
  ckpt.save_hf(tmp_path / "a", model, params)
  ckpt.save_hf(tmp_path / "b", model, new)
  one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
  assert one == other


def test_output_major_form_is_of_floats_that_run_as_they_are(dense):
  cfg, params, _ = dense
  latent = dataclasses.replace(cfg, quant=QuantConfig(scheme="ternary", include=("attn/o/",)))
  new = joined.store_by_output(latent, joined.join_projections(latent, params))["layers_0"]
  assert isinstance(new["attn"]["o"]["kernel"], jax.Array)
  assert isinstance(new["mlp"]["down"]["kernel"], output_major.OutputMajor)
  with pytest.raises(ValueError, match="scan_layers: found stacked layers"):
    joined.store_by_output(dataclasses.replace(cfg, scan_layers=True), params)
  apart = joined.store_by_output(cfg, params)  # nothing joined: not this form
  assert isinstance(apart["layers_0"]["attn"]["o"]["kernel"], jax.Array)
  wrong = joined.store_by_output(cfg, joined.join_projections(cfg, params))
  down = QuantConfig(scheme="int8", weights="codes", include=("mlp/down/",))
  with pytest.raises(ValueError, match="mlp/down/kernel/values: found a kernel in the form of dec"):
    tree.quantize_params(down, wrong)
  for call in (
    lambda: rotate.rotate(cfg, wrong),
    lambda: awq.fold_up_down(wrong["layers_0"], jnp.ones(cfg.mlp_dim)),
  ):
    with pytest.raises(ValueError, match="/kernel/values: found a kernel in the form of decoding"):
      call()
  llama_cfg, llama = convert.fold_to_llama(cfg, wrong)  # o and down carry the residual scale
  np.testing.assert_allclose(logits(llama_cfg, llama), dense[2], atol=1e-4)
  _, back = convert.unfold_from_llama(
    llama_cfg, joined.store_by_output(llama_cfg, joined.join_projections(llama_cfg, llama)), cfg
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), back, params)
  wrong["layers_0"]["mlp"]["down"]["kernel"] = output_major.store(jnp.zeros((3, 2)))
  with pytest.raises(ValueError, match=r"layers_0/mlp/down/kernel: found shape \(3, 2\), expected"):
    logits(cfg, wrong)
