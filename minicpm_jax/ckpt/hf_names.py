"""Tensor names of Hugging Face checkpoints: one table per architecture (models.md 7).

A row is (our path, HF name, rule). `{i}` in an HF name is the layer, `{e}` the expert; both are
stacked on leading axes of our leaf: [L, ...] and [L, E, ...]. Rules, for one tensor:

  copy      same array (embeddings are not transposed, norms are vectors)
  linear    HF [out, in] -> W.T -> [in, *out], out axes split head-major: [D, N, H], [D, F]
  heads_in  HF [out, in] -> W.T -> [*in, out]: the output projection [N, H, D]

Trap of the MoE names: w1 is the gate, w3 is up, w2 is down. The MTP head has no HF name.
"""

import dataclasses
import math
import re
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from minicpm_jax import config
from minicpm_jax.ckpt import errors

Rule = Literal["copy", "linear", "heads_in"]


class Row(NamedTuple):
  path: str
  hf_name: str
  rule: Rule


_OUTER = (
  Row("embed/embedding", "model.embed_tokens.weight", "copy"),
  Row("final_norm/scale", "model.norm.weight", "copy"),
  Row("lm_head/kernel", "lm_head.weight", "linear"),
)
_NORMS = (
  Row("layers/attn_norm/scale", "model.layers.{i}.input_layernorm.weight", "copy"),
  Row("layers/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight", "copy"),
)
_GQA = (
  Row("layers/attn/q/kernel", "model.layers.{i}.self_attn.q_proj.weight", "linear"),
  Row("layers/attn/k/kernel", "model.layers.{i}.self_attn.k_proj.weight", "linear"),
  Row("layers/attn/v/kernel", "model.layers.{i}.self_attn.v_proj.weight", "linear"),
  Row("layers/attn/o/kernel", "model.layers.{i}.self_attn.o_proj.weight", "heads_in"),
)
_MLA = (
  Row("layers/attn/q_a/kernel", "model.layers.{i}.self_attn.q_a_proj.weight", "linear"),
  Row("layers/attn/q_a_norm/scale", "model.layers.{i}.self_attn.q_a_layernorm.weight", "copy"),
  Row("layers/attn/q_b/kernel", "model.layers.{i}.self_attn.q_b_proj.weight", "linear"),
  Row("layers/attn/kv_a/kernel", "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight", "linear"),
  Row("layers/attn/kv_a_norm/scale", "model.layers.{i}.self_attn.kv_a_layernorm.weight", "copy"),
  Row("layers/attn/kv_b/kernel", "model.layers.{i}.self_attn.kv_b_proj.weight", "linear"),
  Row("layers/attn/o/kernel", "model.layers.{i}.self_attn.o_proj.weight", "heads_in"),
)
_MLP = (
  Row("layers/mlp/gate/kernel", "model.layers.{i}.mlp.gate_proj.weight", "linear"),
  Row("layers/mlp/up/kernel", "model.layers.{i}.mlp.up_proj.weight", "linear"),
  Row("layers/mlp/down/kernel", "model.layers.{i}.mlp.down_proj.weight", "linear"),
)
_MOE = (
  Row("layers/moe/router/kernel", "model.layers.{i}.mlp.gate.weight", "linear"),
  Row("layers/moe/gate/kernel", "model.layers.{i}.mlp.experts.{e}.w1.weight", "linear"),
  Row("layers/moe/up/kernel", "model.layers.{i}.mlp.experts.{e}.w3.weight", "linear"),
  Row("layers/moe/down/kernel", "model.layers.{i}.mlp.experts.{e}.w2.weight", "linear"),
)
_EXPERTS = "model.layers.{i}.block_sparse_moe.experts.{e}"
_MIXTRAL = (
  Row("layers/moe/router/kernel", "model.layers.{i}.block_sparse_moe.gate.weight", "linear"),
  Row("layers/moe/gate/kernel", _EXPERTS + ".w1.weight", "linear"),
  Row("layers/moe/up/kernel", _EXPERTS + ".w3.weight", "linear"),
  Row("layers/moe/down/kernel", _EXPERTS + ".w2.weight", "linear"),
)

