"""GGUF writing: what the gguf package reads back, round trips, keys, tokenizers, refusals."""

import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.ckpt import errors, gguf_io, gguf_write
from minicpm_jax.core import trees
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import tree
from minicpm_jax.text import tokenizer

gguf = pytest.importorskip("gguf")

from tests.ckpt import gguf_files  # noqa: E402
from tests.ckpt.gguf_files import STRINGS  # noqa: E402

D, F, N, K, H, L, V = 256, 512, 4, 2, 64, 2, 40


def make(seed=0, **changes):
  """(model, params) drawn by numpy; every width is a multiple of 256."""
  fields = {
    "name": "tiny",
    "vocab_size": V,
    "model_dim": D,
    "mlp_dim": F,
    "num_layers": L,
    "num_heads": N,
    "num_kv_heads": K,
    "head_dim": H,
    "max_position": 64,
    "scale_emb": 12.0,
    "scale_depth": 1.4,
    "dim_model_base": 64,
  }
  if changes.get("arch") == "llama":
    fields |= {"scale_emb": 1.0, "scale_depth": None, "dim_model_base": None}
  model = transformer.Transformer(config.ModelConfig(**(fields | changes)))
  rng = np.random.default_rng(seed)
  shapes = trees.flatten_paths(transformer.abstract_params(model)[0])
  leaves = {
    path: (path.endswith("scale") + 0.1 * rng.normal(size=x.shape)).astype(x.dtype)
    for path, x in shapes.items()
  }
  return model, trees.unflatten(leaves)


def ternary(params, group=256):
  """Projections replaced by ternary ones with float16 scales, groups along the input."""

  def one(path, x):
    if not path.endswith("kernel") or "lm_head" in path:
      return x
    num_in = 2 if path.endswith("o/kernel") else 1
    w = x.reshape(x.shape[0], math.prod(x.shape[1 : 1 + num_in]) // group, group, -1)
    s = np.abs(w).mean(2, keepdims=True).astype(np.float16).astype(np.float32)
    return (np.clip(np.round(w / s), -1, 1) * s).reshape(x.shape)

  return trees.map_with_path(one, params)


MODELS = {
  "minicpm": {},
  "untied": {"tie_embeddings": False},
  "llama": {"arch": "llama", "head_dim": 128, "num_heads": 2, "tie_embeddings": False},
  "experts": {"moe": config.MoEConfig(num_experts=3, experts_per_token=2)},
  "linear": {"rope": config.RopeConfig(kind="linear", factor=2.0)},
  "longrope": {
    "rope": config.RopeConfig(
      kind="longrope",
      short_factor=(1.0,) * 32,
      long_factor=tuple(np.linspace(1, 3, 32).astype(np.float32).tolist()),
      original_max_position=32,
    )
  },
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "list"])
def test_round_trip(tmp_path, name, scan):
  model, params = make(**MODELS[name])
  cfg = model.cfg
  if not scan:
    cfg, params = convert.unstack_layers(cfg, params)
  path = tmp_path / "m.gguf"
  gguf_io.save_gguf(path, transformer.Transformer(cfg), params, kind="f32")
  loaded, back, tok = gguf_io.load_gguf(path, scan_layers=scan)
  assert tok is None
  expected, found = trees.flatten_paths(params), trees.flatten_paths(back)
  assert set(expected) == set(found)
  for leaf, x in expected.items():
    np.testing.assert_array_equal(np.asarray(found[leaf]), x, err_msg=leaf)
  same = ("arch", "scale_emb", "scale_depth", "dim_model_base", "head_dim", "num_kv_heads", "moe")
  for field in (*same, "tie_embeddings", "max_position", "norm_eps", "stop_ids", "bos_id"):
    assert getattr(loaded.cfg, field) == getattr(cfg, field), field
  assert (loaded.cfg.rope.kind, loaded.cfg.rope.theta) == (cfg.rope.kind, cfg.rope.theta)
  assert loaded.cfg.rope.long_factor == cfg.rope.long_factor
  if name == "longrope":  # M > O: m = sqrt(1 + ln 2 / ln 32) is stored and comes back
    m = math.sqrt(1 + math.log(2) / math.log(32))
    field = gguf.GGUFReader(path).fields["minicpm.rope.scaling.attn_factor"]
    assert math.isclose(field.contents(), m, rel_tol=1e-6)
    factor = loaded.cfg.rope.factor
    assert math.isclose(math.sqrt(1 + math.log(factor) / math.log(32)), m, rel_tol=1e-6)


