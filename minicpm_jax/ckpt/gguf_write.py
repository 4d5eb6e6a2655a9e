"""Our parameter tree -> a GGUF file of the llama or minicpm architecture (inference.md 20.1).

Projections get the type that is asked for; embedding and head default to F16 beside quantised
types, norms and the router are F32. Tensors are packed by `quant.gguf_types` and written one at a
time. Traps that are handled: `minicpm.logit_scale` is a divisor and always written; rows of q and k
go back to interleaved pairs; LongRoPE's original length and attention factor are written, which the
stock converter leaves out; ternary blocks of 256 hold one scale, so finer groups are refused.
Not written: MLA, FATReLU, dynamic NTK, the MTP head, InfLLM v2 (llama.cpp runs dense).
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from minicpm_jax import config
from minicpm_jax.ckpt import errors, gguf_sampling, gguf_vocab, hf_names, hf_tensors
from minicpm_jax.core import files, trees, types
from minicpm_jax.core.extras import require_extra
from minicpm_jax.models import joined, transformer
from minicpm_jax.nn import rope
from minicpm_jax.quant import gguf_types, qtensor
from minicpm_jax.text import tokenizer

# kind -> general.file_type
KINDS = {
  "f32": 0,
  "f16": 1,
  "bf16": 32,
  "q4_0": 2,
  "q4_1": 3,
  "q8_0": 7,
  "tq1_0": 36,
  "tq2_0": 37,
}
_TERNARY = ("tq1_0", "tq2_0")
_OUTER = {
  "embed/embedding": "token_embd.weight",
  "final_norm/scale": "output_norm.weight",
  "lm_head/kernel": "output.weight",
}
_LAYER = {
  "attn_norm/scale": "attn_norm",
  "mlp_norm/scale": "ffn_norm",
  "attn/q/kernel": "attn_q",
  "attn/k/kernel": "attn_k",
  "attn/v/kernel": "attn_v",
  "attn/o/kernel": "attn_output",
  "mlp/gate/kernel": "ffn_gate",
  "mlp/up/kernel": "ffn_up",
  "mlp/down/kernel": "ffn_down",
  "moe/router/kernel": "ffn_gate_inp",
  "moe/gate/kernel": "ffn_gate_exps",
  "moe/up/kernel": "ffn_up_exps",
  "moe/down/kernel": "ffn_down_exps",
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """One tensor of the file: where it comes from and the type it gets."""

  name: str
  path: str  # of our leaf
  index: tuple[int, ...]  # on the leading axes of the leaf
  rule: hf_names.Rule
  shape: tuple[int, ...]  # [out, in] (experts in front)
  kind: str


def save_gguf(
  path: str | os.PathLike[str],
  model: transformer.Transformer,
  params: types.Params,
  tok: tokenizer.Tokenizer | None = None,
  *,
  kind: str = "f16",
  embedding_kind: str | None = None,
  lossy_ternary: bool = False,
) -> None:
  """Writes the model, with tokenizer and chat template where `tok` is given.

  Args:
    path: file to write; it appears under its name when it is complete.
    kind: of the projections, one of f32, f16, bf16, q8_0, q4_0, q4_1, tq1_0, tq2_0. Where rows are
      no whole blocks (5760 in blocks of 256) the tensor is stored as F16, with a log line.
    embedding_kind: of embedding and head. Default: `kind` if that is a float type, else f16.
    lossy_ternary: ternary kinds re-quantise weights that they cannot hold exactly; without it such
      weights (latent ones, groups below 256) are refused by name.
  """
  gguf = require_extra("gguf", extra="gguf")
  path = pathlib.Path(path)
  cfg = model.cfg
  for what, value in (("kind", kind), ("embedding_kind", embedding_kind or "f16")):
    if value not in KINDS:
      raise ValueError(f"{what}: found {value!r}, expected one of {sorted(KINDS)}")
  check_model(cfg)
  if embedding_kind is None:
    embedding_kind = kind if kind in ("f32", "bf16") else "f16"
  params = joined.split_projections(cfg, nn.unbox(params))
  leaves = trees.flatten_paths(params, qtensor.is_qtensor)
  if dropped := [p for p in leaves if p.startswith("mtp/")]:
    logging.info("save_gguf: %d leaves of the MTP head left out (no GGUF form)", len(dropped))
  tensors = list(_tensors(cfg, kind, embedding_kind))
  _check_leaves(cfg, leaves, path)
  _warn_of_rounding(tensors, leaves)
  with files.replacing(path) as partial:
    writer = gguf.GGUFWriter(partial, cfg.arch)
    _write_metadata(writer, cfg, kind)
    gguf_sampling.write(writer, cfg.generation)
    gguf_vocab.write_tokenizer(writer, tok, cfg)
    extra = _rope_tensors(cfg)
    for name, value in extra.items():
      writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    for t in tensors:
      block, qtype = gguf_types.block_type(t.kind), gguf.GGMLQuantizationType[t.kind.upper()]
      row = t.shape[-1] // block.width * block.size
      shape = (*t.shape[:-1], row)
      nbytes = int(np.prod(shape))
      if t.kind in ("f32", "f16"):  # the writer wants shapes of values here, of bytes for uint8
        dtype = np.dtype(np.float32 if t.kind == "f32" else np.float16)
        writer.add_tensor_info(t.name, t.shape, dtype, nbytes)
      else:
        writer.add_tensor_info(t.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in extra.values():
      writer.write_tensor_data(value)
    for t in tensors:
      writer.write_tensor_data(_packed(cfg, t, leaves[t.path], lossy_ternary))
    writer.close()


def check_model(cfg: config.ModelConfig) -> None:
  """Refuses what has no form in a GGUF file, and warns of sparse attention, which has none."""

  def refuse(field: str, found: Any, expected: str) -> None:
    raise errors.CheckpointError(f"save_gguf: model.{field}: found {found!r}, expected {expected}")

  if cfg.arch not in ("llama", "minicpm"):
    refuse("arch", cfg.arch, "llama or minicpm (no MLA in this GGUF architecture)")
  if cfg.act != "silu":
    refuse("act", cfg.act, "silu (llama.cpp has no FATReLU)")
  if cfg.rope.kind == "dynamic":
    refuse("rope.kind", cfg.rope.kind, "none, linear or longrope (GGUF has no dynamic NTK)")
  if cfg.arch == "llama" and (cfg.scale_emb, cfg.residual_scale, cfg.logit_divisor) != (1, 1, 1):
    refuse("scale_emb", cfg.scale_emb, "no multipliers in a llama (models.convert.fold_to_llama)")
  if cfg.sparse is not None:
    logging.warning(
      "save_gguf: llama.cpp has no InfLLM v2: the file is dense at every length; the model was "
      "sparse from %d tokens on, and the file's context is %d",
      cfg.sparse.dense_len,
      cfg.max_position,
    )


def _check_leaves(cfg: config.ModelConfig, leaves: dict[str, Any], path: pathlib.Path) -> None:
  shapes, _ = transformer.abstract_params(
    transformer.Transformer(dataclasses.replace(cfg, mtp=None, quant=None))
  )
  wanted = trees.flatten_paths(shapes)
  quant = cfg.quant
  for name, leaf in leaves.items():
    if name not in wanted and not name.startswith("mtp/"):
      raise errors.CheckpointError(
        f"{path}: params: {name}: found a leaf that the model does not have (model.tie_embeddings "
        f"is {cfg.tie_embeddings}, model.scan_layers {cfg.scan_layers}), expected only its own"
      )
    is_latent = quant is not None and quant.weights == "latent" and quant.scheme != "none"
    if is_latent and quant.selects(name) and not qtensor.is_qtensor(leaf):
      raise errors.CheckpointError(
        f"{path}: params: {name}: found latent weights of quant.scheme {quant.scheme!r}, expected "
        "those of the forward pass, which a GGUF file holds (models.convert.fuse or to_codes)"
      )
  for name, leaf in wanted.items():
    found = "no such leaf" if name not in leaves else f"shape {_shape(leaves[name])}"
    if found != f"shape {tuple(leaf.shape)}":
      raise errors.CheckpointError(
        f"{path}: params: {name}: found {found}, expected shape {tuple(leaf.shape)}"
      )


def _warn_of_rounding(tensors: list[_Tensor], leaves: dict[str, Any]) -> None:
  again = [
    t.path
    for t in tensors
    if t.kind in ("q4_0", "q4_1", "q8_0") and qtensor.is_qtensor(leaves[t.path])
    if not _fits(t.kind, leaves[t.path])
  ]
  if again:
    logging.warning(
      "save_gguf: %d quantised kernels are rounded a second time, to the grid of the file's type "
      "(in groups of whole blocks of 32, q4_0 holds symmetric int4 codes, q8_0 ternary ones): %s",
      *(len(again), hf_tensors.listed(sorted(set(again)))),
    )


def _shape(x: Any) -> tuple[int, ...]:
  return tuple(x.full_shape if qtensor.is_qtensor(x) else x.shape)


def _tensors(cfg: config.ModelConfig, kind: str, embedding_kind: str) -> Iterator[_Tensor]:
  """Every tensor of the file, in its order."""
  D, F, V = cfg.model_dim, cfg.mlp_dim, cfg.vocab_size
  qkv = {"attn_q": cfg.num_heads, "attn_k": cfg.num_kv_heads, "attn_v": cfg.num_kv_heads}
  E = () if cfg.moe is None else (cfg.moe.num_experts,)
  shapes = {name: (heads * cfg.head_dim, D) for name, heads in qkv.items()} | {
    "attn_output": (D, cfg.num_heads * cfg.head_dim),
    "attn_norm": (D,),
    "ffn_norm": (D,),
    "ffn_gate_inp": (*E, D),
  }
  for name in ("gate", "up", "down"):
    shape = (D, F) if name == "down" else (F, D)
    shapes[f"ffn_{name}"], shapes[f"ffn_{name}_exps"] = shape, (*E, *shape)
  rows = hf_names.table(cfg)
  for row in rows:
    if row.path in _OUTER:
      shape = (D,) if row.path == "final_norm/scale" else (V, D)
      to = "f32" if len(shape) == 1 else embedding_kind
      yield _Tensor(_OUTER[row.path], row.path, (), row.rule, shape, _fitting(shape, to, row.path))
  for i in range(cfg.num_layers):
    for row in rows:
      if row.path in _OUTER:
        continue
      inner = row.path.removeprefix("layers/")
      name = _LAYER[inner]
      path, index = (row.path, (i,)) if cfg.scan_layers else (f"layers_{i}/{inner}", ())
      to = "f32" if len(shapes[name]) == 1 or name == "ffn_gate_inp" else kind
      to = _fitting(shapes[name], to, path)
      yield _Tensor(f"blk.{i}.{name}.weight", path, index, row.rule, shapes[name], to)


def _fitting(shape: tuple[int, ...], kind: str, path: str) -> str:
  width = gguf_types.block_type(kind).width
  if shape[-1] % width == 0:
    return kind
  logging.warning(
    "save_gguf: %s: rows of %d are no multiple of %s's block of %d: stored as f16",
    *(path, shape[-1], kind, width),
  )
  return "f16"


def _packed(cfg: config.ModelConfig, t: _Tensor, leaf: Any, lossy_ternary: bool) -> np.ndarray:
  """The bytes of one tensor (floats for f32 and f16, as the writer wants them).

  A QTensor is written as the floats that it stands for; symmetric int4 codes go into Q4_0 as they
  are where its groups are whole blocks.
  """
  if qtensor.is_qtensor(leaf):
    one = jax.tree.map(lambda x: x[t.index] if t.index else x, leaf)
    if t.path in ("embed/embedding", "lm_head/kernel"):
      one = qtensor.outputs(one, np.arange(cfg.vocab_size))
    if t.kind == "q4_0" and _fits(t.kind, one):
      return _packed_codes(cfg, t, qtensor.unpack(one))
    leaf, t = qtensor.dequantize(one), dataclasses.replace(t, index=())
  x = np.asarray(leaf[t.index] if t.index else leaf)
  if t.path == "embed/embedding":
    x = x[: cfg.vocab_size]
  elif t.path == "lm_head/kernel":
    x = x[:, : cfg.vocab_size]
  is_expert = len(t.shape) == 3
  x = x.swapaxes(1, 2) if is_expert else hf_names.to_hf(t.rule, x)
  x = _interleaved(cfg, t, np.ascontiguousarray(x, np.float32))
  try:
    packed = gguf_types.pack(x, t.kind)
  except ValueError as error:
    raise errors.CheckpointError(f"save_gguf: {t.name}: {error}") from error
  if t.kind in _TERNARY and not lossy_ternary:
    blocks = [a.reshape(-1, 256) for a in (gguf_types.unpack(packed, t.kind) - x, x)]
    off, high = (np.abs(a).max(axis=1) for a in blocks)
    off = np.max(off / np.maximum(high, 2**-16))  # below, float16 itself is coarser
    if off > 2**-8:  # fused weights in bf16 miss their float16 scale by less
      raise errors.CheckpointError(
        f"save_gguf: {t.name}: found weights that {t.kind} changes by {off:.1%} of their block's "
        "maximum, expected fused ternary weights with one scale in every 256 (per-channel or "
        "groups that are a multiple of 256); lossy_ternary=True re-quantises anyway"
      )
  return packed.view({"f32": np.float32, "f16": np.float16}.get(t.kind, np.uint8))


def _interleaved(cfg: config.ModelConfig, t: _Tensor, x: np.ndarray) -> np.ndarray:
  for name, heads in (("attn/q/", cfg.num_heads), ("attn/k/", cfg.num_kv_heads)):
    if name in t.path:
      x = interleave(x, heads, cfg.head_dim)
  return x


def _fits(kind: str, qt: qtensor.QTensor) -> bool:
  """Whether a file of this kind holds the codes (q8_0: 127 times a scale in float16)."""
  is_plain = qt.zero is None and qt.g_idx is None and qt.order is None
  is_held = (kind, qt.scheme) in (("q4_0", "int4"), ("q8_0", "ternary"))
  return is_held and is_plain and qt.in_size // qt.num_groups % 32 == 0


def _packed_codes(cfg: config.ModelConfig, t: _Tensor, qt: qtensor.QTensor) -> np.ndarray:
  codes = (np.asarray(qt.codes).astype(np.int16) + 8).astype(np.uint8)

  def rows(x: np.ndarray, width: int) -> np.ndarray:  # of every expert, one expert after the other
    x = x.reshape(*qt.lead, width, -1).swapaxes(-1, -2).reshape(-1, width)
    return _interleaved(cfg, t, np.ascontiguousarray(x))

  scale = np.asarray(qt.scale, np.float32)
  packed = gguf_types.pack_q4_0(rows(codes, qt.in_size), rows(scale, qt.num_groups))
  return packed.reshape(*t.shape[:-1], -1)


def interleave(x: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
  """Rows of a q or k projection from half-split RoPE order to interleaved pairs."""
  return x.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(x.shape)


def _write_metadata(writer: Any, cfg: config.ModelConfig, kind: str) -> None:
  writer.add_name(cfg.name)
  writer.add_file_type(KINDS[kind])
  writer.add_quantization_version(2)
  writer.add_vocab_size(cfg.vocab_size)
  writer.add_context_length(cfg.max_position)
  writer.add_embedding_length(cfg.model_dim)
  writer.add_block_count(cfg.num_layers)
  writer.add_feed_forward_length(cfg.mlp_dim)
  writer.add_head_count(cfg.num_heads)
  writer.add_head_count_kv(cfg.num_kv_heads)
  writer.add_key_length(cfg.head_dim)
  writer.add_value_length(cfg.head_dim)
  writer.add_layer_norm_rms_eps(cfg.norm_eps)
  writer.add_rope_dimension_count(cfg.head_dim)
  writer.add_rope_freq_base(cfg.rope.theta)
  if cfg.moe is not None:
    writer.add_expert_count(cfg.moe.num_experts)
    writer.add_expert_used_count(cfg.moe.experts_per_token)
  if cfg.arch == "minicpm":
    writer.add_embedding_scale(cfg.scale_emb)
    writer.add_residual_scale(cfg.residual_scale)
    writer.add_logit_scale(cfg.logit_divisor)
  if cfg.rope.kind == "linear":
    writer.add_string(f"{cfg.arch}.rope.scaling.type", "linear")
    writer.add_float32(f"{cfg.arch}.rope.scaling.factor", cfg.rope.factor)
  elif cfg.rope.kind == "longrope":
    writer.add_string(f"{cfg.arch}.rope.scaling.type", "longrope")
    original = cfg.rope.original_max_position
    writer.add_uint32(f"{cfg.arch}.rope.scaling.original_context_length", original)
    m = rope.attention_factor(cfg.rope, cfg.max_position)
    if m != 1.0:
      writer.add_float32(f"{cfg.arch}.rope.scaling.attn_factor", m)


def _rope_tensors(cfg: config.ModelConfig) -> dict[str, np.ndarray]:
  if cfg.rope.kind != "longrope":
    return {}
  return {
    "rope_factors_long.weight": np.asarray(cfg.rope.long_factor, np.float32),
    "rope_factors_short.weight": np.asarray(cfg.rope.short_factor, np.float32),
  }
