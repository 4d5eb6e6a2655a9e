"""A head of codes: values of the table, tokens of the model whose head is its floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _models
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.config.quant import EMBEDDING, HEAD, PROJECTIONS
from minicpm_jax.core import trees
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import frspec, generate
from minicpm_jax.infer.drafters import base, eagle
from minicpm_jax.models import convert, transformer
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.nn import layers
from minicpm_jax.quant import qat, qtensor, ternary, tree
from tests.infer import small
from tests.models import common

PROMPT = [5, 17, 20, 3, 9]
SAMPLING = config.SamplingConfig(max_new_tokens=10, temperature=0.8, seed=3)
V, SLOW = small.VOCAB, pytest.mark.slow


def rounded(table_VD, high, steps, g):
  """The scheme's rule, a row and group at a time; quotients in float32, where ties are decided."""
  out = np.zeros(table_VD.shape)
  for v, row in enumerate(table_VD):
    for k in range(0, len(row), g):
      part = row[k : k + g]
      s = np.abs(part).max() / np.float32(steps)
      out[v, k : k + g] = np.float64(s) * np.clip(np.rint(part / s), -high - 1, high)
  return out


@pytest.mark.parametrize("scheme, g, high, steps", [("int8", -1, 127, 127), ("int4", 8, 7, 7.5)])
def test_table_is_rounded_along_its_width(scheme, g, high, steps):
  table = np.random.default_rng(0).normal(size=(37, 16)).astype(np.float32)
  found = tree.quantize_head({"embed": {"embedding": jnp.asarray(table)}}, scheme, g)
  qt = found["embed"]["embedding"]
  expected = rounded(table, high, steps, 16 if g == -1 else g)
  assert qt.is_packed and qt.full_shape == (37, 16) and qt.shape == (16, 37)
  np.testing.assert_allclose(qtensor.dequantize(qt), expected, atol=2e-6)
  np.testing.assert_allclose(qtensor.dequantize(qtensor.unpack(qt)), expected, atol=2e-6)
  ids = jnp.asarray([[3, 36, 0], [3, 1, 1]])
  np.testing.assert_allclose(qtensor.rows(qt, ids, jnp.float32), expected[ids], atol=2e-6)
  x = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)
  np.testing.assert_allclose(qtensor.matmul(x, qt), x @ expected.T, atol=2e-5)
  some = qtensor.outputs(qt.replace(is_table=False), np.asarray([9, 2]))
  np.testing.assert_allclose(qtensor.dequantize(some), expected[[9, 2]].T, atol=2e-6)
  with pytest.raises(ValueError, match="expected the codes of a table"):
    qtensor.rows(qt.replace(is_table=False), ids, jnp.float32)


def low(is_tied, scheme="int8", size=-1, **fields):
  """(model, params with the head as codes, the same with it dequantised)."""
  model, params = small.make(tie_embeddings=is_tied, **fields)
  codes = tree.quantize_head(params, scheme, size)
  low_leaves = trees.flatten_paths(codes, qtensor.is_qtensor)
  name = "embed/embedding" if is_tied else "lm_head/kernel"
  assert [path for path, x in low_leaves.items() if qtensor.is_qtensor(x)] == [name]
  floats = tree.dequantize_params(codes)
  assert jax.tree.map(jnp.shape, floats) == jax.tree.map(jnp.shape, params)
  return model, codes, floats


@pytest.mark.slow  # `test_drafts_read_the_codes` decodes too
@pytest.mark.parametrize("is_tied, scheme, size", [(True, "int4", 8), (False, "int8", -1)])
def test_tokens_are_those_of_the_dequantised_head(is_tied, scheme, size):
  model, codes, floats = low(is_tied, scheme, size)
  ids = jnp.asarray([PROMPT])
  logits = [jax.jit(model.apply)({"params": p}, ids).logits for p in (codes, floats)]
  np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
  assert logits[0].dtype == jnp.float32
  found, expected = (
    generate.generate(*generate.for_decoding(model, p), [PROMPT], SAMPLING) for p in (codes, floats)
  )
  assert found.tokens == expected.tokens
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_bf16_hidden_states_give_float32_logits():
  """Rounded to bfloat16, a third of the best tokens would be ties."""
  model, codes, _ = low(True, "int8")
  h_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 16)), jnp.bfloat16)
  logits = model.apply({"params": codes}, h_BTD, method="unembed")
  table = np.asarray(qtensor.dequantize(codes["embed"]["embedding"]), np.float64)
  divided = (h_BTD / model.cfg.logit_divisor).astype(jnp.float32)
  exact = np.asarray(divided, np.float64) @ table.T
  assert logits.dtype == jnp.float32
  assert np.abs(logits - exact).max() < 2**-12 * np.abs(exact).max()


