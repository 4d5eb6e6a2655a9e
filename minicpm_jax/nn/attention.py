"""Dense causal attention: the one call into `pallas_kernels.flash`, and the GQA block.

Where the config has `sparse` and a sequence may reach its dense_len, the block attends to selected
blocks instead (`sparse_attention`); below dense_len the same weights run dense.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import mesh
from minicpm_jax.nn import (
  kv,
  layers,
  lookahead,
  rope,
  sparse_attention,
  sparse_cache,
  sparse_grid,
  sparse_tree,
)
from pallas_kernels.flash import api as flash

MAX_JOINED = 16  # T * K up to which attention of few queries joins the heads on a CPU


def attend(
  cfg: ModelConfig,
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKV: Float[Array, "B S K V"],
  segment_ids_BT: Int[Array, "B T"] | None,
  kv_segment_ids_BS: Int[Array, "B S"] | None,
  q_offset: Int[Array, "*B"] | int = 0,
  mask_BTS: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N V"]:
  """softmax(q k^T / sqrt(cfg.head_dim)) v, causal by slot and inside segments.

  Keys are whole along the sequence here; queries may be cut over the context axis. A mask (draft
  trees: few queries) stands instead of both rules.
  """
  q_BTNH = mesh.constrain(q_BTNH, "act_batch", "act_seq", "act_heads", None)
  k_BSKH = mesh.constrain(k_BSKH, "act_batch", None, "act_kv_heads", None)
  v_BSKV = mesh.constrain(v_BSKV, "act_batch", None, "act_kv_heads", None)
  if mask_BTS is not None:
    return attend_masked(q_BTNH, k_BSKH, v_BSKV, mask_BTS, cfg.head_dim**-0.5)
  out_BTNV = flash.flash_attention(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    scale=cfg.head_dim**-0.5,
    q_offset=q_offset,
    q_segment_ids_BT=segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
    implementation=cfg.attention,
  )
  return mesh.constrain(out_BTNV, "act_batch", "act_seq", "act_heads", None)


def attend_masked(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKV: Float[Array, "B S K V"],
  mask_BTS: Bool[Array, "B T S"],
  scale: float,
) -> Float[Array, "B T N V"]:
  """Attention under a mask that leaves every query a key; holds T x S scores, for few queries."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H))
  is_joined = jax.default_backend() == "cpu" and T * K <= MAX_JOINED
  if is_joined:
    scores = _scores_of_joined_heads(q_BTKGH, k_BSKH)
  else:
    scores = jnp.einsum("BTKGH,BSKH->BKTGS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  scores = jnp.where(mask_BTS[:, None, :, None, :], scale * scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(v_BSKV.dtype)
  if is_joined:
    out_BTKGV = _values_of_joined_heads(probs, v_BSKV)
  else:
    out_BTKGV = jnp.einsum("BKTGS,BSKV->BTKGV", probs, v_BSKV, preferred_element_type=jnp.float32)
  return jnp.reshape(out_BTKGV, (B, T, N, -1)).astype(v_BSKV.dtype)


def _scores_of_joined_heads(q_BTKGH, k_BSKH):
  """q k^T [B, K, T, G, S] as one product over all heads, each query zero outside its own head.

  K times the arithmetic, but the cache is read as it lies: XLA on CPU copies and transposes it for
  a product with the head as batch axis, which takes two to three times as long for few queries.
  """
  B, T, K, G, H = q_BTKGH.shape
  is_own_KJ = jnp.eye(K, dtype=q_BTKGH.dtype)[None, :, None, None, :, None]
  q_BKTGJH = jnp.swapaxes(q_BTKGH, 1, 2)[:, :, :, :, None, :] * is_own_KJ
  q_BRJ = jnp.reshape(q_BKTGJH, (B, K * T * G, K * H))
  k_BSJ = jnp.reshape(k_BSKH, (B, -1, K * H))
  scores_BRS = jnp.einsum("BRJ,BSJ->BRS", q_BRJ, k_BSJ, preferred_element_type=jnp.float32)
  return jnp.reshape(scores_BRS, (B, K, T, G, -1))


def _values_of_joined_heads(probs_BKTGS, v_BSKV):
  """probs v [B, T, K, G, V] as one product; of each query only its own head's values are kept."""
  B, K, T, G, S = probs_BKTGS.shape
  probs_BRS = jnp.reshape(probs_BKTGS, (B, K * T * G, S))
  v_BSJ = jnp.reshape(v_BSKV, (B, S, -1))
  out_BRJ = jnp.einsum("BRS,BSJ->BRJ", probs_BRS, v_BSJ, preferred_element_type=jnp.float32)
  out_BKTGKV = jnp.reshape(out_BRJ, (B, K, T, G, K, -1))
  return jnp.stack([out_BKTGKV[:, head, :, :, head] for head in range(K)], axis=2)


def attend_sparse(
  cfg: ModelConfig,
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  grid: sparse_grid.Grid,
  compressed: tuple[Float[Array, "B F K H"], Float[Array, "B C K H"]] | None = None,
  nope: tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]] | None = None,
) -> Float[Array, "B T N H"]:
  """InfLLM v2 attention on a grid; `cfg.attention` "ref" holds T x S arrays and has no cache."""
  args = (q_BTNH, k_BSKH, v_BSKH, cfg.sparse, grid)
  if cfg.attention == "ref" and compressed is None:
    return sparse_attention.attend_anywhere(*args, nope)
  named = "xla" if cfg.attention in ("xla", "ref") else "auto"
  return sparse_attention.sparse_attend(*args, compressed, nope, implementation=named)


