"""Draft models: EAGLE-1/2, MiniCPM4's EAGLE ("MTP layer") and EAGLE-3 (inference.md section 10).

Row t of a draft consumes (embedding of token t + 1, target feature of token t) at rotary position
t and predicts token t + 2. Its output is the feature of the next level.

  eagle    h = fc[e ; f];                layer(s), the first without input norm
  minicpm  h = fc[norm e ; norm f];      layer(s), residual branches scaled
  eagle3   h = fc(f), once a token;      q, k, v read [norm e ; norm h], the stream is h;
                                         logits = head(norm x), x is the next level's h

e is the target's embedding times scale_emb, f the output of the target's final norm (eagle3: the
residual stream before three of its layers). Rejected rows are never written to the cache, so the
cache holds committed rows alone: a ring of any size serves a sliding window.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from minicpm_jax.config import DraftConfig, ModelConfig, QuantConfig
from minicpm_jax.config.quant import PROJECTIONS
from minicpm_jax.core import mesh, types
from minicpm_jax.models import draft_layers
from minicpm_jax.nn import layers, rope
from minicpm_jax.quant import qtensor

Layers = tuple[tuple[Any, Any], ...]  # (k, v) of every draft layer


@dataclasses.dataclass(frozen=True)
class Draft:
  """A draft with its weights; `ids` are the full token ids of its head's rows (None: identity)."""

  cfg: DraftConfig
  params: types.Params
  ids: Any = None  # int32 [cfg.head_size] or None

  @property
  def model(self) -> "DraftModel":
    return DraftModel(self.cfg)


@flax.struct.dataclass
class DraftCache:
  """Committed rows. Position p lives in slot p mod R; a slot's position is -1 while it is empty."""

  k: Any  # one [B, R, K, H] a layer
  v: Any
  positions_BR: Any  # int32


@flax.struct.dataclass
class Diagonals:
  """Keys that row t sees at row t alone: earlier steps of training-time test."""

  layers: Any  # ((k_JBTKH, v_JBTKH), ...)
  is_on_J: Any  # bool


# --- Shapes --------------------------------------------------------------------------------------


