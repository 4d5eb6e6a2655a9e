"""Function-preserving changes of (config, parameters): nothing here changes what the model says.

Fold into Llama form and back (models.md 9), untie, pad and un-pad the vocabulary, sparse upcycling
to experts (MiniCPM §7.3), stacked layers and one subtree a layer, MTP module to draft. Inputs are
never modified; leaves may be numpy or jax arrays and keep their dtype.
"""

import dataclasses
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from minicpm_jax.config import DraftConfig, ModelConfig, MoEConfig
from minicpm_jax.core import trees, types
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import joined, transformer
from minicpm_jax.quant import qat, qtensor, ternary, tree

Converted = tuple[ModelConfig, types.Params]

_BY_OUTPUT = ("codes", "scale", "zero")  # arrays of a QTensor whose last axis are its outputs
_BRANCH_ENDS = re.compile(r"layers(_\d+)?/(attn/o|mlp/down|moe/down)/kernel")


def _scaled(leaf: Any, factor: float) -> Any:
  """leaf * factor through float32, in the leaf's dtype."""
  return (jnp.asarray(leaf).astype(jnp.float32) * factor).astype(leaf.dtype)


def _scale_params(params: types.Params, emb: float, branch: float, head: float) -> types.Params:
  def one(path: str, leaf: Any) -> Any:
    path = path.removesuffix("/scale")  # a quantised kernel is scaled by its scales
    if path == "embed/embedding":
      return _scaled(leaf, emb)
    if path == "lm_head/kernel":
      return _scaled(leaf, head)
    return _scaled(leaf, branch) if _BRANCH_ENDS.fullmatch(path) else leaf

  return trees.map_with_path(one, params)


def fold_to_llama(cfg: ModelConfig, params: types.Params) -> Converted:
  """muP multipliers multiplied into the weights: a plain Llama (Mixtral for experts), untied.

  Exact in real arithmetic; in bf16 the factors round, so fold in float32 and cast last. Not for
  training: Adam, weight decay and the muP learning rates act on the unfolded tensors, and latent
  weights are refused (`fuse` them): int4 codes of scaled ones differ. The form of decoding
  (`models.joined`) is undone first.
  """
  if cfg.mla is not None:
    raise ValueError(f"model.arch: found {cfg.arch!r}, expected 'minicpm' or 'llama' for folding")
  if cfg.mtp is not None:
    raise ValueError("model.mtp: found an MTP module, expected none (drop params['mtp'] first)")
  qat.check_not_latent(cfg.quant)
  _, params = untie(cfg, joined.split_projections(cfg, params))
  params = _scale_params(params, cfg.scale_emb, cfg.residual_scale, 1.0 / cfg.logit_divisor)
  folded = dataclasses.replace(
    cfg,
    arch="llama",
    scale_emb=1.0,
    scale_depth=None,
    dim_model_base=None,
    mup_denominator=None,
    tie_embeddings=False,
  )
  return folded, params


def unfold_from_llama(
  llama_cfg: ModelConfig, params: types.Params, original_cfg: ModelConfig
) -> Converted:
  """Inverse of `fold_to_llama`; the constants and the tie come from `original_cfg`.

  Vocabulary padding and layer form are those of `llama_cfg`.
  """
  if llama_cfg.arch != "llama":
    raise ValueError(f"llama_cfg.arch: found {llama_cfg.arch!r}, expected 'llama' (folded weights)")
  qat.check_not_latent(original_cfg.quant)
  for name in ("vocab_size", "model_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads"):
    found, expected = getattr(llama_cfg, name), getattr(original_cfg, name)
    if found != expected:
      raise ValueError(f"llama_cfg.{name}: found {found}, expected {expected} of the original")
  cfg = dataclasses.replace(
    original_cfg, vocab_multiple=llama_cfg.vocab_multiple, scan_layers=llama_cfg.scan_layers
  )
  scale = 1.0 / cfg.residual_scale
  params = joined.split_projections(llama_cfg, params)
  params = _scale_params(params, 1.0 / cfg.scale_emb, scale, cfg.logit_divisor)
  if cfg.tie_embeddings:
    params = {name: leaf for name, leaf in params.items() if name != "lm_head"}
  return cfg, params


