"""Which blocks do the queries of a model select? Rank and share of the needle's block, per head.

The model's own queries and keys (outputs of its projections, turned by RoPE) go through the
selection of `nn.sparse_attention` and, for ranks, through the block scores of its definition.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _recall as recall
from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.models import transformer
from minicpm_jax.nn import rope, sparse_attention, sparse_grid
from pallas_kernels.sparse_topk import ref as topk_ref


def queries_and_keys(
  cfg: config.ModelConfig, params: types.Params, tokens_BT: np.ndarray
) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
  """((q_BTNH, k_BTKH) of every layer, after RoPE; logits). Needs cfg.scan_layers False."""
  if cfg.scan_layers:
    raise ValueError("cfg.scan_layers: found True, expected False (one subtree a layer)")
  out, state = transformer.Transformer(cfg).apply(
    {"params": params},
    tokens_BT,
    capture_intermediates=lambda module, _: module.name in ("q", "k"),
    mutable=["intermediates"],
  )
  positions = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
  tables = rope.tables(cfg.rope, cfg.rotary_dim, cfg.max_position, positions)
  layers = []
  for i in range(cfg.num_layers):
    found = state["intermediates"][f"layers_{i}"]["attn"]
    layers.append(tuple(rope.apply_rope(found[n]["__call__"][0], tables) for n in ("q", "k")))
  return layers, out.logits


def probe(
  cfg: config.ModelConfig,
  params: types.Params,
  sparse: config.SparseAttentionConfig,
  tokens: np.ndarray,
  kinds: np.ndarray,
) -> dict:
  """Shares and ranks of the blocks that hold the needles, for the queries that ask for them.

  "selected": [layer][key head] share of needles whose block is selected; "median_rank": of its
  score among the blocks a query may choose (1 = best); "selected_anywhere": by some layer and head;
  "right_if_selected", "right_if_not": needle accuracy of `cfg` in either case (None: no such case).
  """
  rows = np.arange(len(tokens))[:, None]
  slots, asks = recall.needle_slots(tokens, kinds)
  blocks = slots // sparse.block_size
  layers, logits = jax.jit(lambda p, t: queries_and_keys(cfg, p, t))(params, tokens[:, :-1])
  right = np.asarray(jnp.argmax(logits, axis=-1) == tokens[:, 1:])[rows, asks]
  T = tokens.shape[1] - 1
  grid = sparse_grid.make_grid(sparse, T, T, len(tokens))
  rule = sparse_grid.rule_of(sparse)
  selected, ranks = [], []
  for q, k in layers:
    ids_BKTW, _ = sparse_attention.select_blocks(q, k, sparse)
    found = np.moveaxis(np.asarray(ids_BKTW), 1, 3)[rows, asks]  # [rows, needles, W, K]
    selected.append((found == blocks[:, :, None, None]).any(axis=2))
    kernel = topk_ref.kernel_scores(q, k, grid.pos_BT, grid.start_BT, rule)
    scores = topk_ref.block_scores(kernel, grid.start_BT, rule, rule.num_blocks(T))
    scores = np.moveaxis(np.asarray(scores), 1, 3)[rows, asks]  # [rows, needles, M, K]
    own = np.take_along_axis(scores, blocks[:, :, None, None], axis=2)
    at = np.arange(scores.shape[2])[None, None, :, None]
    current = (asks // sparse.block_size)[:, :, None, None]
    is_free = (at >= rule.init_blocks) & (at <= current - rule.num_local)
    ranks.append(1 + ((scores > own) & is_free).sum(axis=2))
  share, anywhere = np.stack(selected), np.stack(selected).any(axis=(0, 3))
  part = {True: right[anywhere], False: right[~anywhere]}
  mean = {key: round(float(x.mean()), 4) if x.size else None for key, x in part.items()}
  return {
    "selected": share.mean(axis=(1, 2)).round(3).tolist(),
    "median_rank": [np.median(x, axis=(0, 1)).tolist() for x in ranks],
    "selected_anywhere": round(float(anywhere.mean()), 4),
    "right_if_selected": mean[True],
    "right_if_not": mean[False],
  }
