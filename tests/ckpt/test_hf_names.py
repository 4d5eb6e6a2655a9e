"""The name tables: parameter counts of the paper, names and shapes of transformers' own modules."""

import pytest

from minicpm_jax.ckpt import hf_names
from minicpm_jax.core import trees
from minicpm_jax.models import transformer, zoo

# models.md 2.1-2.5: parameters stored (no redundant head).
STORED = {
  "minicpm_1b": 1_360_246_272,
  "minicpm_2b": 2_724_880_896,
  "minicpm_2b_128k": 3_007_736_064,
  "minicpm4_0p5b": 433_873_920,
  "minicpm4_8b": 8_185_253_888,
  "bitcpm4_1b": 1_360_258_560,
  "minicpm5_1b": 1_080_632_832,
  "minicpm_moe_8x2b": 13_590_468_864 + 122753 * 2304,
  "minicpm3_4b": 3_885_849_088 + 73448 * 2560,
}


def _hf_shapes(cfg):
  shapes = trees.flatten_paths(transformer.abstract_params(transformer.Transformer(cfg))[0])
  leaves = hf_names.leaves(cfg)
  assert set(leaves) == set(shapes)
  return {
    name: hf_names.hf_shape(leaf.rule, shapes[path].shape[leaf.num_leading :])
    for path, leaf in leaves.items()
    for _, name in leaf.tensors
  }


@pytest.mark.smoke
@pytest.mark.parametrize("member", list(STORED))
def test_tables_cover_every_parameter_once(member):
  count = 0
  for shape in _hf_shapes(zoo.ZOO[member]()).values():
    size = 1
    for n in shape:
      size *= n
    count += size
  assert count == STORED[member]


@pytest.mark.parametrize("member", ["minicpm_moe_8x2b", "minicpm3_4b", "minicpm4_8b"])
def test_both_layer_forms_name_the_same_tensors(member):
  cfg = zoo.tiny(zoo.ZOO[member]())
  unrolled = zoo.tiny(zoo.ZOO[member](), scan_layers=False)
  assert _hf_shapes(cfg) == _hf_shapes(unrolled)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["granite", "llama", "minicpm3"])
def test_names_and_shapes_are_those_of_transformers(kind):
  transformers = pytest.importorskip("transformers")
  sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
  sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
  common = {"vocab_size": 99, "model_dim": 32, "mlp_dim": 48, "tie_embeddings": False}
  if kind == "granite":
    module = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes))
    cfg = zoo.tiny(zoo.minicpm4_8b(), head_dim=8, rope=zoo.minicpm_1b().rope, **common)
  elif kind == "llama":
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, head_dim=16))
    cfg = zoo.tiny(zoo.minicpm5_1b(), head_dim=16, **common)
  else:
    low = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    sizes |= low | {"num_key_value_heads": 4}
    module = transformers.MiniCPM3ForCausalLM(transformers.MiniCPM3Config(**sizes))
    cfg = zoo.tiny(zoo.minicpm3_4b(), **common)
  want = {name: tuple(x.shape) for name, x in module.state_dict().items()}
  assert _hf_shapes(cfg) == want