def untie(cfg: ModelConfig, params: types.Params) -> Converted:
  """Gives the model a head of its own, equal to the embedding table (codes of it: the same)."""
  if not cfg.tie_embeddings:
    return cfg, dict(params)
  head = transformer.low_bit_head(cfg, params)
  if head is None:
    head = jnp.transpose(jnp.asarray(params["embed"]["embedding"]))
  params = {**params, "lm_head": {"kernel": head}}
  return dataclasses.replace(cfg, tie_embeddings=False), params


def _resize_vocab(cfg: ModelConfig, params: types.Params, multiple: int) -> Converted:
  new_cfg = dataclasses.replace(cfg, vocab_multiple=multiple)

  def resize(leaf: Any, axis: int) -> Any:
    kept = jax.lax.slice_in_dim(jnp.asarray(leaf), 0, cfg.vocab_size, axis=axis)
    pad = [(0, 0)] * leaf.ndim
    pad[axis] = (0, new_cfg.padded_vocab_size - cfg.vocab_size)
    return jnp.pad(kept, pad)

  def one(path: str, leaf: Any) -> Any:
    if path not in ("embed/embedding", "lm_head/kernel"):
      return leaf
    if not qtensor.is_qtensor(leaf):
      return resize(leaf, 0 if path == "embed/embedding" else 1)
    arrays = {n: resize(x, x.ndim - 1) for n in _BY_OUTPUT if (x := getattr(leaf, n)) is not None}
    return leaf.replace(**arrays, shape=(leaf.shape[0], new_cfg.padded_vocab_size))

  return new_cfg, trees.map_with_path(one, params, is_leaf=qtensor.is_qtensor)


def pad_vocab(cfg: ModelConfig, params: types.Params, multiple: int) -> Converted:
  """Embedding and head filled with zero rows up to a multiple (122753 is odd); logits stay."""
  return _resize_vocab(cfg, params, multiple)


def unpad_vocab(cfg: ModelConfig, params: types.Params) -> Converted:
  """Embedding and head cut to cfg.vocab_size rows."""
  return _resize_vocab(cfg, params, 1)


def upcycle(
  cfg: ModelConfig, params: types.Params, key: Key[Array, ""], moe: MoEConfig
) -> Converted:
  """Every FFN becomes `num_experts` copies of itself behind a random router (MiniCPM §7.3).

  The copies are equal and the chosen weights sum to 1, so the function is unchanged at step 0.
  Joined projections are split first; the experts of quantised kernels are copies of their codes.
  """
  if cfg.moe is not None:
    raise ValueError(f"model.moe: found {cfg.moe}, expected a dense model to upcycle")
  dtype = types.dtype_of(cfg.param_dtype)
  params = joined.split_projections(cfg, params)

  def one_layer(layer: types.Params, key: Key[Array, ""]) -> types.Params:
    lead = layer["attn_norm"]["scale"].shape[:-1]  # (L,) when stacked

    def copies(x: Any) -> Any:  # of a kernel, or of every array of a QTensor
      x = jnp.expand_dims(jnp.asarray(x), len(lead))
      return jnp.broadcast_to(x, (*lead, moe.num_experts, *x.shape[len(lead) + 1 :]))

    shape = (*lead, cfg.model_dim, moe.num_experts)
    router = moe.router_init_std * jax.random.normal(key, shape, jnp.float32)
    experts = {"router": {"kernel": router.astype(dtype)}}
    for name in ("gate", "up", "down"):
      experts[name] = {"kernel": jax.tree.map(copies, layer["mlp"][name]["kernel"])}
    return {**{n: leaf for n, leaf in layer.items() if n != "mlp"}, "moe": experts}

  names = ["layers"] if cfg.scan_layers else [f"layers_{i}" for i in range(cfg.num_layers)]
  changed = {
    name: one_layer(params[name], jax.random.fold_in(key, i)) for i, name in enumerate(names)
  }
  return dataclasses.replace(cfg, moe=moe), {**params, **changed}


