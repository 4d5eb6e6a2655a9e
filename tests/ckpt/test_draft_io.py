"""Synthetic draft folders under released names (inference.md 22.11): load, save, refusals."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st

from minicpm_jax import ckpt
from minicpm_jax.align import draft_export
from minicpm_jax.ckpt import draft_io, errors
from minicpm_jax.core import trees
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.quant import marlin, qtensor
from minicpm_jax.quant import tree as quant_tree
from tests.models import common
from tests.models import test_draft as oracle

D, F, N, K, H, V, R = 32, 48, 4, 2, 8, 256, 40
MLP = ("gate", "up", "down")
CONFIG = {
  "hidden_size": D,
  "intermediate_size": F,
  "num_attention_heads": N,
  "num_key_value_heads": K,
  "num_hidden_layers": 1,
  "rms_norm_eps": 1e-5,
  "vocab_size": V,
}


def layer_tensors(rng, prefix, in_dim):
  shapes = {
    "self_attn.q_proj": (N * H, in_dim),
    "self_attn.k_proj": (K * H, in_dim),
    "self_attn.v_proj": (K * H, in_dim),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
    "post_attention_layernorm": (D,),
  }
  return {f"{prefix}.{n}.weight": rng.normal(0, 0.2, s) for n, s in shapes.items()}


def released(kind):
  rng = np.random.default_rng(3)
  more = {"embed_tokens.weight": (V, D)}
  if kind == "eagle":
    more |= {"fc.weight": (D, 2 * D), "fc.bias": (D,)}
    tensors = layer_tensors(rng, "layers.0", D)
  elif kind == "minicpm":
    more |= {"fc.weight": (D, 2 * D), "input_norm1.weight": (D,), "input_norm2.weight": (D,)}
    more["layers.0.input_layernorm.weight"] = (D,)
    tensors = layer_tensors(rng, "layers.0", D)
  else:
    more |= {"fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (R, D)}
    more |= {f"midlayer.{n}.weight": (D,) for n in ("hidden_norm", "input_layernorm")}
    tensors = layer_tensors(rng, "midlayer", 2 * D)
  tensors |= {name: rng.normal(0, 0.2, shape) for name, shape in more.items()}
  tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
  if kind == "eagle3":
    ids = np.sort(rng.choice(V, R, replace=False))
    t2d = np.zeros(V, bool)
    t2d[ids] = True
    tensors |= {"d2t": ids - np.arange(R), "t2d": t2d}
  return tensors


def write(folder, kind, tensors=None, **changes):
  folder.mkdir(exist_ok=True)
  more = {"draft_vocab_size": R} if kind == "eagle3" else {}
  (folder / "config.json").write_text(json.dumps(CONFIG | more | changes))
  st.save_file(released(kind) if tensors is None else tensors, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def target():
  return common.config(num_layers=3)


@pytest.mark.parametrize("kind", ["eagle", "minicpm", "eagle3"])
def test_released_names_load_and_mean_what_the_table_says(tmp_path, target, kind):
  """Forward from the raw tensors: fc columns are (embedding | feature) as CPM.cu splits them."""
  draft = ckpt.load_draft(write(tmp_path / "d", kind), target)
  assert draft.cfg.kind == kind and draft.cfg.draft_logit_scale == 1.0
  raw = released(kind)
  fc = raw["fc.weight"].T
  np.testing.assert_array_equal(np.asarray(draft.params["fc"]["kernel"]), fc)
  e, f = oracle.inputs(draft.cfg, 5)
  found, _ = oracle.run(draft.cfg, draft.params, e, f)
  prefix = "midlayer" if kind == "eagle3" else "layers.0"

  def lin(name, shape):
    return raw[f"{prefix}.{name}.weight"].T.reshape(shape)

  in_dim = 2 * D if kind == "eagle3" else D
  by_name = {
    "fc": {"kernel": fc, "bias": raw.get("fc.bias", np.zeros(D))},
    "layers_0": {
      "attn": {
        "q": {"kernel": lin("self_attn.q_proj", (in_dim, N, H))},
        "k": {"kernel": lin("self_attn.k_proj", (in_dim, K, H))},
        "v": {"kernel": lin("self_attn.v_proj", (in_dim, K, H))},
        "o": {"kernel": lin("self_attn.o_proj", (N, H, D))},
      },
      "mlp": {
        n: {"kernel": raw[f"{prefix}.mlp.{n}_proj.weight"].T} for n in ("gate", "up", "down")
      },
      "mlp_norm": {"scale": raw[f"{prefix}.post_attention_layernorm.weight"]},
    },
  }
  if kind == "minicpm":
    by_name["embed_norm"] = {"scale": raw["input_norm1.weight"]}
    by_name["hidden_norm"] = {"scale": raw["input_norm2.weight"]}
    by_name["layers_0"]["attn_norm"] = {"scale": raw["layers.0.input_layernorm.weight"]}
  if kind == "eagle3":
    by_name["embed_norm"] = {"scale": raw["midlayer.input_layernorm.weight"]}
    by_name["hidden_norm"] = {"scale": raw["midlayer.hidden_norm.weight"]}
  expected = oracle.reference(draft.cfg, by_name, e[0], f[0])
  np.testing.assert_allclose(found[0], expected, atol=2e-5, rtol=2e-5)
  if kind == "eagle3":
    np.testing.assert_array_equal(draft.ids, np.flatnonzero(raw["t2d"]))
    np.testing.assert_array_equal(
      np.asarray(draft.params["lm_head"]["kernel"]).T, raw["lm_head.weight"]
    )
  else:
    assert draft.ids is None


def test_prefixes_of_vllm_and_half_precision(tmp_path, target):
  renamed = {}
  for name, x in released("minicpm").items():
    renamed["model." + name.replace("layers.0", "eagle_layers.0")] = x.astype(np.float16)
  renamed["model.norm.weight"] = np.ones(D, np.float16)
  draft = ckpt.load_draft(write(tmp_path / "d", "minicpm", renamed), target)
  assert draft.cfg.layer.dtype == "f16"
  wide = ckpt.load_draft(tmp_path / "d", target, dtype="f32", window_size=7, draft_logit_scale=0.5)
  assert (wide.cfg.layer.dtype, wide.cfg.window_size, wide.cfg.draft_logit_scale) == ("f32", 7, 0.5)


@pytest.mark.parametrize("kind", ["eagle", "minicpm", "eagle3"])
def test_save_and_load_are_inverse(tmp_path, target, kind):
  cfg, params, _ = oracle.make(kind, window_size=9)
  ids = np.arange(3, 43, dtype=np.int32) if kind == "eagle3" else None
  ckpt.save_draft(tmp_path / "d", draft_lib.Draft(cfg, params, ids), target)
  ckpt.save_draft(tmp_path / "d", draft_lib.Draft(cfg, params, ids), target)  # replaces
  again = ckpt.load_draft(tmp_path / "d", target)
  named = dataclasses.replace(again.cfg.layer, name=cfg.layer.name)
  assert dataclasses.replace(again.cfg, layer=named) == cfg
  common.assert_trees_close(again.params, params, atol=0, rtol=0)
  if ids is not None:
    np.testing.assert_array_equal(again.ids, ids)
    raw = st.load_file(tmp_path / "d" / "model.safetensors")
    assert raw["d2t"].tolist() == [3] * 40 and raw["t2d"].sum() == 40
  assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def without(name):
  def change(tensors):
    del tensors[name]

  return change


def put(name, value):
  def change(tensors):
    tensors[name] = value

  return change


@pytest.mark.parametrize(
  "kind, change, changes, match",
  [
    ("minicpm", without("input_norm2.weight"), {}, "1 missing tensors: input_norm2.weight"),
    ("eagle", put("extra.weight", np.ones(3, np.float32)), {}, "unexpected tensors: extra.weight"),
    ("eagle", put("fc.weight", np.ones((D, D), np.float32)), {}, r"fc.weight: found \[32, 32\]"),
    ("eagle", put("fc.qweight", np.ones((4, 4), np.float32)), {}, "without them: .*attn/q/kernel"),
    ("eagle", put("lm_head.qweight", np.ones((4, 4), np.float32)), {}, "quantised tensors lm_head"),
    ("eagle3", without("d2t"), {}, "missing tensors: d2t"),
    ("eagle3", put("d2t", np.zeros(R, np.int64) + V), {}, "d2t: found ids"),
    ("eagle3", put("t2d", np.ones(V, bool)), {}, "t2d: found another set"),
    ("minicpm", None, {"hidden_size": 64, "head_dim": 8}, "model_dim: found 64, expected the targ"),
    ("minicpm", None, {"vocab_size": 300}, "vocab_size: found 300, expected the target's 256"),
    ("minicpm", None, {"scale_emb": 1.0}, "scale_emb: found 1.0, expected the target's 12.0"),
    ("minicpm", None, {"intermediate_size": "x"}, "intermediate_size: found 'x'"),
    ("minicpm", None, {"minicpm_jax": {"oops": 1}}, r"minicpm_jax: found \['oops'\]"),
    ("minicpm", None, {"minicpm_jax": [1]}, r"minicpm_jax: found \[1\], expected a dict"),
    ("eagle3", None, {"minicpm_jax": {"feature_layers": 1}}, r"\['feature_layers'\] with 1"),
    ("eagle3", None, {"minicpm_jax": {"feature_scale": 2**70}}, "config.json: draft.feature_scale"),
    ("eagle", None, {"num_hidden_layers": 10**9}, "num_hidden_layers.*found 1000000000 layers"),
    (
      "eagle",
      None,
      {"num_hidden_layers": float("inf")},
      "config.json: num_hidden_layers: found inf",
    ),
    ("eagle", None, {"head_dim": 10**9}, "head_dim: found .*000000000, expected what the tensors"),
    ("eagle", None, {"hidden_size": -1}, "config.json: hidden_size: found -1"),
    ("eagle", None, {"hidden_act": "gelu"}, "config.json: hidden_act: found 'gelu'"),
  ],
)
def test_refusals_name_the_tensor_or_field(tmp_path, target, kind, change, changes, match):
  tensors = released(kind)
  if change is not None:
    change(tensors)
  with pytest.raises(errors.CheckpointError, match=match):
    ckpt.load_draft(write(tmp_path / "d", kind, tensors, **changes), target)


def test_missing_folder_and_pickles(tmp_path, target):
  with pytest.raises(errors.MissingFileError, match="no such folder"):
    ckpt.load_draft(tmp_path / "none", target)
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(errors.CheckpointError, match="pytorch_model.bin"):
    ckpt.load_draft(tmp_path, target)
  cfg, params, _ = oracle.make("minicpm")
  del params["embed_norm"]
  with pytest.raises(errors.CheckpointError, match="embed_norm/scale: found none"):
    draft_io.save_draft(tmp_path / "d", draft_lib.Draft(cfg, params), target)


GROUP = 16
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP}}


def to_gptq(tensors, with_fc=True):
  """(tensors with every linear of the layers as GPTQ words, the floats that they mean)."""
  rng, words, floats = np.random.default_rng(5), {}, {}
  for name, x in tensors.items():
    base = name.removesuffix(".weight")
    if not (base.endswith("_proj") or (with_fc and base == "fc")):
      words[name] = floats[name] = x
      continue
    out, width = x.shape
    codes = rng.integers(0, 16, (width, out))
    scale = rng.uniform(0.01, 0.1, (width // GROUP, out)).astype(np.float16)
    floats[name] = ((codes - 8) * np.repeat(scale, GROUP, 0).astype(np.float32)).T.astype(
      np.float32
    )
    packed = np.zeros((width // 8, out), np.uint32)
    for k in range(width):
      packed[k // 8] |= codes[k].astype(np.uint32) << np.uint32(4 * (k % 8))
    words[f"{base}.qweight"] = packed.view(np.int32)
    words[f"{base}.qzeros"] = np.full((width // GROUP, out // 8), 0x77777777, np.int32)
    words[f"{base}.scales"] = scale
    words[f"{base}.g_idx"] = (np.arange(width) // GROUP).astype(np.int32)
  return words, {name: np.ascontiguousarray(x) for name, x in floats.items()}


@pytest.mark.parametrize("kind, with_fc", [("minicpm", True), ("eagle", False), ("eagle3", True)])
def test_gptq_tensors_mean_the_floats_they_stand_for_and_are_written_back(
  tmp_path, target, kind, with_fc
):
  words, floats = to_gptq(released(kind), with_fc)
  low = ckpt.load_draft(write(tmp_path / "low", kind, words, **GPTQ), target)
  plain = ckpt.load_draft(write(tmp_path / "plain", kind, floats), target)
  codes = {p: x for p, x in trees.flatten_paths(low.params, qtensor.is_qtensor).items()}
  assert sum(map(qtensor.is_qtensor, codes.values())) == 7 + with_fc
  common.assert_trees_close(
    quant_tree.dequantize_params(low.params, np.float32), plain.params, atol=0, rtol=0
  )
  rng = np.random.default_rng(1)
  embedded, feature = (
    rng.normal(size=(1, 3, n)).astype(np.float32) for n in (D, low.cfg.feature_dim)
  )
  found, expected = (
    draft_lib.extend(
      x.cfg,
      x.params,
      draft_lib.init_cache(x.cfg, 1, 8),
      *map(jnp.asarray, (embedded, feature, np.arange(3, dtype=np.int32)[None])),
      jnp.ones((1, 3), bool),
    )[0]
    for x in (low, plain)
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)
  draft_io.save_draft(tmp_path / "again", low, target)
  stored = st.load_file(tmp_path / "again" / "model.safetensors")
  for name, x in words.items():
    if not name.startswith("embed"):
      np.testing.assert_array_equal(stored[name], x, err_msg=name)
  again = ckpt.load_draft(tmp_path / "again", target)
  common.assert_trees_close(again.params, low.params, atol=0, rtol=0)
  assert again.cfg.layer.quant == low.cfg.layer.quant


def to_marlin(words):
  """What CPM.cu's scripts/model_convert/gptq2marlin.py makes of a draft's GPTQ tensors."""

  def columns(bases):  # (codes [K, N], scales [Q, N]) side by side
    found = []
    for base in bases:
      packed = words[f"{base}.qweight"].view(np.uint32)
      codes = np.stack([packed >> np.uint32(4 * i) & 15 for i in range(8)], 1)
      found.append((codes.reshape(-1, packed.shape[1]), words[f"{base}.scales"]))
    return [np.concatenate(x, 1) for x in zip(*found, strict=True)]

  low = {name.rpartition(".")[0] for name in words if name.endswith("qweight")}
  marlin_words = {n: x for n, x in words.items() if n.rpartition(".")[0] not in low}
  for base in low:
    bases = [base]
    for joined in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
      if base.endswith(tuple(joined)):
        bases = [f"{base.rpartition('.')[0]}.{part}" for part in joined]
    codes, scale = columns(bases)
    halves = 2 if base == "fc" and "input_norm1.weight" in words else 1
    cut = [np.split(x, halves) for x in (codes, scale)]
    name = base.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
    if base.endswith(("k_proj", "v_proj", "up_proj")):
      continue
    marlin_words[f"{name}.qweight"] = np.concatenate(
      [marlin.pack(x.astype(np.uint8)) for x in cut[0]], 1
    )
    marlin_words[f"{name}.scales"] = np.concatenate([marlin.permute_scales(x) for x in cut[1]], 1)
  marlin_words.pop("t2d", None)
  if "d2t" in marlin_words:
    marlin_words["d2t"] = marlin_words["d2t"].astype(np.int32)
  return {name: np.ascontiguousarray(x) for name, x in marlin_words.items()}


@pytest.mark.parametrize("kind, with_fc", [("minicpm", True), ("minicpm", False), ("eagle3", True)])
def test_marlin_files_of_cpmcu_hold_the_same_draft(tmp_path, monkeypatch, kind, with_fc):
  here = sys.modules[__name__]
  for name, value in dict(D=256, F=384, H=64, GROUP=128).items():
    monkeypatch.setattr(here, name, value)
  target = common.config(num_layers=3, model_dim=D)
  changes = dict(hidden_size=D, intermediate_size=F)
  changes["quantization_config"] = GPTQ["quantization_config"] | {"group_size": GROUP}
  words, _ = to_gptq(released(kind), with_fc)
  expected = ckpt.load_draft(write(tmp_path / "gptq", kind, words, **changes), target)
  folder = write(tmp_path / "marlin", kind, to_marlin(words), **changes)
  (folder / "model.safetensors").rename(folder / "model_gptq.safetensors")
  found = ckpt.load_draft(folder, target)
  assert found.cfg == dataclasses.replace(
    expected.cfg, layer=dataclasses.replace(expected.cfg.layer, name="marlin")
  )
  codes = trees.flatten_paths(found.params, qtensor.is_qtensor)
  assert sum(map(qtensor.is_qtensor, codes.values())) == 7 + with_fc
  common.assert_trees_close(found.params, expected.params, atol=0, rtol=0)
  draft_io.save_draft(tmp_path / "again", expected, target, layout="marlin")
  stored = st.load_file(tmp_path / "again" / "model_gptq.safetensors")
  wanted = {n: x for n, x in to_marlin(words).items() if n != "embed_tokens.weight"}
  assert set(stored) == set(wanted)
  for name, x in wanted.items():
    np.testing.assert_array_equal(stored[name], x, err_msg=name)
  again = ckpt.load_draft(tmp_path / "again", target)
  common.assert_trees_close(again.params, expected.params, atol=0, rtol=0)
  if kind == "eagle3":
    np.testing.assert_array_equal(found.ids, expected.ids)
  elif with_fc:
    tensors = to_marlin(words)
    tensors["fc.qweight"] = np.ascontiguousarray(tensors["fc.qweight"][:, :-4])
    st.save_file(tensors, folder / "model_gptq.safetensors")
    with pytest.raises(errors.CheckpointError, match=r"fc: found qweight \[16, 1020\]"):
      ckpt.load_draft(folder, target)
    del tensors["layers.0.self_attn.qkv_proj.scales"]
    st.save_file(tensors, folder / "model_gptq.safetensors")
    with pytest.raises(errors.CheckpointError, match="missing.*qkv_proj.scales"):
      ckpt.load_draft(folder, target)


def test_a_draft_trained_for_int4_keeps_its_values_in_the_file(tmp_path, target):
  cfg = draft_lib.quantized(draft_lib.for_target(target, "minicpm"), GROUP)
  trained = draft_lib.Draft(cfg, draft_lib.init_params(cfg, jax.random.key(0)))
  draft_io.save_draft(tmp_path / "d", draft_export.as_int4(trained), target)
  found = ckpt.load_draft(tmp_path / "d", target)
  expected = quant_tree.dequantize_params(
    quant_tree.quantize_params(
      dataclasses.replace(cfg.layer.quant, weights="codes"), trained.params
    )
  )
  common.assert_trees_close(quant_tree.dequantize_params(found.params), expected, atol=0, rtol=0)
  with pytest.raises(ValueError, match="expected latent int4 weights"):
    draft_export.as_int4(found)


def test_what_marlin_cannot_hold_is_refused(tmp_path, target):
  words, floats = to_gptq(released("minicpm"))
  low = ckpt.load_draft(write(tmp_path / "low", "minicpm", words, **GPTQ), target)
  plain = ckpt.load_draft(write(tmp_path / "plain", "minicpm", floats), target)
  for draft, match in ((low, "found group_size 16, expected"), (plain, "found floats")):
    with pytest.raises(errors.CheckpointError, match=match):
      draft_io.save_draft(tmp_path / "d", draft, target, layout="marlin")
  assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_an_fc_too_small_for_scales_of_float16_is_stored_as_floats(tmp_path, target, caplog):
  """EAGLE-3 trained in units 2^20 times as large: all values are those of the training."""
  cfg = draft_lib.quantized(draft_lib.for_target(target, "eagle3"), GROUP)
  trained = draft_lib.init_params(cfg, jax.random.key(0))
  values = {}
  for power in (0, -20):
    fc = {"fc": {"kernel": trained["fc"]["kernel"] * 2.0**power}}
    draft = draft_export.as_int4(draft_lib.Draft(cfg, trained | fc))
    assert ("fc/kernel: found int4 scales down to" in caplog.text) == (power < 0)
    draft_io.save_draft(tmp_path / "d", draft, target)
    found = ckpt.load_draft(tmp_path / "d", target)
    assert found.cfg.layer.quant.selects("fc/kernel") == (power == 0)
    values[power] = quant_tree.dequantize_params(found.params, np.float32)
  expected = values[0]["fc"]["kernel"] * 2.0**-20
  common.assert_trees_close(values[-20], values[0] | {"fc": {"kernel": expected}}, atol=0, rtol=0)


def test_a_ternary_draft_leaves_latents_and_the_values_that_run(tmp_path, target):
  """Values by the rule: s = mean|w| of a group of inputs, rounded to float16, times -1, 0 or 1."""
  cfg = draft_lib.quantized(draft_lib.for_target(target, "minicpm"), GROUP, scheme="ternary")
  trained = draft_lib.Draft(cfg, draft_lib.init_params(cfg, jax.random.key(0)))
  draft_export.write(tmp_path, trained, target)
  latent, found = (ckpt.load_draft(tmp_path / n, target) for n in ("draft", "draft_ternary"))
  common.assert_trees_close(latent.params, trained.params, atol=0, rtol=0)
  assert latent.cfg.layer.quant is None and found.cfg.layer.quant is None
  for get in (lambda p: p["fc"]["kernel"], lambda p: p["layers_0"]["mlp"]["down"]["kernel"]):
    w = np.asarray(get(trained.params), np.float64)
    groups = w.reshape(-1, GROUP, w.shape[1])
    scale = np.abs(groups).mean(1, keepdims=True).astype(np.float16).astype(np.float64)
    expected = scale * np.clip(np.round(groups / scale), -1, 1)
    np.testing.assert_allclose(get(found.params), expected.reshape(w.shape), rtol=2e-3, atol=1e-7)
  norms = [x["embed_norm"]["scale"] for x in (found.params, trained.params)]
  np.testing.assert_array_equal(*norms)
  with pytest.raises(ValueError, match="quant: found None, expected latent weights"):
    draft_export.fused(found)


@pytest.mark.parametrize(
  "drop, changes, match",
  [
    ("layers.0.mlp.up_proj.qzeros", {}, "1 missing tensors: layers.0.mlp.up_proj.qzeros"),
    (None, {"quantization_config": {"quant_method": "awq"}}, "quant_method: found 'awq'"),
    (None, {"quantization_config": {"quant_method": "gptq", "bits": 8}}, "bits: found 8"),
  ],
)
def test_int4_refusals(tmp_path, target, drop, changes, match):
  words, _ = to_gptq(released("minicpm"))
  if drop is not None:
    del words[drop]
  with pytest.raises(errors.CheckpointError, match=match):
    ckpt.load_draft(write(tmp_path / "d", "minicpm", words, **{**GPTQ, **changes}), target)
