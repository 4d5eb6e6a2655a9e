"""The decoder-only Transformer of the family (models.md 3): MiniCPM, Llama form, MiniCPM3, MoE.

One forward serves training (packed rows, remat, scan over layers) and decoding (cache in, cache
out). RoPE tables are made once and shared by all layers. Which attention, MLP and residual scale
a block has comes from the config alone.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import mesh, types
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.nn import (
  attention,
  functional,
  kv,
  layers,
  lookahead,
  mla,
  moe,
  mtp,
  rope,
  sparse_attention,
  sparse_grid,
  sparse_tree,
)
from minicpm_jax.quant import qtensor
from pallas_kernels.sparse_attention import mosaic_gpu as sparse_kernels

Ids = Int[Array | np.ndarray, "B T"]


@flax.struct.dataclass
class Output:
  """Result of a forward; `aux` has the un-weighted MoE balance loss summed over layers."""

  logits: Any  # [B, T, vocab_size] float32, or None
  hidden: Any  # [B, T, D] after the final norm, before the logit divisor
  cache: Any = None  # KVCache or None
  taps: Any = None  # [B, T, D * number of taps]: the residual stream before the chosen layers
  aux: dict[str, Any] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Context:
  """What every layer of one forward shares."""

  tables: rope.RopeTables
  segment_ids_BT: Any = None
  kv_segment_ids_BS: Any = None
  grid: Any = None  # sparse_grid.Grid or sparse_tree.TreeGrid where attention may be sparse
  mask_BTS: Any = None  # bool, replaces the causal rule (draft trees)
  is_mask_BT: Any = None  # bool, rows that see the soft prompts
  keeps_inputs: bool = flax.struct.field(pytree_node=False, default=False)


class Block(nn.Module):
  """h + r attn(norm h), h + r mlp(norm h); carries (hidden, cache).

  Yields (balance loss or None, its input where `ctx.keeps_inputs`).
  """

  cfg: ModelConfig
  residual_scale: float
  is_dense: bool = False  # the MTP block has no experts

  @nn.compact
  def __call__(
    self,
    carry: tuple[Float[Array, "B T D"], kv.LayerCache | None],
    ctx: Context,
    prompts: tuple[Array, Array] | None = None,
  ) -> tuple[tuple[Float[Array, "B T D"], kv.LayerCache | None], tuple[Any, Any]]:
    cfg, (x_BTD, cache) = self.cfg, carry
    x_BTD = checkpoint_name(x_BTD, "block_input")
    given = x_BTD if ctx.keeps_inputs else None
    normed = layers.RMSNorm(cfg, name="attn_norm")(x_BTD)
    args = (normed, ctx.tables, ctx.segment_ids_BT, ctx.kv_segment_ids_BS, cache)
    if cfg.mla is None:
      if prompts is not None:
        prompts = lookahead.Prompts(*prompts, ctx.is_mask_BT)
      args += (ctx.grid, ctx.mask_BTS, prompts)
      branch, cache = attention.Attention(cfg, name="attn")(*args)
    else:
      branch, cache = mla.MLA(cfg, name="attn")(*args, ctx.mask_BTS)
    x_BTD = functional.add_branch(x_BTD, branch, self.residual_scale)
    x_BTD = mesh.constrain(x_BTD, "act_batch", "act_seq", "act_embed")
    normed = layers.RMSNorm(cfg, name="mlp_norm")(x_BTD)
    loss = None
    if cfg.moe is None or self.is_dense:
      branch = layers.MLP(cfg, name="mlp")(normed)
    else:
      is_token_BT = None if ctx.segment_ids_BT is None else ctx.segment_ids_BT != 0
      branch, loss = moe.MoE(cfg, name="moe")(normed, is_token_BT)
    x_BTD = functional.add_branch(x_BTD, branch, self.residual_scale)
    return (mesh.constrain(x_BTD, "act_batch", "act_seq", "act_embed"), cache), (loss, given)


def remat(
  block: type[nn.Module],
  policy: Literal["none", "dots", "full", "offload"],
  *,
  is_scanned: bool = False,
) -> Any:
  """The block under a rematerialisation policy; outside a scan XLA must be kept from undoing it.

  dots keeps matmul results without batch dimensions (all projections, no attention scores), full
  keeps the block's input only, offload keeps that in host memory. All keep the blocks that sparse
  attention selected, and its kernels' lists of them: ranking them again costs time and could end in
  another order. dots keeps what sparse attention's kernels gave, too.
  """
  if policy == "none":
    return block
  policies = jax.checkpoint_policies
  kept = (sparse_attention.SELECTION, sparse_kernels.LISTS)
  chosen = policies.save_only_these_names(*kept)
  if policy == "dots":
    chosen = policies.save_only_these_names(*kept, sparse_kernels.OUT)
    chosen = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, chosen)
  elif policy == "offload":
    chosen = policies.save_and_offload_only_these_names(
      names_which_can_be_saved=list(kept),
      names_which_can_be_offloaded=["block_input"],
      offload_src="device",
      offload_dst="pinned_host",
    )
  return nn.remat(block, policy=chosen, prevent_cse=not is_scanned)


class MTP(nn.Module):
  """One more dense block that predicts token i + 2 from h_i and token i + 1 (MiniCPM4 §2.3.2).

  Fixed where the paper is silent (training.md 10.3): h is taken after the final norm, the embedding
  is scaled before its norm, the projection's rows are h first, and nothing stands between the block
  and the shared head.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, hidden_BTD: Float[Array, "B T D"], embedded_BTD: Float[Array, "B T D"], ctx: Context
  ) -> Float[Array, "B T D"]:
    cfg, scale = self.cfg, 1.0
    if cfg.mtp.scale_depth_over_sqrt_layers and cfg.scale_depth is not None:
      scale = cfg.scale_depth / math.sqrt(cfg.num_layers + 1)
    h_BTD = layers.RMSNorm(cfg, name="hidden_norm")(hidden_BTD)
    e_BTD = layers.RMSNorm(cfg, name="embed_norm")(embedded_BTD)
    shape = (2 * cfg.model_dim, cfg.model_dim)
    proj = layers.Linear(cfg, shape, ("embed", None), name="proj")
    x_BTD = proj(jnp.concatenate((h_BTD, e_BTD), axis=-1))
    (x_BTD, _), _ = remat(Block, cfg.remat)(cfg, scale, True, name="layer")((x_BTD, None), ctx)
    return x_BTD