def stack_layers(cfg: ModelConfig, params: types.Params) -> Converted:
  """layers_0, layers_1, ... -> layers with a leading L axis (scan_layers=True)."""
  if cfg.scan_layers:
    return cfg, dict(params)
  names = [f"layers_{i}" for i in range(cfg.num_layers)]
  layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
  rest = {name: leaf for name, leaf in params.items() if name not in names}
  return dataclasses.replace(cfg, scan_layers=True), {**rest, "layers": layers}


def unstack_layers(cfg: ModelConfig, params: types.Params) -> Converted:
  """layers -> one subtree a layer (scan_layers=False), the faster form of decoding on a CPU."""
  if not cfg.scan_layers:
    return cfg, dict(params)
  split = {
    f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    for i in range(cfg.num_layers)
  }
  rest = {name: leaf for name, leaf in params.items() if name != "layers"}
  return dataclasses.replace(cfg, scan_layers=False), {**rest, **split}


def mtp_draft_config(cfg: ModelConfig) -> DraftConfig:
  """Shape and scales of the draft that `mtp_to_eagle` makes."""
  if cfg.mtp is None:
    raise ValueError("model.mtp: found no MTP module, expected a model that was trained with one")
  scale = 1.0
  if cfg.mtp.scale_depth_over_sqrt_layers and cfg.scale_depth is not None:
    scale = cfg.scale_depth / math.sqrt(cfg.num_layers + 1)
  return draft_lib.for_target(cfg, "minicpm", residual_scale=scale)


def mtp_to_eagle(cfg: ModelConfig, params: types.Params) -> tuple[DraftConfig, types.Params]:
  """The MTP module as a MiniCPM4 EAGLE draft of the same logits (MiniCPM4 §2.3.2, §4.1.3).

  Renames; the projection reads (h, emb) where the draft's fc reads (emb, h), so its rows change
  places. Residual scale and logit scale are those of pretraining.
  """
  if cfg.mtp is None or "mtp" not in params:
    raise ValueError("model.mtp: found no MTP module, expected a model that was trained with one")
  mtp = params["mtp"]
  return mtp_draft_config(cfg), {
    "fc": {"kernel": _swap_halves(mtp["proj"]["kernel"])},
    "embed_norm": mtp["embed_norm"],
    "hidden_norm": mtp["hidden_norm"],
    "layers_0": mtp["layer"],
  }


def _swap_halves(kernel_2DD: Any) -> Any:
  first, second = jnp.split(jnp.asarray(kernel_2DD), 2, axis=0)
  return jnp.concatenate((second, first), axis=0)


def fuse(cfg: ModelConfig, params: types.Params) -> Converted:
  """Quantised weights as plain floats in a model that knows nothing of them ("fake-quant").

  Latent weights are quantised by cfg.quant, QTensors dequantised. Not to be trained on with quant:
  quantising twice shrinks ternary weights (`quant.ternary.check_latent` refuses).
  """
  _, params = to_codes(cfg, params)
  dtype = types.dtype_of(cfg.param_dtype)
  return dataclasses.replace(cfg, quant=None), tree.dequantize_params(params, dtype)


def to_codes(
  cfg: ModelConfig, params: types.Params, form: Literal["codes", "packed"] = "codes"
) -> Converted:
  """Latent weights as QTensors, the run-time form; QTensors are packed or unpacked.

  Joined projections are split first. Raises FusedWeightsError where latent weights are expected and
  the ones given are quantised already.
  """
  if cfg.quant is None or cfg.quant.scheme == "none":
    raise ValueError(f"model.quant: found {cfg.quant}, expected a scheme of codes")
  params = joined.split_projections(cfg, params)
  quant = dataclasses.replace(cfg.quant, weights=form, fp8=None)
  if cfg.quant.weights == "latent":
    ternary.check_latent(cfg.quant, params)
    params = tree.quantize_params(quant, params)
  change = qtensor.pack if form == "packed" else qtensor.unpack
  return dataclasses.replace(cfg, quant=quant), tree.map_qtensors(change, params)