@pytest.mark.parametrize("is_tied, has_fr", [(True, False), pytest.param(False, True, marks=SLOW)])
def test_drafts_read_the_codes(is_tied, has_fr):
  """The same trees as with the dequantised head: as many tokens accepted in every round."""
  model, codes, floats = low(is_tied, "int4", 16)
  cfg = draft_lib.for_target(model.cfg, "minicpm")
  rng = np.random.default_rng(0)
  shapes, _ = draft_lib.abstract_params(cfg)
  weights = trees.map_with_path(
    lambda path, x: jnp.asarray(path.endswith("scale") + 0.1 * rng.normal(size=x.shape), "float32"),
    shapes,
  )
  fr_ids = rng.permutation(V)[:40] if has_fr else None
  sizes, found = dict(num_levels=2, top_k=4, num_nodes=10), []
  for params in (codes, floats):
    drafter, draft = eagle.make(
      draft_lib.Draft(cfg, weights), model, params, fr_ids=fr_ids, **sizes
    )
    assert qtensor.is_qtensor(draft["head_DR"]) == (has_fr and params is codes)
    small_cfg = config.EngineConfig(capacity=64, min_span=64)
    engine = engine_lib.Engine(model, params, small_cfg, drafter=drafter, draft_params=draft)
    found.append(engine.generate([PROMPT], SAMPLING))
  assert found[0].tokens == found[1].tokens
  assert found[0].stats[0].accepted == found[1].stats[0].accepted
  plain = generate.generate(model, codes, [PROMPT], SAMPLING)
  assert found[0].tokens == plain.tokens


def test_a_padded_head_of_codes_proposes_no_padding():
  model, codes, floats = low(False, "int8")
  cfg = draft_lib.for_target(model.cfg, "minicpm")
  shapes, _ = draft_lib.abstract_params(cfg)
  draft = draft_lib.Draft(cfg, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
  for params in (codes, floats):
    padded, params = convert.pad_vocab(model.cfg, params, 8)
    with pytest.raises(frspec.FrIndexError, match=f"found id {V}, expected 0..{V - 1}"):
      eagle.make(draft, transformer.Transformer(padded), params, fr_ids=[0, V])


def test_conversions_keep_the_function():
  """Embedding and head of every form are those of the floats, changed in the same way."""
  model, codes, floats = low(True, "int4", 8)
  for change in (convert.untie, lambda c, p: convert.pad_vocab(c, p, 8), convert.fold_to_llama):
    (cfg, found), (_, expected) = change(model.cfg, codes), change(model.cfg, floats)
    heads = [transformer.head_weight(cfg, p) for p in (found, expected)]
    np.testing.assert_allclose(*heads, atol=1e-6)
    table = qtensor.dequantize(found["embed"]["embedding"])
    np.testing.assert_allclose(table, expected["embed"]["embedding"], atol=1e-6)
  padded = convert.pad_vocab(model.cfg, codes, 8)
  assert padded[0].padded_vocab_size == 64
  for params in (padded[1], convert.pad_vocab(model.cfg, floats, 8)[1]):
    base.check_params(padded[0], params, "params")  # what an engine takes
  back = convert.unpad_vocab(*padded)[1]
  jax.tree.map(np.testing.assert_array_equal, back, codes)


@pytest.mark.slow
def test_files_hold_the_floats_it_stands_for(tmp_path):
  model, params = common.build(common.config())
  quant = config.QuantConfig(scheme="int4", group_size=16, weights="codes", scale_dtype="f16")
  codes = tree.quantize_head(tree.quantize_params(quant, params), "int8", scale_dtype="f16")
  expected = tree.dequantize_params(codes)["embed"]["embedding"]  # of the type of the scales
  ckpt.save_hf(tmp_path / "hf", model, codes, dtype="f32")
  ckpt.save_gptq(tmp_path / "gptq", model, codes, dtype="f32")
  for name in ("hf", "gptq"):
    found = ckpt.load_hf(tmp_path / name, dtype="f32")[1]["embed"]["embedding"]
    np.testing.assert_array_equal(found, expected)


def stored(is_tied):
  """(model whose config selects its head or table too, its packed params)."""
  include = (PROJECTIONS, EMBEDDING if is_tied else HEAD)
  quant = config.QuantConfig(scheme="int4", group_size=16, weights="packed", include=include)
  cfg = dataclasses.replace(common.config(), tie_embeddings=is_tied)
  params = common.build(cfg)[1]
  model = transformer.Transformer(dataclasses.replace(cfg, quant=quant))
  return model, tree.quantize_params(quant, params)


def test_a_table_becomes_codes_once():
  """Of 61 rows in groups of 8 of its 16 channels; what is rounded along these is refused."""
  model, params = small.make()
  quant = config.QuantConfig(scheme="int4", group_size=8, include=(EMBEDDING,))
  cfg = dataclasses.replace(model.cfg, quant=quant)
  _, codes = convert.to_codes(cfg, params, "packed")
  jax.tree.map(np.testing.assert_array_equal, codes, tree.quantize_head(params, "int4", 8))
  for scheme, size in (("int4", 16), ("ternary", 8)):
    quant = config.QuantConfig(scheme=scheme, group_size=size, include=(EMBEDDING,))
    fused = tree.dequantize_params(tree.quantize_head(params, scheme, size))
    with pytest.raises(ternary.FusedWeightsError, match="embed/embedding: found weights that are"):
      convert.to_codes(dataclasses.replace(cfg, quant=quant), fused)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_config_foresees_the_codes(is_tied):
  model, codes = stored(is_tied)
  shapes, specs = transformer.abstract_params(model)
  form = lambda x: (x.shape, x.dtype)  # noqa: E731
  assert jax.tree.map(form, shapes) == jax.tree.map(form, codes)
  head = specs["embed"]["embedding"] if is_tied else specs["lm_head"]["kernel"]
  assert tuple(head.codes)[-1] == tuple(head.scale)[-1] == "vocab"


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True])
def test_checkpoints_hold_the_codes(tmp_path, is_tied):
  model, codes = stored(is_tied)
  orbax_io.import_params(tmp_path / "run", model.cfg, codes)
  jax.tree.map(np.testing.assert_array_equal, orbax_io.load_run(tmp_path / "run")[1], codes)


