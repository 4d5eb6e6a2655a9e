"""Released shapes: parameter counts to the unit, tiny forms, names."""

import jax
import numpy as np
import pytest

from minicpm_jax.core import trees
from minicpm_jax.models import transformer, zoo
from tests.models import common

# models.md 2.1-2.5, training.md 1.1: (stored, outside the embeddings).
COUNTS = {
  "minicpm_1b": (1_360_246_272, 1_247_442_432),
  "minicpm_2b": (2_724_880_896, 2_442_057_984),
  "minicpm_2b_128k": (3_007_736_064, 2_442_057_984),
  "minicpm_moe_8x2b": (None, 13_590_468_864),
  "minicpm_s_1b": (1_360_246_272, 1_247_442_432),
  "minicpm3_4b": (None, 3_885_849_088),
  "minicpm4_0p5b": (433_873_920, 358_663_168),
  "minicpm4_8b": (8_185_253_888, 7_583_567_872),
  "minicpm4p1_8b": (8_185_253_888, 7_583_567_872),
  "bitcpm4_0p5b": (433_873_920, 358_663_168),
  "bitcpm4_1b": (1_360_258_560, 1_247_442_432),
  "minicpm5_1b": (1_080_632_832, 679_552_512),
  "minicpm5_2b": (2_516_756_480, None),
}
TUNNEL = {
  "9m": 9_426_240,
  "30m": 36_188_672,
  "70m": 65_964_160,
  "0p1b": 108_552_960,
  "0p17b": 166_216_064,
  "0p2b": 241_214_464,
  "0p5b": 498_614_592,
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_to_the_unit(name):
  cfg = zoo.ZOO[name]()
  counts = zoo.param_counts(cfg)
  stored, outside = COUNTS[name]
  assert cfg.name == name
  assert stored is None or counts.total == stored
  assert outside is None or counts.non_embedding == outside
  if name == "minicpm_moe_8x2b":
    assert counts.active_non_embedding == 4_035_320_064
  else:
    assert counts.active_non_embedding == counts.non_embedding


@pytest.mark.parametrize("size", TUNNEL)
def test_wind_tunnel_counts(size):
  assert zoo.param_counts(zoo.tunnel(size)).non_embedding == TUNNEL[size]


def test_unknown_tunnel_size_names_the_sizes():
  with pytest.raises(ValueError, match="size: found '1b', expected one of .*9m"):
    zoo.tunnel("1b")


def test_counts_ignore_padding_and_layer_form():
  cfg = zoo.minicpm_2b(vocab_multiple=128, scan_layers=False, dtype="bf16", remat="full")
  assert zoo.param_counts(cfg) == zoo.param_counts(zoo.minicpm_2b())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_tiny_keeps_every_kind(name):
  cfg = zoo.ZOO[name]()
  tiny = zoo.tiny(cfg)
  assert tiny.rope.kind == cfg.rope.kind and tiny.tie_embeddings == cfg.tie_embeddings
  assert (tiny.act, tiny.arch) == (cfg.act, cfg.arch)
  assert (tiny.moe is None, tiny.mla is None) == (cfg.moe is None, cfg.mla is None)
  assert (tiny.num_heads > tiny.num_kv_heads) == (cfg.num_heads > cfg.num_kv_heads)
  assert zoo.param_counts(tiny).total < 100_000


def test_every_leaf_has_one_logical_name_a_dimension():
  """Also the stable parameter paths of style.md 2.3."""
  params, specs = transformer.abstract_params(transformer.Transformer(common.config()))
  leaves, names = trees.flatten_paths(params), trees.flatten_paths(specs)
  for path, leaf in leaves.items():
    assert len(names[path]) == len(leaf.shape), path
  layer = [f"attn/{n}/kernel" for n in "kqvo"] + [f"mlp/{n}/kernel" for n in ("gate", "up", "down")]
  layer += ["attn_norm/scale", "mlp_norm/scale"]
  expected = {"embed/embedding", "final_norm/scale"} | {f"layers/{n}" for n in layer}
  assert set(leaves) == expected
  assert tuple(names["layers/attn/q/kernel"]) == ("layers", "embed", "heads", "head_dim")


@pytest.mark.parametrize("mup_embedding, ratio", [("matrix", 4.0), ("vector", 1.0)])
def test_initial_standard_deviations(mup_embedding, ratio):
  """MiniCPM Table 7: init_std / sqrt(w) for matrices; the embedding by its reading; norms 1."""
  cfg = zoo.tiny(
    zoo.minicpm4_8b(),
    model_dim=64,
    num_heads=8,
    dim_model_base=16,
    vocab_size=1000,
    mup_embedding=mup_embedding,
    init_std=0.1,
  )
  model = transformer.Transformer(cfg)
  params = trees.flatten_paths(transformer.init_params(model, jax.random.key(0)))
  for path, leaf in params.items():
    if path.endswith("scale"):
      np.testing.assert_array_equal(leaf, 1)
      continue
    w = ratio if path == "embed/embedding" else 4.0
    assert np.std(leaf) == pytest.approx(0.1 / w**0.5, rel=0.1), path
  layers = params["layers/attn/q/kernel"]
  assert not np.allclose(layers[0], layers[1])