@pytest.mark.parametrize("kind", gguf_write.KINDS)
def test_tensors_and_types_as_the_gguf_package_reads_them(tmp_path, kind):
  """Names, types and values against that package's quantiser and the row order worked out there."""
  model, params = make()
  if kind.startswith("tq"):
    params = ternary(params)
  path = tmp_path / "m.gguf"
  gguf_io.save_gguf(path, model, params, kind=kind)
  stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
  qtype = gguf.GGMLQuantizationType[kind.upper()]
  outer = qtype if kind in ("f32", "bf16") else gguf.GGMLQuantizationType.F16
  layers = params["layers"]
  expected = {
    "token_embd.weight": (params["embed"]["embedding"], outer),
    "output_norm.weight": (params["final_norm"]["scale"], gguf.GGMLQuantizationType.F32),
  }
  for i in range(L):
    attn, mlp = layers["attn"], layers["mlp"]
    p = f"blk.{i}."
    rows = {n: attn[n]["kernel"][i].reshape(D, -1).T for n in "qkv"}
    expected |= {
      p + "attn_q.weight": (gguf_files.interleave(rows["q"], N), qtype),
      p + "attn_k.weight": (gguf_files.interleave(rows["k"], K), qtype),
      p + "attn_v.weight": (rows["v"], qtype),
      p + "attn_output.weight": (attn["o"]["kernel"][i].reshape(-1, D).T, qtype),
    }
    for n in ("gate", "up", "down"):
      expected[f"{p}ffn_{n}.weight"] = (mlp[n]["kernel"][i].T, qtype)
    for n, ours in (("attn_norm", "attn_norm"), ("ffn_norm", "mlp_norm")):
      expected[f"{p}{n}.weight"] = (layers[ours]["scale"][i], gguf.GGMLQuantizationType.F32)
  assert set(stored) == set(expected)
  for name, (x, as_type) in expected.items():
    assert stored[name].tensor_type == as_type, name
    wanted = gguf.quantize(np.ascontiguousarray(x), as_type)
    np.testing.assert_array_equal(
      gguf.dequantize(stored[name].data, as_type), gguf.dequantize(wanted, as_type), err_msg=name
    )


def test_keys(tmp_path):
  model, params = make()
  gguf_io.save_gguf(tmp_path / "m.gguf", model, params)
  fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
  assert fields["minicpm.logit_scale"] == 4.0  # a divisor: 256 / 64
  assert fields["minicpm.embedding_scale"] == 12.0
  assert math.isclose(fields["minicpm.residual_scale"], 1.4 / math.sqrt(2), rel_tol=1e-6)
  assert fields["general.file_type"] == 1 and fields["general.architecture"] == "minicpm"
  llama, params = make(arch="llama")
  gguf_io.save_gguf(tmp_path / "l.gguf", llama, params)
  assert not [k for k in gguf.GGUFReader(tmp_path / "l.gguf").fields if k.endswith("_scale")]


@pytest.mark.parametrize(
  "generation",
  [
    {"do_sample": True, "temperature": 0.8, "top_p": 0.8},
    {"do_sample": True, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.1},
    {"repetition_penalty": 1.3},
    {"temperature": 0.8},  # greedy: llama.cpp has no word for it
    None,
  ],
)
def test_sampling_goes_round(tmp_path, generation):
  model, params = make(generation=None if generation is None else json.dumps(generation))
  gguf_io.save_gguf(tmp_path / "m.gguf", model, params)
  back = gguf_io.load_gguf(tmp_path / "m.gguf")[0].cfg.generation
  wanted = config.SamplingConfig.from_hf(generation or {})
  assert config.SamplingConfig.from_hf(back or "{}") == wanted
  fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
  names = gguf.Keys.General  # the names that llama.cpp reads
  assert math.isclose(fields.get(names.SAMPLING_TEMP, 0), wanted.temperature, rel_tol=1e-6)
  assert fields.get(names.SAMPLING_TOP_K, 0) == wanted.top_k
  penalty = fields.get(names.SAMPLING_PENALTY_REPEAT, 1)
  assert math.isclose(penalty, wanted.repetition_penalty, rel_tol=1e-6)
  if penalty != 1:
    assert fields[names.SAMPLING_PENALTY_LAST_N] == -1  # all tokens, as transformers


def test_a_sampling_key_of_the_wrong_type_is_refused(tmp_path):
  model, params = make(generation=json.dumps({"do_sample": True}))
  gguf_io.save_gguf(tmp_path / "m.gguf", model, params)
  data = (tmp_path / "m.gguf").read_bytes()
  at = data.index(b"general.sampling.temp") + len(b"general.sampling.temp") + 4
  (tmp_path / "m.gguf").write_bytes(data[:at] + np.float32(np.nan).tobytes() + data[at + 4 :])
  with pytest.raises(errors.CheckpointError, match="general.sampling.temp: found nan, expected a"):
    gguf_io.load_gguf(tmp_path / "m.gguf")


