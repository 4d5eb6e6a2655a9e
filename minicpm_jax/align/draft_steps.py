"""Rows of packed text through a draft that goes on from its own outputs: training-time test.

A row whose tokens would cross the end of its document does not count (`step_weights`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.models import draft as draft_lib

Batch = dict[str, Any]  # of [B, T] arrays, as data.iterator makes them


def shifted(x_BT: Any, by: Any, num_extra: int) -> Array:
  """Column t becomes column t + by; `by` may be traced, at most num_extra; zeros come in."""
  T = x_BT.shape[1]
  padded = jnp.pad(jnp.asarray(x_BT), [(0, 0), (0, num_extra)] + [(0, 0)] * (x_BT.ndim - 2))
  return jax.lax.dynamic_slice_in_dim(padded, by, T, axis=1)


def step_weights(batch: Batch, step: Any, num_steps: int) -> Float[Array, "B T"]:
  """Weight of row t at step i: the loss mask of position t + 1 + i, inside t's document."""
  by = step + 1
  weights_BT = shifted(batch["loss_mask"], by, num_steps)
  is_same_BT = shifted(batch["segment_ids"], by, num_steps) == batch["segment_ids"]
  return weights_BT * is_same_BT.astype(weights_BT.dtype)


def own_mask(batch: Batch, cfg: config.DraftConfig) -> Bool[Array, "B T T"]:
  """Rows of one document, causal, inside the window."""
  segments_BT, positions_BT = jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["positions"])
  is_same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
  mask_BTT = draft_lib.seen(positions_BT, positions_BT, cfg.window_size)
  return mask_BTT & is_same_BTT & (segments_BT != 0)[:, :, None]


def run_steps(
  cfg: config.DraftConfig,
  draft_params: types.Params,
  embed_shifted: Callable[[Any], Array],
  feature_BTF: Float[Array, "B T F"],
  batch: Batch,
  num_steps: int,
  use: Callable[[Any, Array, Any], Any],
  carry: Any = None,
) -> tuple[Any, Any]:
  """Training-time test: `num_steps` steps on the draft's own outputs as a scan.

  Step 0 is the plain causal pass. At step i row t reads the embedding of token t + 1 + i and its
  output of step i - 1, at rotary position t + i; it attends to the keys of step 0 up to row t and
  to its own row's keys of steps 1..i, which is what it sees when it drafts after row t.

  embed_shifted(by): embeddings of the tokens `by` columns ahead. use(i, hidden_BTD, carry) ->
  (carry, outputs); returns the last carry and the outputs stacked by step.
  """
  model, variables = draft_lib.DraftModel(cfg), {"params": draft_params}
  positions_BT, causal_BTT = jnp.asarray(batch["positions"]), own_mask(batch, cfg)
  hidden_BTD = model.apply(variables, feature_BTF, method="fuse")
  tables = draft_lib.position_tables(cfg, positions_BT)
  hidden_BTD, first = model.apply(variables, embed_shifted(1), hidden_BTD, tables, (), causal_BTT)
  carry, out = use(0, hidden_BTD, carry)
  if num_steps == 1:
    return carry, jax.tree.map(lambda x: x[None], out)
  J = num_steps - 1
  buffers = jax.tree.map(lambda x: jnp.zeros((J, *x.shape), x.dtype), first)
  before_BTT = own_mask(batch, dataclasses.replace(cfg, window_size=0))

  @jax.checkpoint
  def one(scanned, i):
    hidden_BTD, buffers, carry = scanned
    mask_BTT = before_BTT
    if cfg.window_size:
      mask_BTT &= draft_lib.seen(positions_BT + i, positions_BT, cfg.window_size)
    hidden_BTD, new = model.apply(
      variables,
      embed_shifted(i + 1),
      hidden_BTD,
      draft_lib.position_tables(cfg, positions_BT + i),
      ((first, mask_BTT),),
      None,
      draft_lib.Diagonals(buffers, jnp.arange(J) < i - 1),
    )
    buffers = jax.tree.map(
      lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, i - 1, 0), buffers, new
    )
    carry, out = use(i, hidden_BTD, carry)
    return (hidden_BTD, buffers, carry), out

  (_, _, carry), later = jax.lax.scan(one, (hidden_BTD, buffers, carry), jnp.arange(1, num_steps))
  joined = jax.tree.map(lambda x, y: jnp.concatenate((x[None], y)), out, later)
  return carry, joined
