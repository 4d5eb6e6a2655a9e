"""config.json <-> ModelConfig: released files, traps, refusals (models.md 2, 7.1, 10)."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax import config
from minicpm_jax.ckpt import errors, hf_config
from minicpm_jax.models import zoo
from tests.ckpt import hf_folder

# Keys that a round trip drops or writes out, as the module's docstring says.
DROPPED = {"_name_or_path", "auto_map", "transformers_version"}
MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "initializer_range": 0.1}


def _released(arch, D, F, L, N, K, V, M, **more):
  return {
    "architectures": [arch],
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "vocab_size": V,
    "max_position_embeddings": M,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
  } | more


def _longrope(original, factors):
  scaling = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors}
  return scaling | {"original_max_position_embeddings": original}


_MINICPM = ("MiniCPMForCausalLM",)
_F32 = zoo.minicpm4_0p5b().rope.long_factor
_F64 = zoo.minicpm4_8b().rope.long_factor
_F16 = zoo.minicpm3_4b().rope.long_factor
_STOPS = {"eos_token_id": [2, 73440]}
# models.md 2.1-2.5, row by row.
RELEASED = {
  "minicpm_1b": _released(*_MINICPM, 1536, 3840, 52, 24, 8, 73440, 4096, **MUP),
  "minicpm_2b": _released(*_MINICPM, 2304, 5760, 40, 36, 36, 122753, 4096, **MUP),
  "minicpm_2b_128k": _released(
    *_MINICPM, 2304, 5760, 40, 36, 36, 122760, 65536, **MUP, rope_theta=1000000.0,
    rope_scaling={"type": "dynamic", "factor": 4.0}, tie_word_embeddings=False,
  ),
  "minicpm_moe_8x2b": _released(
    *_MINICPM, 2304, 5760, 40, 36, 36, 122753, 4096, **MUP, num_experts=8, num_experts_per_tok=2
  ),
  "minicpm_s_1b": _released(*_MINICPM, 1536, 3840, 52, 24, 8, 73440, 4096, **MUP)
  | {"hidden_act": "fatrelu", "hidden_act_param": 0.03},
  "minicpm4_0p5b": _released(*_MINICPM, 1024, 4096, 24, 16, 2, 73448, 32768, **MUP)
  | _STOPS | {"rope_scaling": _longrope(32768, list(_F32))},
  "minicpm4_8b": _released(*_MINICPM, 4096, 16384, 32, 32, 2, 73448, 32768, **MUP)
  | _STOPS | {"rope_scaling": _longrope(32768, list(_F64)), "rms_norm_eps": 1e-6}
  | {"tie_word_embeddings": False, "pad_token_id": 2, "mup_denominator": 32},
  "minicpm5_1b": _released("LlamaForCausalLM", 1536, 4608, 24, 16, 2, 130560, 131072)
  | {"head_dim": 128, "rope_theta": 5e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
  | {"bos_token_id": 0, "eos_token_id": [1, 130073], "pad_token_id": 1},
  "minicpm3_4b": _released("MiniCPM3ForCausalLM", 2560, 6400, 62, 40, 40, 73448, 32768, **MUP)
  | _STOPS | {"rope_scaling": _longrope(32768, list(_F16)), "q_lora_rank": 768}
  | {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
}  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("member", list(RELEASED))
def test_a_released_config_is_the_zoo_member_and_comes_back(member):
  hf = RELEASED[member]
  cfg = hf_config.from_hf(hf)
  assert cfg == zoo.ZOO[member](name="custom", dtype="bf16", param_dtype="bf16")
  out = json.loads(json.dumps(hf_config.to_hf(cfg)))
  if (hf.get("rope_scaling") or {}).get("type"):
    hf = hf | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
  assert {k: out[k] for k in hf} == hf
  assert hf_config.from_hf(out) == cfg


def test_the_released_minicpm4_0p5b_file_round_trips(shared_dir):
  folder = shared_dir / "models" / "minicpm4-0.5b-tokenizer"
  hf = json.loads((folder / "config.json").read_text())
  cfg = hf_config.from_hf(hf)
  assert cfg.name == "MiniCPM4-0.5B"
  assert cfg.tie_embeddings and cfg.stop_ids == (2, 73440) and cfg.pad_id is None
  assert cfg.head_dim == 64 and cfg.rope.theta == 10000.0 and cfg.sparse is None
  assert cfg.residual_scale == pytest.approx(0.285774, abs=1e-6) and cfg.logit_divisor == 4
  want = zoo.minicpm4_0p5b()
  assert cfg.rope.long_factor == pytest.approx(want.rope.long_factor, abs=1e-5)
  out = hf_config.to_hf(cfg)
  kept = {k: v for k, v in hf.items() if k not in DROPPED}
  text = {k: out[k] for k in kept}
  assert json.dumps(text) == json.dumps(  # as text: 12 stays 12, every digit of the factors stays
    kept | {"rope_scaling": {k: kept["rope_scaling"][k] for k in out["rope_scaling"]}}
  )
  assert set(out) - set(kept) == {
    "attention_bias", "attention_dropout", "model_type", "rope_theta", "tie_word_embeddings",
  }  # fmt: skip
  generation = json.loads((folder / "generation_config.json").read_text())
  assert hf_config.from_hf(hf, generation_config=generation).stop_ids == (2, 73440)


def test_tie_default_belongs_to_the_architecture():
  for name, tied in (("MiniCPMForCausalLM", True), ("LlamaForCausalLM", False)):
    hf = hf_folder.MINICPM | {"architectures": [name]}
    assert hf_config.from_hf(hf).tie_embeddings is tied
    for stored in (True, False):
      assert hf_config.from_hf(hf | {"tie_word_embeddings": stored}).tie_embeddings is stored
  assert hf_config.from_hf(hf_folder.MLA).tie_embeddings is True


def test_the_architecture_string_decides_about_mup():
  """A "-llama-format" folder keeps the muP keys, and even the model_type, and is a plain Llama."""
  hf = hf_folder.MINICPM | {"architectures": ["LlamaForCausalLM"], "model_type": "minicpm"}
  cfg = hf_config.from_hf(hf)
  assert (cfg.scale_emb, cfg.residual_scale, cfg.logit_divisor) == (1, 1, 1)
  assert cfg.arch == "llama" and "scale_emb" not in hf_config.to_hf(cfg)
  hf = hf_folder.MINICPM | {"model_type": "llama"}
  cfg = hf_config.from_hf(hf)
  assert (cfg.arch, cfg.scale_emb, cfg.logit_divisor) == ("minicpm", 12, 2)
  assert cfg.residual_scale == pytest.approx(1.4 / math.sqrt(2))


def test_absent_and_null_keys_have_the_documented_meaning():
  hf = {k: v for k, v in hf_folder.MINICPM.items() if k != "num_key_value_heads"}
  for more in ({}, {"num_key_value_heads": None, "head_dim": None, "rope_theta": None}):
    cfg = hf_config.from_hf(hf | more | {"num_experts": 0})
    assert (cfg.num_kv_heads, cfg.head_dim, cfg.rope.theta) == (4, 8, 10000.0)
    assert cfg.moe is None
  assert hf_config.from_hf(hf | {"head_dim": 24}).head_dim == 24
  assert hf_config.from_hf(hf | {"eos_token_id": None}).stop_ids == ()
  assert hf_config.to_hf(hf_config.from_hf(hf | {"eos_token_id": None}))["eos_token_id"] is None
  off = hf_config.from_hf(hf | {"scale_depth": None, "dim_model_base": None, "scale_emb": 1})
  assert (off.residual_scale, off.logit_divisor) == (1, 1)
  again = hf_config.from_hf(hf_config.to_hf(off))
  assert (again.residual_scale, again.logit_divisor) == (1, 1)


@pytest.mark.parametrize(
  "rope, kind",
  [
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "default"}}, "none"),
    ({"rope_scaling": {}}, "none"),
    ({"rope_scaling": None}, "none"),
    ({"rope_scaling": hf_folder.LONGROPE}, "longrope"),
    ({"rope_scaling": hf_folder.LONGROPE | {"factor": 1.0}}, "longrope"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "none"),
    ({"rope_parameters": hf_folder.LONGROPE | {"rope_theta": 5e5}}, "longrope"),
  ],
)
def test_both_spellings_of_the_rope_kind_and_transformers_5(rope, kind):
  cfg = hf_config.from_hf(hf_folder.MINICPM | rope)
  assert cfg.rope.kind == kind
  assert cfg.rope.theta == (5e5 if "rope_parameters" in rope else 1e4)
  written = hf_config.to_hf(cfg)["rope_scaling"]
  assert written is None if kind == "none" else written["rope_type"] == kind
  assert hf_config.from_hf(hf_config.to_hf(cfg)) == cfg
  if kind == "longrope":
    assert cfg.rope.original_max_position == 32 and cfg.rope.long_factor == (1.0, 1.5, 2.25, 3.5)
    assert cfg.rope.factor == rope.get("rope_scaling", {}).get("factor")


def test_original_length_of_longrope_may_lie_outside_or_be_absent():
  scaling = {k: v for k, v in hf_folder.LONGROPE.items() if k.startswith(("rope", "long", "short"))}
  hf = hf_folder.MINICPM | {"rope_scaling": scaling}
  assert hf_config.from_hf(hf).rope.original_max_position == 64
  hf |= {"original_max_position_embeddings": 16}
  assert hf_config.from_hf(hf).rope.original_max_position == 16


def test_sparse_config_is_kept():
  sparse = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64}
  sparse |= {"window_size": 2048, "topk": 64, "use_nope": False, "dense_len": 8192}
  cfg = hf_config.from_hf(hf_folder.MINICPM | {"sparse_config": sparse})
  assert cfg.sparse.topk == 64 and hf_config.to_hf(cfg)["sparse_config"] == sparse
  assert "sparse_config" not in hf_config.to_hf(hf_config.from_hf(hf_folder.MINICPM))
  assert "sparse_rules" not in hf_config.to_hf(cfg)  # the released rules
  for rules in ({"lse": "exact"}, {"selection": "split"}, {"selection": "split", "lse": "exact"}):
    other = dataclasses.replace(cfg, sparse=dataclasses.replace(cfg.sparse, **rules))
    written = hf_config.to_hf(other)
    assert written["sparse_config"] == sparse and written["sparse_rules"] == rules
    assert hf_config.from_hf(written).sparse == other.sparse
    for bad in ({"lse": "fine"}, {"sum": "exact"}, ["exact"]):
      with pytest.raises(errors.ConfigError, match="sparse_rules"):
        hf_config.from_hf(written | {"sparse_rules": bad})
    with pytest.raises(errors.ConfigError, match="sparse_rules.*sparse_config"):
      hf_config.from_hf(hf_folder.MINICPM | {"sparse_rules": rules})
  for bad, message in (
    ({"topk": "64"}, "sparse_config.topk: found '64', expected of type int"),
    ({"kernel_size": 30}, "sparse_config.kernel_size: found 30, expected a multiple of"),
    ({"blocksize": 64}, "sparse_config: found .'blocksize'., expected only"),
    ({"note": "text"}, "sparse_config: found .'note'., expected only"),
  ):
    with pytest.raises(errors.ConfigError, match=message):
      hf_config.from_hf(hf_folder.MINICPM | {"sparse_config": sparse | bad})


_REFUSED = {
  "unknown architecture": ({"architectures": ["FooForCausalLM"]}, "architectures.*Foo.*MiniCPMFor"),
  "SALA": ({"architectures": ["MiniCPMSALAForCausalLM"]}, "architectures.*SALA"),
  "no architecture": ({"architectures": None}, "architectures: found None"),
  "empty architectures": ({"architectures": []}, "architectures"),
  "activation": ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'.*silu"),
  "fatrelu without threshold": ({"hidden_act": "fatrelu"}, "hidden_act_param: found no such key"),
  "rope kind": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type.*yarn"),
  "old rope kind": ({"rope_scaling": {"type": "su"}}, "rope_type.*su"),
  "no rope kind": ({"rope_scaling": {"factor": 2.0}}, "rope_type"),
  "two rope kinds": (
    {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
    "rope_type.*dynamic.*linear",
  ),
  "no factor": ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor: found None"),
  "factor below 1": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor: found 0.5"),
  "factor length": (
    {"rope_scaling": hf_folder.LONGROPE | {"long_factor": [1.0] * 5}},
    "long_factor: found '5 factors', expected rotary_dim / 2 = 4",
  ),
  "short factor length": (
    {"rope_scaling": hf_folder.LONGROPE | {"short_factor": [1.0] * 3}},
    "short_factor: found '3 factors'",
  ),
  "no long factor": ({"rope_scaling": {"type": "longrope"}}, "short_factor: found no such key"),
  "negative factor": (
    {"rope_scaling": hf_folder.LONGROPE | {"long_factor": [1.0, -1.5, 1.0, 1.0]}},
    r"long_factor\[1\]: found -1.5",
  ),
  "text factor": (
    {"rope_scaling": hf_folder.LONGROPE | {"long_factor": [1.0, "a", 1.0, 1.0]}},
    r"long_factor\[1\]: found 'a'",
  ),
  "unknown rope key": (
    {"rope_scaling": hf_folder.LONGROPE | {"attention_factor": 1.2}},
    "attention_factor",
  ),
  "conflicting rope": (
    {"rope_parameters": {"rope_type": "default"}, "rope_scaling": hf_folder.LONGROPE},
    "rope_scaling.*same as rope_parameters",
  ),
  "rope is text": ({"rope_scaling": "longrope"}, "rope_scaling: found 'longrope'"),
  "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads: found 3.*divisor.*4"),
  "heads": (
    {"hidden_size": 30, "num_key_value_heads": 2},
    "hidden_size: found 30.*multiple of num_attention_heads 4, or a head_dim",
  ),
  "negative size": ({"hidden_size": -32}, "hidden_size: found -32"),
  "text size": ({"num_hidden_layers": "2"}, "num_hidden_layers: found '2'"),
  "bool size": ({"vocab_size": True}, "vocab_size: found True"),
  "null size": ({"vocab_size": None}, "vocab_size: found no such key"),
  "theta": ({"rope_theta": -1.0}, "rope_theta: found -1.0"),
  "eps": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: found '1e-5'"),
  "tie": ({"tie_word_embeddings": "false"}, "tie_word_embeddings: found 'false'"),
  "eos": ({"eos_token_id": "</s>"}, "eos_token_id: found '</s>'"),
  "bias": ({"attention_bias": True}, "attention_bias: found True"),
  "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
  "dtype": ({"torch_dtype": "float64"}, "torch_dtype: found 'float64'"),
  "experts per token": ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(_REFUSED))
def test_refusals_name_the_key_and_what_was_found(case):
  change, match = _REFUSED[case]
  with pytest.raises(errors.ConfigError, match=match):
    hf_config.from_hf(hf_folder.MINICPM | change)


@pytest.mark.parametrize(
  "key",
  [
    "architectures", "hidden_size", "intermediate_size", "max_position_embeddings", "scale_emb",
    "num_attention_heads", "num_hidden_layers", "vocab_size", "scale_depth", "dim_model_base",
  ],
)  # fmt: skip
def test_required_keys(key):
  hf = {k: v for k, v in hf_folder.MINICPM.items() if k != key}
  with pytest.raises(errors.ConfigError, match=f"{key}: found"):
    hf_config.from_hf(hf)


def test_quantised_configs_have_an_error_of_their_own():
  hf = hf_folder.MINICPM | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
  with pytest.raises(errors.QuantizedCheckpointError, match="quantization_config"):
    hf_config.from_hf(hf)
  assert hf_config.from_hf(hf_folder.MINICPM | {"quantization_config": None}).vocab_size == 99


def test_llama_form_cannot_hold_multipliers():
  cfg = zoo.tiny(zoo.minicpm5_1b(), scale_emb=12.0)
  with pytest.raises(errors.ConfigError, match="scale_emb.*fold_to_llama"):
    hf_config.to_hf(cfg)


# ---- any config survives the trip -------------------------------------------------------------

_positive = st.floats(1e-3, 1e3)


@st.composite
def _configs(draw):
  arch = draw(st.sampled_from(["minicpm", "llama", "minicpm3"]))
  kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
  heads = kv_heads * group
  head_dim = 2 * draw(st.integers(1, 8))
  mla = None
  if arch == "minicpm3":
    size = st.integers(1, 16)
    nope, rope_dim = draw(size), 2 * draw(st.integers(1, 4))
    mla = config.MLAConfig(
      q_lora_rank=draw(size), kv_lora_rank=draw(size), qk_nope_head_dim=nope,
      qk_rope_head_dim=rope_dim, v_head_dim=draw(size),
    )  # fmt: skip
    head_dim = nope + rope_dim
  half = (head_dim if mla is None else mla.qk_rope_head_dim) // 2
  kind = draw(st.sampled_from(["none", "linear", "dynamic", "longrope"]))
  factors = st.lists(_positive, min_size=half, max_size=half).map(tuple)
  factor = {"none": st.none(), "longrope": st.none() | _positive}.get(kind, st.floats(1, 16))
  rope = config.RopeConfig(
    kind=kind,
    theta=draw(st.floats(1.5, 1e7)),
    factor=draw(factor),
    short_factor=draw(factors) if kind == "longrope" else (),
    long_factor=draw(factors) if kind == "longrope" else (),
    original_max_position=draw(st.integers(2, 1 << 17)) if kind == "longrope" else None,
  )
  act = draw(st.sampled_from(["silu", "fatrelu"]))
  moe = None
  if arch != "minicpm3" and draw(st.booleans()):
    experts = draw(st.integers(1, 8))
    moe = config.MoEConfig(num_experts=experts, experts_per_token=draw(st.integers(1, experts)))
  mup = {}
  if arch != "llama":
    mup = {
      "scale_emb": draw(_positive),
      "scale_depth": draw(_positive),
      "dim_model_base": draw(st.integers(1, 512)),
      "mup_denominator": draw(st.none() | st.integers(1, 64)),
    }
  dtype = draw(st.sampled_from(["f32", "bf16", "f16"]))
  sparse = [None]
  if mla is None:
    sparse.append(config.SparseAttentionConfig.from_hf({}))
  ids = st.integers(0, 1000)
  return config.ModelConfig(
    arch=arch, vocab_size=draw(st.integers(1, 200_000)), model_dim=draw(st.integers(1, 64)) * heads,
    mlp_dim=draw(st.integers(1, 999)), num_layers=draw(st.integers(1, 99)), num_heads=heads,
    num_kv_heads=kv_heads, head_dim=head_dim, max_position=draw(st.integers(2, 1 << 17)), rope=rope,
    norm_eps=draw(st.sampled_from([1e-5, 1e-6])), tie_embeddings=draw(st.booleans()), **mup,
    act=act, act_threshold=draw(_positive) if act == "fatrelu" else 0.0, moe=moe, mla=mla,
    sparse=draw(st.sampled_from(sparse)),
    bos_id=draw(st.none() | ids), stop_ids=tuple(draw(st.lists(ids, max_size=3, unique=True))),
    pad_id=draw(st.none() | ids), dtype=dtype, param_dtype=dtype, init_std=draw(_positive),
  )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cfg=_configs())
def test_any_config_survives_the_round_trip(cfg):
  hf = json.loads(json.dumps(hf_config.to_hf(cfg)))
  again = hf_config.from_hf(hf)
  assert again == cfg
  assert hf_config.to_hf(again) == hf


# ---- what transformers itself writes ----------------------------------------------------------


@pytest.mark.oracle
def test_configs_saved_by_transformers_are_read(tmp_path):
  transformers = pytest.importorskip("transformers")
  llama = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"], hidden_size=32, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6},
  )  # fmt: skip
  llama.save_pretrained(tmp_path)
  cfg = hf_config.from_hf(json.loads((tmp_path / "config.json").read_text()))
  assert (cfg.head_dim, cfg.num_kv_heads, cfg.norm_eps) == (16, 2, llama.rms_norm_eps)
  assert cfg.rope == config.RopeConfig(kind="dynamic", factor=4.0, theta=1e6)
  mla = transformers.MiniCPM3Config(architectures=["MiniCPM3ForCausalLM"])
  mla.save_pretrained(tmp_path)
  cfg = hf_config.from_hf(json.loads((tmp_path / "config.json").read_text()))
  want = zoo.minicpm3_4b(name="custom", stop_ids=(2,), rope=config.RopeConfig())
  assert cfg == want  # transformers stores the rotary width as head_dim: not ours


@pytest.mark.oracle
@pytest.mark.parametrize("member", ["minicpm5_1b", "minicpm3_4b"])
def test_transformers_reads_our_configs(tmp_path, member):
  transformers = pytest.importorskip("transformers")
  cfg = zoo.ZOO[member]()
  (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(cfg)))
  read = transformers.AutoConfig.from_pretrained(tmp_path)
  assert read.rope_parameters["rope_theta"] == cfg.rope.theta
  kind = read.rope_parameters["rope_type"]
  assert kind == {"none": "default"}.get(cfg.rope.kind, cfg.rope.kind)
  assert (read.hidden_size, read.num_key_value_heads) == (cfg.model_dim, cfg.num_kv_heads)
  assert read.tie_word_embeddings is cfg.tie_embeddings
  assert tuple(read.eos_token_id) == cfg.stop_ids