def test_padded_vocabulary_and_bf16_parameters(tmp_path):
  model, params = make()
  cfg, padded = convert.pad_vocab(model.cfg, params, 64)
  cfg = dataclasses.replace(cfg, param_dtype="bf16")
  padded = trees.cast(padded, "bfloat16")
  gguf_io.save_gguf(tmp_path / "m.gguf", transformer.Transformer(cfg), padded, kind="bf16")
  loaded, back, _ = gguf_io.load_gguf(tmp_path / "m.gguf")
  assert loaded.cfg.vocab_size == V
  rows = np.asarray(padded["embed"]["embedding"][:V], np.float32)
  np.testing.assert_array_equal(np.asarray(back["embed"]["embedding"]), rows)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_ternary_is_exact_or_refused(tmp_path, kind, caplog):
  model, params = make()
  path = tmp_path / "m.gguf"
  fused = ternary(params)
  gguf_io.save_gguf(path, model, fused, kind=kind)
  back = gguf_io.load_gguf(path)[1]
  for leaf, x in trees.flatten_paths(fused["layers"]).items():
    np.testing.assert_array_equal(np.asarray(trees.flatten_paths(back["layers"])[leaf]), x)
  before = path.read_bytes()
  for bad in (params, ternary(params, 128)):
    with pytest.raises(errors.CheckpointError, match="blk.0.attn_q.weight: found weights that"):
      gguf_io.save_gguf(path, model, bad, kind=kind)
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
  up = np.array(fused["layers"]["mlp"]["up"]["kernel"])
  up[1, :, 3] = 3e-4 * np.abs(up).max() * np.random.default_rng(0).normal(size=up.shape[1])
  small = {**fused["layers"], "mlp": {**fused["layers"]["mlp"], "up": {"kernel": up}}}
  with pytest.raises(errors.CheckpointError, match="blk.1.ffn_up.weight: found weights that"):
    gguf_io.save_gguf(path, model, {**fused, "layers": small}, kind=kind)  # one row, and small
  gguf_io.save_gguf(path, model, ternary(params, 128), kind=kind, lossy_ternary=True)
  odd, params = make(mlp_dim=320)  # rows of down are no multiple of 256
  with caplog.at_level(logging.WARNING):
    gguf_io.save_gguf(path, odd, params, kind=kind, lossy_ternary=True)
  assert "rows of 320 are no multiple of" in caplog.text
  types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
  assert (types["blk.1.ffn_down.weight"], types["blk.1.ffn_up.weight"]) == ("F16", kind.upper())


@pytest.mark.parametrize("kind, tolerance", [("q4_0", 0), ("f32", 0), ("q8_0", 2e-2)])
def test_quantised_kernels(tmp_path, kind, tolerance):
  """int4 codes with groups of whole blocks go into Q4_0 without a change; else their values do."""
  model, params = make()
  low = tree.quantize_params(
    config.QuantConfig(scheme="int4", group_size=64, weights="codes", scale_dtype="f16"),
    jax.tree.map(jnp.asarray, params),
  )
  gguf_io.save_gguf(tmp_path / "m.gguf", model, low, kind=kind)
  back = trees.flatten_paths(gguf_io.load_gguf(tmp_path / "m.gguf")[1]["layers"])
  wanted = trees.flatten_paths(tree.dequantize_params(low, "float32")["layers"])
  for leaf, x in wanted.items():
    atol = tolerance * float(np.abs(x).max())
    np.testing.assert_allclose(np.asarray(back[leaf]), x, rtol=1e-6, atol=atol, err_msg=leaf)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_of_codes_goes_into_q4_0_as_it_is(tmp_path, is_tied, caplog):
  """Without the columns that fill the vocabulary up, here twice as many as it has."""
  model, params = make(tie_embeddings=is_tied)
  params = jax.tree.map(jnp.asarray, params)
  low = tree.quantize_head(params, "int4", 64, scale_dtype="f16")
  cfg, low = convert.pad_vocab(model.cfg, low, 2 * V)
  kinds = dict(kind="f32", embedding_kind="q4_0")
  gguf_io.save_gguf(tmp_path / "m.gguf", transformer.Transformer(cfg), low, **kinds)
  back = gguf_io.load_gguf(tmp_path / "m.gguf", dtype="f32")[1]
  wanted = tree.dequantize_params(low, "float32")
  if is_tied:
    found, wanted = back["embed"]["embedding"], wanted["embed"]["embedding"][:V]
  else:
    found, wanted = back["lm_head"]["kernel"], wanted["lm_head"]["kernel"][:, :V]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  assert "rounded a second time" not in caplog.text


def test_sparse_models_become_dense_with_a_warning(tmp_path, caplog):
  model, params = make(sparse=config.SparseAttentionConfig(dense_len=128))
  with caplog.at_level(logging.WARNING):
    gguf_io.save_gguf(tmp_path / "m.gguf", model, params)
  assert "sparse from 128 tokens on" in caplog.text
  assert gguf_io.load_gguf(tmp_path / "m.gguf")[0].cfg.sparse is None