class Attention(nn.Module):
  """Grouped-query attention with RoPE (models.md 3.2); cache in, cache out."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    tables: rope.RopeTables,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    kv_segment_ids_BS: Int[Array, "B S"] | None = None,
    cache: kv.LayerCache | None = None,
    grid: sparse_grid.Grid | sparse_tree.TreeGrid | None = None,
    mask_BTS: Bool[Array, "B T S"] | None = None,
    prompts: lookahead.Prompts | None = None,
  ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None]:
    cfg = self.cfg
    D, N, K, H = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    kv_axes = ("embed", "kv_heads", "head_dim")
    if self.has_variable("params", "qkv"):  # models/joined.py
      axes = ("embed", "heads", "head_dim")
      joined = layers.Linear(cfg, (D, N + 2 * K, H), axes, name="qkv")(x_BTD)
      q_BTNH, k_BSKH, v_BSKH = jnp.split(joined, (N, N + K), axis=2)
    else:
      q_BTNH = layers.Linear(cfg, (D, N, H), ("embed", "heads", "head_dim"), name="q")(x_BTD)
      k_BSKH = layers.Linear(cfg, (D, K, H), kv_axes, name="k")(x_BTD)
      v_BSKH = layers.Linear(cfg, (D, K, H), kv_axes, name="v")(x_BTD)
    nope = (q_BTNH, k_BSKH) if grid is not None and cfg.sparse.use_nope else None
    q_BTNH, k_BSKH = rope.apply_rope(q_BTNH, tables), rope.apply_rope(k_BSKH, tables)
    q_offset, before, compressed = 0, cache, None
    new = (k_BSKH, v_BSKH)
    if cache is not None:
      q_offset = cache.length
      cache, k_BSKH, v_BSKH = kv.write(cache, k_BSKH, v_BSKH)
    is_tree = isinstance(grid, sparse_tree.TreeGrid)
    if cache is not None and nope is not None:
      keys, k_nope_BSKH = kv.write_nope(before, nope[1])
      cache, nope = cache.replace(k_nope=keys), (nope[0], k_nope_BSKH)
    if cache is not None and grid is not None and not is_tree:
      keys = cache.k if nope is None else cache.k_nope
      levels, compressed = sparse_cache.extend(before, keys, cfg.sparse, grid)
      cache = cache.replace(**levels)

    def dense(k_BSKH: Array, v_BSKH: Array) -> Float[Array, "B T N H"]:
      ids, mask = (segment_ids_BT, kv_segment_ids_BS), mask_BTS
      if prompts is not None:
        (k_BSKH, v_BSKH), mask = prompts.behind(k_BSKH, v_BSKH), prompts.behind_mask(mask_BTS)
      return attend(cfg, q_BTNH, k_BSKH, v_BSKH, *ids, q_offset, mask)

    def sparse(k_BSKH: Array, v_BSKH: Array) -> Float[Array, "B T N H"]:
      return attend_sparse(cfg, q_BTNH, k_BSKH, v_BSKH, grid, compressed, nope)

    def sparse_nodes() -> Float[Array, "B T N H"]:
      view = cache.replace(layer=before.layer)
      q_score = q_BTNH if nope is None else nope[0]
      named = "xla" if cfg.attention in ("xla", "ref") else "auto"
      args = (q_BTNH, *new, q_score, view, cfg.sparse, grid, named)
      return sparse_tree.attend_tree(*args, prompts=prompts)

    if grid is None or grid.all_dense:
      out_BTNH = dense(k_BSKH, v_BSKH)
    elif is_tree and grid.all_dense is False:
      out_BTNH = sparse_nodes()
    elif is_tree:
      is_dense = jnp.all(grid.is_dense(cfg.sparse))
      out_BTNH = jax.lax.cond(is_dense, lambda: dense(*kv.view(cache, before.layer)), sparse_nodes)
    elif cache is None or grid.is_dense_BT is None:
      out_BTNH = sparse(k_BSKH, v_BSKH)
    else:  # a layer's keys are cut out of the stacked cache inside the branch that runs
      is_short_BT = grid.is_dense_BT | (grid.start_BT == sparse_grid.NOWHERE)
      out_BTNH = jax.lax.cond(
        jnp.all(is_short_BT),
        lambda: dense(*kv.view(cache, before.layer)),
        lambda: sparse(*kv.view(cache, before.layer)),
      )
    o_axes = ("heads", "head_dim", "embed")
    return layers.Linear(cfg, (N, H, D), o_axes, num_in=2, name="o")(out_BTNH), cache
