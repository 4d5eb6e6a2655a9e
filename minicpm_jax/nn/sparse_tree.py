"""InfLLM v2 attention of a draft tree's nodes against a cache (infllm_v2.md section 14).

A node sees the committed tokens of its selected blocks, and its ancestors and itself among the
nodes. Selection is that of sequential decoding: at the node's own position, with the cached windows
of committed tokens, which all nodes share, and those that the node's path completes. The second
stage is that of decoding, with the nodes as queries of one row.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.nn import kv, lookahead, sparse_attention, sparse_cache, sparse_grid
from pallas_kernels.sparse_decode import api as sparse_decode
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import xla as topk_xla

RUN = 31  # nodes of one call of the second stage: the most that kernels take


@flax.struct.dataclass
class TreeGrid:
  """Where the nodes of every row stand; the same for all layers."""

  length_B: Any  # int32, committed tokens
  depth_BP: Any  # int32
  anc_BPP: Any  # bool, ancestor or self
  all_dense: bool | None = flax.struct.field(pytree_node=False, default=None)  # None: data tells

  @property
  def pos_BP(self) -> Any:
    return self.length_B[:, None] + self.depth_BP

  def is_dense(self, cfg: SparseAttentionConfig) -> Any:
    """bool [B, P]: nodes whose sequence, themselves included, is below dense_len."""
    return self.pos_BP + 1 < cfg.dense_len


def attend_tree(
  q_BPNH: Float[Array, "B P N H"],
  k_BPKH: Float[Array, "B P K H"],
  v_BPKH: Float[Array, "B P K H"],
  q_score_BPNH: Float[Array, "B P N H"],
  cache: kv.LayerCache,
  cfg: SparseAttentionConfig,
  grid: TreeGrid,
  implementation: sparse_attention.Implementation = "auto",
  *,
  prompts: lookahead.Prompts | None = None,
) -> Float[Array, "B P N H"]:
  """`cache`: the layer's view with the nodes written at length + node; k, v: the nodes' own.

  q_score: the queries that choose blocks (before RoPE with `use_nope`). prompts: soft prompts,
  which are in no block and so always seen by the nodes that may see them.
  """
  B, P, N, H = q_BPNH.shape
  k_BSKH, v_BSKH = kv.read(cache, cache.k), kv.read(cache, cache.v)
  S, K = k_BSKH.shape[1:3]
  keys_BSKH = kv.read(cache, cache.k_nope) if cfg.use_nope else k_BSKH
  (fine, own_fine), (coarse, own_coarse) = (
    _compressed(cache, level, keys_BSKH, cfg, grid) for level in sparse_cache.LEVELS
  )
  grid_nodes = sparse_grid.Grid(
    start_BT=jnp.zeros((B, P), jnp.int32),
    offset_B=grid.length_B,
    is_dense_BT=None if grid.all_dense is False or cfg.dense_len <= 0 else grid.is_dense(cfg),
    is_cached=True,
  )
  nodes = nodes_lib.Nodes(grid.pos_BP, own_fine, own_coarse)
  args = (q_score_BPNH, fine, coarse, cfg, grid_nodes, S, implementation, nodes)
  ids_BKPW, _ = sparse_attention.select_from_keys(*args)
  if rest := -S % cfg.block_size:  # a copy: the engine's caches and spans have whole blocks
    k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
  num_pages = (S + rest) // cfg.block_size
  pages_BM = jnp.arange(B * num_pages, dtype=jnp.int32).reshape(B, num_pages)
  paged = lambda x: jnp.reshape(x, (B * num_pages, cfg.block_size, K, -1))  # noqa: E731
  k_pages, v_pages = paged(k_BSKH), paged(v_BSKH)

  def past_of(first: int):
    own = slice(first, first + RUN)
    num = min(RUN, P - first)
    return sparse_decode.decode_blocks(
      q_BPNH[:, own],
      k_pages,
      v_pages,
      ids_BKPW[:, :, own],
      block_size=cfg.block_size,
      q_offset=jnp.broadcast_to(grid.length_B[:, None] - 1, (B, num)),
      page_table_BM=pages_BM,
      implementation=implementation,
    )

  runs = [past_of(first) for first in range(0, P, RUN)]
  past, lse_past = (jnp.concatenate(parts, axis=1) for parts in zip(*runs, strict=True))
  keys, sees_BPS = (k_BPKH, v_BPKH), grid.anc_BPP
  if prompts is not None:
    keys, sees_BPS = prompts.behind(*keys), prompts.behind_mask(sees_BPS)
  own, lse_own = _among_nodes(q_BPNH, *keys, sees_BPS)
  share = jax.nn.sigmoid(lse_own - lse_past)[..., None]  # of the nodes in the whole softmax
  return (share * own + (1 - share) * past.astype(jnp.float32)).astype(v_BPKH.dtype)


def _among_nodes(q_BPNH, k_BSKH, v_BSKH, sees_BPS):
  """(out [B, P, N, H] float32, lse [B, P, N]) of attention to ancestors and self (and prompts)."""
  B, P, N, H = q_BPNH.shape
  K = k_BSKH.shape[2]
  q_BPKGH = jnp.reshape(q_BPNH, (B, P, K, N // K, H))
  scores = jnp.einsum("BPKGH,BSKH->BPKGS", q_BPKGH, k_BSKH, preferred_element_type=jnp.float32)
  scores = jnp.where(sees_BPS[:, :, None, None, :], H**-0.5 * scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=-1)
  probs = jnp.exp(scores - lse[..., None])
  out = jnp.einsum("BPKGS,BSKH->BPKGH", probs, v_BSKH.astype(jnp.float32))
  return jnp.reshape(out, (B, P, N, H)), jnp.reshape(lse, (B, P, N))


def _compressed(cache, level: str, keys_BSKH, cfg, grid: TreeGrid):
  """(cached compressed keys [B, F, K, H], the windows that each node's own path completes)."""
  scale = sparse_cache.LEVELS[level]
  size, stride = scale * cfg.kernel_size, scale * cfg.kernel_stride
  span = None if cache.span is None else sparse_cache.num_entries(cfg, level, cache.span)
  cached_BFKH = kv.read(cache, getattr(cache, level), span=span)
  B, _, K, H = cached_BFKH.shape
  P = grid.depth_BP.shape[1]
  num_own = P // stride + 1  # a path has at most P nodes
  first_B = jnp.maximum(0, (grid.length_B - size) // stride + 1)  # windows of committed tokens
  steps_R = jnp.arange((num_own - 1) * stride + size, dtype=jnp.int32)

  def own_windows():
    pos_BR = stride * first_B[:, None] + steps_R[None, :]
    slots_BPR = path_slots(pos_BR, grid)
    slots_BPR = jnp.clip(slots_BPR, 0, keys_BSKH.shape[1] - 1)
    rows = jax.vmap(lambda k_SKH, at_PR: k_SKH[at_PR])(keys_BSKH, slots_BPR)
    rows = jnp.reshape(rows, (B * P, -1, K, H))
    own = topk_xla.compress(rows, sparse_grid.rule_of(cfg), scale).astype(cached_BFKH.dtype)
    return jnp.reshape(own, (B, P, num_own, K, H))

  if jax.default_backend() == "gpu":  # a branch would wait for the host
    return cached_BFKH, nodes_lib.Own(first_B, own_windows())
  last_BP = grid.pos_BP + 1  # a node completes a window that ends at its own position or before
  is_any = jnp.any(last_BP >= (stride * first_B + size)[:, None])
  nobody_looks = functools.partial(jnp.zeros, (B, P, num_own, K, H), cached_BFKH.dtype)
  return cached_BFKH, nodes_lib.Own(first_B, jax.lax.cond(is_any, own_windows, nobody_looks))


def path_slots(pos_BR: Int[Array, "B R"], grid: TreeGrid) -> Int[Array, "B P R"]:
  """Slot of each position on the path of each node; positions beyond the node: its own slot."""
  length_B11 = grid.length_B[:, None, None]
  depth_BR = jnp.clip(pos_BR - grid.length_B[:, None], 0)
  is_at_BPRP = grid.anc_BPP[:, :, None, :] & (
    grid.depth_BP[:, None, None, :] == depth_BR[:, None, :, None]
  )
  node_BPR = jnp.argmax(is_at_BPRP, axis=-1).astype(jnp.int32)
  return jnp.where(pos_BR[:, None, :] < length_B11, pos_BR[:, None, :], length_B11 + node_BPR)