TABLES: dict[str, tuple[Row, ...]] = {
  "llama": _OUTER + _NORMS + _GQA + _MLP,
  "minicpm": _OUTER + _NORMS + _GQA + _MLP,
  "minicpm_moe": _OUTER + _NORMS + _GQA + _MOE,
  "minicpm3": _OUTER + _NORMS + _MLA + _MLP,
  "llama_moe": _OUTER + _NORMS + _GQA + _MIXTRAL,  # MiniCPM-MoE folded into Llama form
}

_IGNORED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")
_QUANTIZED = re.compile(
  r".*\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|weight_zero_point"
  r"|absmax|quant_map|quant_state\..*|B|s)"
)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of our tree: the HF tensors in it, each with its index on the leading axes."""

  path: str
  rule: Rule
  tensors: tuple[tuple[tuple[int, ...], str], ...]

  @property
  def num_leading(self) -> int:
    return len(self.tensors[0][0])


def table(cfg: config.ModelConfig) -> tuple[Row, ...]:
  """The rows that a checkpoint of `cfg` holds."""
  name = cfg.arch if cfg.moe is None else f"{cfg.arch}_moe"
  if name not in TABLES:
    raise errors.CheckpointError(f"model.moe: found experts with arch {cfg.arch!r}, expected none")
  rows = TABLES[name]
  return tuple(r for r in rows if not (cfg.tie_embeddings and r.path == "lm_head/kernel"))


def leaves(cfg: config.ModelConfig) -> dict[str, Leaf]:
  """Our path -> Leaf, stacked (`cfg.scan_layers`) or with one subtree a layer."""
  found = []
  for row in table(cfg):
    if "{i}" not in row.hf_name:
      found.append(Leaf(row.path, row.rule, (((), row.hf_name),)))
      continue
    experts = range(cfg.moe.num_experts) if "{e}" in row.hf_name else (None,)
    layers = [
      [
        (() if e is None else (e,), row.hf_name.replace("{i}", str(i)).replace("{e}", str(e)))
        for e in experts
      ]
      for i in range(cfg.num_layers)
    ]
    if cfg.scan_layers:
      stacked = tuple(((i, *at), name) for i, items in enumerate(layers) for at, name in items)
      found.append(Leaf(row.path, row.rule, stacked))
    else:
      for i, items in enumerate(layers):
        path = row.path.replace("layers/", f"layers_{i}/", 1)
        found.append(Leaf(path, row.rule, tuple(items)))
  return {leaf.path: leaf for leaf in found}


def hf_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape on disk of a tensor whose shape in memory (without leading axes) is `shape`."""
  if rule == "copy":
    return shape
  if rule == "linear":
    return (math.prod(shape[1:]), shape[0])
  return (shape[-1], math.prod(shape[:-1]))


def to_ours(
  rule: Rule, w: Shaped[np.ndarray, "..."], shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
  """A view of the HF tensor in our layout."""
  return w if rule == "copy" else w.T.reshape(shape)


def to_hf(rule: Rule, x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
  """A view of one of our blocks in the HF layout."""
  if rule == "copy":
    return x
  return (x.reshape(x.shape[0], -1) if rule == "linear" else x.reshape(-1, x.shape[-1])).T


def is_ignored(name: str, cfg: config.ModelConfig) -> bool:
  """True for tensors that carry nothing: rope buffers, and the head of a tied model."""
  return bool(_IGNORED.fullmatch(name)) or (cfg.tie_embeddings and name == "lm_head.weight")


def is_quantized(name: str) -> bool:
  """True for tensor names of GPTQ, AWQ, Marlin, bitsandbytes and compressed-tensors files."""
  return bool(_QUANTIZED.fullmatch(name))