class Transformer(nn.Module):
  """Embedding, blocks, final norm, head; see `__call__` and the parameter paths in style.md 2.3."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    self.embed_tokens = layers.Embed(cfg, name="embed")
    is_looped = cfg.scan_layers and cfg.scan_unroll == 1
    block = remat(Block, cfg.remat, is_scanned=is_looped)
    if cfg.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=cfg.num_layers,
        unroll=min(cfg.scan_unroll, cfg.num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      self.layers = scanned(cfg, cfg.residual_scale)
    else:
      self.layers = [block(cfg, cfg.residual_scale) for _ in range(cfg.num_layers)]
    self.final_norm = layers.RMSNorm(cfg)
    if not cfg.tie_embeddings:
      self.lm_head = layers.Head(cfg)
    if cfg.mtp is not None:
      self.mtp = MTP(cfg)

  def __call__(
    self,
    tokens_BT: Ids,
    positions_BT: Ids | None = None,
    segment_ids_BT: Ids | None = None,
    cache: cache_lib.KVCache | None = None,
    *,
    rope_length: rope.Length | None = None,
    return_logits: bool = True,
    step: cache_lib.Step | None = None,
    tap_layers: tuple[int, ...] = (),
    ahead: lookahead.Lookahead | None = None,
  ) -> Output:
    """Forward pass.

    segment_ids_BT: 1, 2, ... per packed document, 0 = padding (attends to nothing).
    positions_BT: default restarts at 0 in every segment and continues what the cache holds.
    rope_length: length that dynamic NTK and LongRoPE scale for, or one a row; default is the
      largest position + 1 of this forward, or the capacity of the cache.
    step: required with a cache that has one length a row; then positions and segments are its own.
    tap_layers: layers whose input is wanted in `Output.taps` (EAGLE-3); num_layers is what the
      final norm gets.
    ahead: mask tokens among the rows and their soft prompts (BiTA); with a tree step alone.
    """
    cfg = self.cfg
    tokens_BT, positions_BT, segment_ids_BT = jax.tree.map(
      jnp.asarray, (tokens_BT, positions_BT, segment_ids_BT)
    )
    if tokens_BT.ndim != 2 or not tokens_BT.size:
      raise ValueError(
        f"tokens_BT: found shape {tokens_BT.shape}, expected [rows, tokens], not empty"
      )
    is_stepped = cache is not None and cache.is_per_row
    if step is not None and not is_stepped:
      raise ValueError("step: found one, expected none without a cache of one length a row")
    step = cache_lib.Step() if is_stepped and step is None else step
    if cache is not None:
      cache_lib.check_room(cache, step, tokens_BT.shape[1])
    if is_stepped:
      positions_BT = cache_lib.positions(cache, step, tokens_BT.shape[1])
    elif cache is not None and segment_ids_BT is None:
      segment_ids_BT = jnp.ones_like(tokens_BT)
    if positions_BT is None:
      positions_BT = default_positions(tokens_BT, segment_ids_BT, cache)
    if rope_length is None and cache is not None:
      rope_length = cache.capacity
    ctx = self._context(tokens_BT.shape, positions_BT, segment_ids_BT, rope_length)
    ctx = ctx.replace(keeps_inputs=bool(tap_layers))
    x_BTD, prompts = self.embed(tokens_BT), None
    if ahead is not None:
      _check_ahead(cfg, step)
      x_BTD = lookahead.embedded(x_BTD, ahead, cfg.scale_emb)
      ctx = ctx.replace(is_mask_BT=ahead.mask_BT > 0)
      prompts = (ahead.k_LPKH, ahead.v_LPKH)
    if is_stepped:
      # Or XLA computes cosines and sines again in every layer, for every head.
      ctx = ctx.replace(tables=jax.lax.optimization_barrier(ctx.tables))
      ctx = _with_step(cfg, cache, step, tokens_BT.shape, ctx)
    elif cache is not None:
      cache, ctx = _extend(cfg, cache, segment_ids_BT, ctx)
    x_BTD, cache, losses, inputs = self._run_layers(x_BTD, cache, ctx, step, prompts)
    hidden_BTD = self.final_norm(x_BTD)
    if cfg.mtp is not None and self.is_initializing():
      self.mtp_hidden(hidden_BTD, tokens_BT, positions_BT, segment_ids_BT)
    taps = [x_BTD if layer == cfg.num_layers else inputs[layer] for layer in tap_layers]
    return Output(
      logits=self.unembed(hidden_BTD) if return_logits else None,
      hidden=hidden_BTD,
      cache=cache,
      taps=jnp.concatenate(taps, axis=-1) if taps else None,
      aux={} if losses is None else {"moe_balance_loss": losses},
    )

  def embed(self, tokens_BT: Ids) -> Float[Array, "B T D"]:
    """Token embeddings times scale_emb, in compute dtype."""
    return self.embed_tokens(tokens_BT)

  def unembed(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """float32 logits over cfg.vocab_size; the divisor is applied to the hidden state."""
    tied = self.cfg.tie_embeddings
    logits_BTV = self.embed_tokens.attend(hidden_BTD) if tied else self.lm_head(hidden_BTD)
    logits_BTV = mesh.constrain(logits_BTV, "act_batch", "act_seq", "act_vocab")
    is_padded = self.cfg.padded_vocab_size != self.cfg.vocab_size
    return logits_BTV[..., : self.cfg.vocab_size] if is_padded else logits_BTV

  def mtp_hidden(
    self,
    hidden_BTD: Float[Array, "B T D"],
    tokens_BT: Ids,
    positions_BT: Ids | None = None,
    segment_ids_BT: Ids | None = None,
  ) -> Float[Array, "B T D"]:
    """Hidden states whose `unembed` at position i predicts token i + 2 (the last: nothing)."""
    tokens_BT, positions_BT, segment_ids_BT = jax.tree.map(
      jnp.asarray, (tokens_BT, positions_BT, segment_ids_BT)
    )
    if positions_BT is None:
      positions_BT = default_positions(tokens_BT, segment_ids_BT, None)
    ctx = self._context(tokens_BT.shape, positions_BT, segment_ids_BT, None)
    return self.mtp(hidden_BTD, self.embed(mtp.shift_left(tokens_BT)), ctx)

  def _context(self, shape, positions_BT, segment_ids_BT, rope_length) -> Context:
    cfg = self.cfg
    tables = rope.tables(cfg.rope, cfg.rotary_dim, cfg.max_position, positions_BT, rope_length)
    (B, T), grid = shape, None
    if cfg.sparse is not None and not sparse_grid.is_always_dense(cfg.sparse, T):
      grid = sparse_grid.make_grid(cfg.sparse, T, T, B, segment_ids_BS=segment_ids_BT)
    return Context(tables, segment_ids_BT, segment_ids_BT, grid)

  def _run_layers(self, x_BTD, cache, ctx, step=None, prompts=None):
    """(output, cache, sum of balance losses or None, inputs of the layers where they are kept)."""
    num_new = x_BTD.shape[1]
    if self.cfg.scan_layers:
      view = None if cache is None else cache_lib.layer_view(cache, None, step)
      (x_BTD, view), (losses, inputs) = self.layers((x_BTD, view), ctx, prompts)
      if cache is not None:
        cache = cache_lib.after(cache, view, num_new, step)
      return x_BTD, cache, None if losses is None else jnp.sum(losses), inputs
    views, total, inputs = [], None, []
    for i, block in enumerate(self.layers):
      view = None if cache is None else cache_lib.layer_view(cache, i, step)
      own = None if prompts is None else (prompts[0][i], prompts[1][i])
      (x_BTD, view), (loss, given) = block((x_BTD, view), ctx, own)
      views.append(view)
      inputs.append(given)
      total = loss if total is None else total + loss
    if cache is not None:
      cache = cache_lib.after(cache, views, num_new, step)
    return x_BTD, cache, total, inputs


def default_positions(
  tokens_BT: Int[Array, "B T"],
  segment_ids_BT: Int[Array, "B T"] | None,
  cache: cache_lib.KVCache | None,
) -> Int[Array, "one_or_B T"]:
  """0, 1, ... in every segment; a segment that began in the cache goes on counting."""
  if segment_ids_BT is None:
    return jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
  positions_BT = rope.packed_positions(segment_ids_BT)
  if cache is None:
    return positions_BT
  is_first_run_BT = jnp.cumprod(segment_ids_BT == segment_ids_BT[:, :1], axis=1)
  is_used_1S = jnp.arange(cache.capacity)[None, :] < cache.length
  is_same_BS = is_used_1S & (cache.segment_ids_BS == segment_ids_BT[:, :1])
  return positions_BT + is_first_run_BT * jnp.sum(is_same_BS, axis=1, keepdims=True)


def _extend(cfg: ModelConfig, cache: cache_lib.KVCache, segment_ids_BT, ctx: Context):
  """The cache with the new tokens' segment ids, and the context whose keys are all its slots."""
  zero = jnp.zeros((), jnp.int32)
  ids_BS = jax.lax.dynamic_update_slice(
    cache.segment_ids_BS, segment_ids_BT.astype(jnp.int32), (zero, cache.length)
  )
  grid = None
  if cache.fine is not None:
    (B, T), start = segment_ids_BT.shape, cache.length
    more = dict(kv_length=start + T, segment_ids_BS=ids_BS, has_base=True)
    grid = sparse_grid.make_grid(cfg.sparse, T, cache.capacity, B, q_offset=start, **more)
  return cache.replace(segment_ids_BS=ids_BS), ctx.replace(kv_segment_ids_BS=ids_BS, grid=grid)