def test_what_cannot_be_is_named():
  model, params = small.make()
  with pytest.raises(ValueError, match=r"embed/embedding: .*found 5, expected"):
    tree.quantize_head(params, "int4", 5)
  codes = tree.quantize_head(params)
  with pytest.raises(ValueError, match="embed/embedding: found a QTensor"):
    tree.quantize_head(codes)
  ids = jnp.asarray([PROMPT])
  wrong = tree.quantize_head({"embed": {"embedding": params["embed"]["embedding"][:-1]}})
  with pytest.raises(ValueError, match=r"embed/embedding: found a QTensor of shape \(60, 16\)"):
    model.apply({"params": {**params, **wrong}}, ids)
  latent = config.QuantConfig(scheme="int8", include=(PROJECTIONS, EMBEDDING))
  trained = transformer.Transformer(dataclasses.replace(model.cfg, quant=latent))
  with pytest.raises(ValueError, match="embed/embedding: quant.include selects it with weights"):
    trained.apply({"params": params}, ids)
  with pytest.raises(ValueError, match="embed/embedding: quant.include selects it with weights"):
    qat.prepare(latent, params, jnp.float32)
  untied, params = small.make(tie_embeddings=False)
  latent = dataclasses.replace(latent, include=(HEAD,))
  trained = transformer.Transformer(dataclasses.replace(untied.cfg, quant=latent))
  with pytest.raises(ValueError, match="lm_head/kernel: quant.include selects it with weights"):
    trained.apply({"params": params}, ids)


def test_the_flag_divides_the_width():
  model, params = small.make()  # of 16 channels
  qt = _models.with_low_head(model, params, "int4")["embed"]["embedding"]
  assert (qt.scheme, qt.group_size, qt.num_groups) == ("int4", 16, 1)
  qt = _models.with_low_head(model, params, "int8")["embed"]["embedding"]
  assert (qt.scheme, qt.num_groups) == ("int8", 1)
  found = layers.embedded(qt, jnp.asarray([[4]]), jnp.float32)
  np.testing.assert_allclose(found[0, 0], params["embed"]["embedding"][4], atol=0.02)