@pytest.mark.parametrize(
  "changes, kwargs, match",
  [
    ({}, {"kind": "q4_k"}, "kind: found 'q4_k', expected one of"),
    ({}, {"embedding_kind": "x"}, "embedding_kind: found 'x'"),
    ({"act": "fatrelu"}, {}, "model.act: found 'fatrelu'"),
    ({"rope": config.RopeConfig(kind="dynamic", factor=4.0)}, {}, "model.rope.kind: found 'dyn"),
    ({"arch": "llama", "scale_emb": 12.0}, {}, "fold_to_llama"),
  ],
)
def test_refusals(tmp_path, changes, kwargs, match):
  model, params = make(**changes)
  with pytest.raises(ValueError, match=match):
    gguf_io.save_gguf(tmp_path / "m.gguf", model, params, **kwargs)
  assert not list(tmp_path.iterdir())


def test_wrong_trees(tmp_path):
  model, params = make()
  bad = {**params, "final_norm": {"scale": np.ones(3, np.float32)}}
  with pytest.raises(errors.CheckpointError, match=r"final_norm/scale: found shape \(3,\)"):
    gguf_io.save_gguf(tmp_path / "m.gguf", model, bad)
  bad = {name: x for name, x in params.items() if name != "embed"}
  with pytest.raises(errors.CheckpointError, match="embed/embedding: found no such leaf"):
    gguf_io.save_gguf(tmp_path / "m.gguf", model, bad)
  huge = {**params, "embed": {"embedding": np.full((V, D), 1e6, np.float32)}}
  with pytest.raises(errors.CheckpointError, match="token_embd.weight: f16: found 1e"):
    gguf_io.save_gguf(tmp_path / "m.gguf", model, huge)


# ------------------------------------------------------------------------------- tokenizers


def small(vocab_size):
  return make(
    vocab_size=vocab_size,
    model_dim=32,
    mlp_dim=32,
    num_layers=1,
    head_dim=16,
    num_heads=2,
    num_kv_heads=2,
  )


def check_tokenizer(path, expected):
  found = gguf_io.load_gguf(path)[2]
  for text in STRINGS:
    assert found.encode(text) == expected.encode(text)
    assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))
  for trait in ("bos_id", "eos_id", "pad_id", "add_bos", "chat_template"):
    assert getattr(found, trait) == getattr(expected, trait), trait
  assert set(expected.stop_ids) <= set(found.stop_ids)


def test_sentencepiece_tokenizer(tmp_path):
  """A small model with byte fallback, control symbols and two added tokens beyond its pieces."""
  sentencepiece = pytest.importorskip("sentencepiece")
  (tmp_path / "text").write_text("\n".join(STRINGS + ["some text to learn pieces from"] * 20))
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / "text"),
    model_prefix=str(tmp_path / "tokenizer"),
    vocab_size=340,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    minloglevel=2,
  )
  added = {"<|im_end|>": 340, "<|im_start|>": 341}
  (tmp_path / "added_tokens.json").write_text(json.dumps(added))
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 340]}))
  tok = tokenizer.load_tokenizer(tmp_path)
  model, params = small(350)  # more rows than tokens: unused tokens fill them
  gguf_io.save_gguf(tmp_path / "m.gguf", model, params, tok)
  check_tokenizer(tmp_path / "m.gguf", tok)
  fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
  assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
  assert fields["tokenizer.ggml.eot_token_id"].contents() == 340


@pytest.mark.slow
def test_released_sentencepiece_tokenizer(tmp_path, shared_dir):
  pytest.importorskip("sentencepiece")
  tok = tokenizer.load_tokenizer(shared_dir / "models/minicpm4-0.5b-tokenizer")
  model, params = small(73448 + 8)
  gguf_io.save_gguf(tmp_path / "m.gguf", model, params, tok)
  check_tokenizer(tmp_path / "m.gguf", tok)


def test_byte_level_tokenizer(tmp_path):
  pytest.importorskip("tokenizers")
  tok = tokenizer.train_bpe(["some text to learn merges from, text text text"] * 3, 280)
  model, params = small(300)
  gguf_io.save_gguf(tmp_path / "m.gguf", model, params, tok)
  check_tokenizer(tmp_path / "m.gguf", tok)
  small_model, few = small(200)
  with pytest.raises(errors.CheckpointError, match="expected at most the model's 200"):
    gguf_io.save_gguf(tmp_path / "m.gguf", small_model, few, tok)
  import tokenizers

  tok.backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  with pytest.raises(errors.CheckpointError, match="pre_tokenizer: found .*Whitespace"):
    gguf_io.save_gguf(tmp_path / "m.gguf", model, params, tok)