def _with_step(cfg: ModelConfig, cache: cache_lib.KVCache, step, shape, ctx: Context) -> Context:
  """The context of a forward on a cache with one length a row."""
  (B, T), length_B = shape, cache_lib.lengths(cache, step)
  if B != length_B.shape[0]:
    raise ValueError(
      f"tokens_BT: found {B} rows, expected {length_B.shape[0]} "
      f"({'step.row is set' if step.row is not None else 'rows of the cache'})"
    )
  span = cache.capacity if step.span is None else min(step.span, cache.capacity)
  mask_BTS = None
  if step.is_tree:
    mask_BTS = cache_lib.tree_mask(length_B, step.anc_BTT, span, step.sees_BTS)
  if step.sees_BTS is not None and cache.fine is not None:
    raise ValueError("step.sees_BTS: found with sparse attention, expected a dense model")
  grid = None
  if cache.fine is not None:
    # What a branch in every layer would find out: the sequences end within the span.
    is_short = step.total_B is None and span < cfg.sparse.dense_len
    all_dense = False if step.is_long or cfg.sparse.dense_len <= 0 else True if is_short else None
    if step.is_tree and T > 1:
      grid = sparse_tree.TreeGrid(length_B, step.depth_BT, step.anc_BTT, all_dense)
    else:
      num_new = T if step.num_new_B is None else step.num_new_B
      total_B = length_B + num_new if step.total_B is None else step.total_B
      grid = sparse_grid.make_grid(cfg.sparse, T, span, B, q_offset=length_B, kv_length=total_B)
      grid = grid.replace(is_cached=True, all_dense=all_dense)
      grid = grid.replace(is_dense_BT=None) if all_dense is False else grid
  return ctx.replace(grid=grid, mask_BTS=mask_BTS)