def feature_layers(num_layers: int) -> tuple[int, int, int]:
  """EAGLE-3's layers 2, L // 2, L - 3; shallow targets (L < 6) give an early, a middle, a late one.

  A feature is the residual stream *before* that layer, so 0 would be the embedding.
  """
  if num_layers >= 6:
    return (2, num_layers // 2, num_layers - 3)
  return (min(1, num_layers - 1), num_layers // 2, num_layers - 1)


def for_target(target: ModelConfig, kind: str, **changes: Any) -> DraftConfig:
  """A one-layer draft of the target's widths, to be trained here.

  The logit scale is the target's, so its head means the same on the draft's features. `changes`
  are fields of DraftConfig.
  """
  is_mup = target.dim_model_base is not None
  layer = dataclasses.replace(
    target,
    name=f"{target.name}-{kind}",
    arch="minicpm" if target.arch == "minicpm3" else target.arch,
    num_layers=1,
    moe=None,
    mla=None,
    mtp=None,
    sparse=None,
    act="silu",
    quant=None,
    vocab_multiple=1,
    scan_layers=False,
    init_std=target.init_std if is_mup else 0.02,
  )
  fields: dict[str, Any] = {"kind": kind, "layer": layer}
  scale_depth = 1.0 if target.scale_depth is None else target.scale_depth
  branch = 1.0 if target.scale_depth is None else scale_depth / np.sqrt(target.num_layers + 1)
  if kind == "eagle3":
    fields |= {"feature_layers": feature_layers(target.num_layers), "residual_scale": float(branch)}
    fields |= {"feature_scale": target.residual_scale}
  else:
    fields["draft_logit_scale"] = 1.0 / target.logit_divisor
  if kind == "minicpm":
    fields["residual_scale"] = float(branch)
  return DraftConfig(**fields | changes)


def plain(cfg: DraftConfig) -> DraftConfig:
  """EAGLE-3 with features and branches unscaled, as Llama's (vLLM reads MiniCPM's so)."""
  if cfg.kind != "eagle3":
    raise ValueError(f"draft.kind: found {cfg.kind!r}, expected 'eagle3' (only it has features)")
  return dataclasses.replace(cfg, feature_scale=1.0, residual_scale=1.0)


def quantized(
  cfg: DraftConfig,
  group_size: int = 128,
  weights: str = "latent",
  *,
  has_fc: bool = True,
  scheme: str = "int4",
) -> DraftConfig:
  """int4 for fc and the layer's seven linears; norms and heads stay (MiniCPM4 §4.1.3).

  "latent" trains with fake quantisation; "codes" or "packed" is the form that runs. Scales are
  rounded to float16, as GPTQ files hold them. Files of others may leave fc in floats (`has_fc`).
  Other code books (`scheme`) are for comparison: no release has such a draft.
  """
  include = (PROJECTIONS, r"(^|/)fc/kernel$") if has_fc else (PROJECTIONS,)
  quant = QuantConfig(
    scheme=scheme, group_size=group_size, weights=weights, scale_dtype="f16", include=include
  )
  return dataclasses.replace(cfg, layer=dataclasses.replace(cfg.layer, quant=quant))


def check_fits(cfg: DraftConfig, target: ModelConfig) -> None:
  """Refuses a draft of another width or vocabulary."""
  for name in ("model_dim", "vocab_size"):
    found, expected = getattr(cfg.layer, name), getattr(target, name)
    if found != expected:
      raise ValueError(f"draft.layer.{name}: found {found}, expected the target's {expected}")
  if cfg.feature_layers and max(cfg.feature_layers) > target.num_layers:
    raise ValueError(
      f"draft.feature_layers: found {cfg.feature_layers}, expected 0..{target.num_layers}"
    )


def seen(
  q_positions_BT: Int[Array, "B T"], k_positions_BS: Int[Array, "B S"], window_size: int
) -> Bool[Array, "B T S"]:
  """Causal sliding window by position: k <= q, and k > q - window_size unless it is 0."""
  q_BT1, k_B1S = q_positions_BT[:, :, None], k_positions_BS[:, None, :]
  mask_BTS = (k_B1S >= 0) & (k_B1S <= q_BT1)
  return mask_BTS & (k_B1S > q_BT1 - window_size) if window_size else mask_BTS


# --- The model ----------------------------------------------------------------------------------


class DraftModel(nn.Module):
  """Parameters and forward of all three kinds; see the module's docstring.

  Paths: fc/kernel (rows: embedding first, then feature), fc/bias, embed_norm, hidden_norm,
  layers_i/{attn_norm,attn,mlp_norm,mlp}, and for eagle3 norm/scale, lm_head/kernel.
  """

  cfg: DraftConfig

  def setup(self):
    cfg, layer = self.cfg, self.cfg.layer
    self.fc = draft_layers.Fuse(cfg, 3 if cfg.kind == "eagle3" else 2)
    if cfg.kind != "eagle":
      self.embed_norm = layers.RMSNorm(layer)
      self.hidden_norm = layers.RMSNorm(layer)
    has_norm = [cfg.kind == "minicpm" or i > 0 for i in range(layer.num_layers)]
    self.layers = [draft_layers.DraftLayer(cfg, has) for has in has_norm]
    if cfg.kind == "eagle3":
      self.norm = layers.RMSNorm(layer)
      axes = ("embed", "vocab")
      self.lm_head = layers.Kernel(layer, (layer.model_dim, cfg.head_size), axes)

  def fuse(self, feature_BTF: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
    """Target features as `__call__` takes them: eagle3 projects 3D to D once a committed token."""
    dtype = types.dtype_of(self.cfg.layer.dtype)
    feature_BTF = feature_BTF.astype(dtype)
    if self.cfg.kind != "eagle3":
      return feature_BTF
    s = self.cfg.feature_scale
    return self.fc(feature_BTF if s == 1.0 else feature_BTF * s)

  def __call__(
    self,
    embedded_BTD: Float[Array, "B T D"],
    feature_BTD: Float[Array, "B T D"],
    tables: rope.RopeTables,
    past: tuple[Any, ...] = (),
    own_mask_BTT: Bool[Array, "B T T"] | None = None,
    diagonals: Diagonals | None = None,
  ) -> tuple[Float[Array, "B T D"], Layers]:
    """Next features (before any norm), and the rows' keys and values by layer.

    past: sets of keys, each ((k_BSKH, v_BSKH) by layer, mask_BTS). own_mask_BTT: which of these
    rows see each other; None: each sees itself alone. diagonals: see `Diagonals`.
    """
    cfg = self.cfg
    embedded_BTD = embedded_BTD.astype(feature_BTD.dtype)
    inputs = None
    if cfg.kind == "eagle":
      x_BTD = self.fc(jnp.concatenate((embedded_BTD, feature_BTD), axis=-1))
    else:
      e_BTD, f_BTD = self.embed_norm(embedded_BTD), self.hidden_norm(feature_BTD)
      both = jnp.concatenate((e_BTD, f_BTD), axis=-1)
      x_BTD, inputs = (feature_BTD, both) if cfg.kind == "eagle3" else (self.fc(both), None)
    new = []
    for i, layer in enumerate(self.layers):
      parts = [(*by_layer[i], mask) for by_layer, mask in past]
      diag = None if diagonals is None else (*diagonals.layers[i], diagonals.is_on_J)
      x_BTD, kv = layer(x_BTD, inputs, tables, parts, own_mask_BTT, diag)
      inputs = None
      new.append(kv)
    return x_BTD, tuple(new)

  def logits(
    self,
    hidden_BTD: Float[Array, "B T D"],
    head_DR: Float[Array, "D V"] | qtensor.QTensor | None = None,
    *,
    table_VD: Float[Array, "W D"] | None = None,
  ) -> Float[Array, "B T R"]:
    """float32 logits over the head's rows; `head_DR` is the target's (eagle3 has its own).

    table_VD: the head as the rows of an embedding table instead, which is not transposed then.
    """
    if self.cfg.kind == "eagle3":
      hidden_BTD, head_DR, table_VD = self.norm(hidden_BTD), self.lm_head(), None
    if head_DR is None and table_VD is None:
      raise ValueError(f"head_DR: found None, expected the target's head for {self.cfg.kind!r}")
    if qtensor.is_qtensor(head_DR):
      logits = qtensor.matmul(hidden_BTD, head_DR, jnp.float32)
    else:
      head, equation = (head_DR, "BTD,DR->BTR") if table_VD is None else (table_VD, "BTD,RD->BTR")
      head = head.astype(hidden_BTD.dtype)
      logits = jnp.einsum(equation, hidden_BTD, head, preferred_element_type=jnp.float32)
    logits = mesh.constrain(logits, "act_batch", "act_seq", "act_vocab")
    scale = self.cfg.draft_logit_scale
    return logits if scale == 1.0 else logits * scale

  def first_call(self) -> None:
    """Touches every parameter, for `init`."""
    cfg = self.cfg
    embedded = jnp.zeros((1, 1, cfg.layer.model_dim), types.dtype_of(cfg.layer.dtype))
    hidden = self.fuse(jnp.zeros((1, 1, cfg.feature_dim)))
    tables = position_tables(cfg, jnp.zeros((1, 1), jnp.int32))
    hidden, _ = self(embedded, hidden, tables, (), jnp.ones((1, 1, 1), bool))
    if cfg.kind == "eagle3":
      self.logits(hidden)


def position_tables(
  cfg: DraftConfig, positions_BT: Int[Array, "B T"], rope_length: int | None = None
) -> rope.RopeTables:
  """Rotary tables of a draft; `rope_length` as in Transformer.__call__."""
  layer = cfg.layer
  return rope.tables(layer.rope, layer.rotary_dim, layer.max_position, positions_BT, rope_length)


def _init(model: DraftModel, key: Key[Array, ""]) -> types.Params:
  return model.init(key, method="first_call")["params"]


def init_params(cfg: DraftConfig, key: Key[Array, ""]) -> types.Params:
  """Random parameters as a plain nested dict."""
  return jax.jit(lambda key: nn.unbox(_init(DraftModel(cfg), key)))(key)


def abstract_params(cfg: DraftConfig) -> tuple[types.Params, types.Params]:
  """(ShapeDtypeStruct tree, tree of PartitionSpecs of logical axis names), nothing computed."""
  boxed = jax.eval_shape(lambda: _init(DraftModel(cfg), jax.random.key(0)))
  return nn.unbox(boxed), nn.get_partition_spec(boxed)


# --- Cache ---------------------------------------------------------------------------------------


def init_cache(cfg: DraftConfig, batch_size: int, capacity: int) -> DraftCache:
  """An empty cache of `capacity` rows; with a window, a ring of window_size rows is enough."""
  if cfg.window_size and capacity > cfg.window_size:
    capacity = cfg.window_size
  layer = cfg.layer
  dtype = types.dtype_of(layer.dtype)
  shape = (batch_size, capacity, layer.num_kv_heads, layer.head_dim)
  zeros = [tuple(jnp.zeros(shape, dtype) for _ in range(layer.num_layers)) for _ in range(2)]
  return DraftCache(*zeros, jnp.full((batch_size, capacity), -1, jnp.int32))


def cached(cache: DraftCache) -> Layers:
  """(k, v) by layer, as `DraftModel` takes them."""
  return tuple(zip(cache.k, cache.v, strict=True))


def rows_of(
  cache: DraftCache, row: Int[Array, ""] | None, num_rows: int, span: int | None = None
) -> DraftCache:
  """What a call reads: `num_rows` rows of the batch from `row` on (None: all), and of their slots
  those that positions below `span` have (None: all)."""
  size = list(cache.positions_BR.shape)
  if row is not None:
    size[0] = num_rows
  if span is not None:
    size[1] = min(span, size[1])

  def cut(x: Array) -> Array:
    first = (0 if row is None else row, *[0] * (x.ndim - 1))
    return jax.lax.dynamic_slice(x, first, (*size, *x.shape[2:]))

  return cache if size == [*cache.positions_BR.shape] else jax.tree.map(cut, cache)


def write(
  cache: DraftCache,
  new: Layers,
  positions_BT: Int[Array, "B T"],
  is_valid_BT: Bool[Array, "B T"],
  row: Int[Array, ""] | None = None,
) -> DraftCache:
  """Puts valid rows into their slots, from `row` of the batch on (None: they are all of it); of
  more rows than slots the last ones stay."""
  R = cache.positions_BR.shape[1]
  last_B1 = jnp.max(jnp.where(is_valid_BT, positions_BT, -1), axis=1, keepdims=True)
  is_kept_BT = is_valid_BT & (positions_BT > last_B1 - R)
  slots_BT = jnp.where(is_kept_BT, positions_BT % R, R)  # slot R does not exist: dropped
  rows_B1 = jnp.arange(positions_BT.shape[0])[:, None] + (0 if row is None else row)

  def put(old: Array, value: Array) -> Array:
    return old.at[rows_B1, slots_BT].set(value.astype(old.dtype), mode="drop")

  return DraftCache(
    tuple(put(k, kv[0]) for k, kv in zip(cache.k, new, strict=True)),
    tuple(put(v, kv[1]) for v, kv in zip(cache.v, new, strict=True)),
    put(cache.positions_BR, positions_BT),
  )


def extend(
  cfg: DraftConfig,
  params: types.Params,
  cache: DraftCache,
  embedded_BTD: Float[Array, "B T D"],
  feature_BTF: Float[Array, "B T F"],
  positions_BT: Int[Array, "B T"],
  is_valid_BT: Bool[Array, "B T"],
  rope_length: int | None = None,
  *,
  row: Int[Array, ""] | None = None,
  span: int | None = None,
) -> tuple[Float[Array, "B T D"], DraftCache]:
  """Commits rows of true target features: (outputs, cache with the valid rows).

  Positions rise by one along a row; rows that are not valid may hold anything and leave no trace.
  row: the cache's row that these begin with (None: they are all of it). span: bounds the positions
  (None: the cache's size does).
  """
  model, variables = DraftModel(cfg), {"params": params}
  hidden_BTD = model.apply(variables, feature_BTF, method="fuse")
  tables = position_tables(cfg, positions_BT, rope_length)
  own_BTT = seen(positions_BT, jnp.where(is_valid_BT, positions_BT, -1), cfg.window_size)
  # Slots at or past the first new row are leftovers of a longer text.
  held = rows_of(cache, row, positions_BT.shape[0], span)
  old_BR = jnp.where(held.positions_BR < positions_BT[:, :1], held.positions_BR, -1)
  past = (cached(held), seen(positions_BT, old_BR, cfg.window_size))
  hidden_BTD, new = model.apply(variables, embedded_BTD, hidden_BTD, tables, (past,), own_BTT)
  return hidden_BTD, write(cache, new, positions_BT, is_valid_BT, row)