def _check_ahead(cfg: ModelConfig, step: cache_lib.Step | None) -> None:
  if step is None or not step.is_tree:
    raise ValueError("ahead: found mask tokens, expected them in a tree step on a cache alone")
  if cfg.mla is not None:
    raise ValueError("ahead: found latent attention, expected keys and values by head")


def init_params(model: Transformer, key: Key[Array, ""]) -> types.Params:
  """Random parameters as a plain nested dict (MiniCPM Table 7 standard deviations)."""
  return jax.jit(lambda key: nn.unbox(_init(model, key)))(key)


def _init(model: Transformer, key: Key[Array, ""]) -> types.Params:
  return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def abstract_params(model: Transformer) -> tuple[types.Params, types.Params]:
  """(ShapeDtypeStruct tree, tree of PartitionSpecs of logical axis names), nothing computed."""
  boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
  return nn.unbox(boxed), nn.get_partition_spec(boxed)


def head_weight(cfg: ModelConfig, params: types.Params) -> types.AnyArray:
  """[D, padded vocab] head: logits = hidden / cfg.logit_divisor @ head; codes as floats."""
  head = low_bit_head(cfg, params)
  if head is not None:
    return qtensor.dequantize(head)
  return params["embed"]["embedding"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]


def low_bit_head(cfg: ModelConfig, params: types.Params) -> qtensor.QTensor | None:
  """The head [D, padded vocab] where it is held as codes, else None."""
  head = params["embed"]["embedding"] if cfg.tie_embeddings else params["lm_head"]["kernel"]
  return head.replace(is_table=False) if qtensor.is_qtensor(head) else None
