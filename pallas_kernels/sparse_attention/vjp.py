"""The differentiable XLA form: gradients reach q, k and v over the selected tokens only.

Residuals: q, k, v, out, the lists [B, K, T, W] int32 (4 B an entry) and lse [B, K, T, G] float32.
The block lists are constants (infllm_v2.md section 11). Forward and backward are deterministic.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import xla, xla_backward
from pallas_kernels.sparse_topk import rule as rules


def attend_xla(
  q_BTNH, k_BSKH, v_BSKV, ids_BKTW, pos_BT, start_BT, *, block_size, num_local=0, config=None
):
  """As `api.attend_blocks`; returns (out [B, T, N, V], lse [B, T, N])."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G = N // K
  config = config or xla.default_config(T, G)
  static = xla.Static(block_size, num_local, H**-0.5, config)

  rows = config.chunk * config.lanes

  def pad(x, axis, multiple, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)

  q_BKTGH = jnp.moveaxis(jnp.reshape(q_BTNH, (B, T, K, G, H)), 2, 1)
  k_BKSH, v_BKSV = jnp.moveaxis(k_BSKH, 2, 1), jnp.moveaxis(v_BSKV, 2, 1)
  # Positions of padding go on counting: a tile of the band is one run of positions.
  pos_BT = jnp.broadcast_to(pos_BT, (B, T))
  tail = pos_BT[:, -1:] + jnp.arange(1, -T % rows + 1, dtype=jnp.int32)[None, :]
  out_BKTGV, lse_BKTG = _attend(
    static,
    pad(q_BKTGH, 2, rows),
    pad(k_BKSH, 2, block_size),
    pad(v_BKSV, 2, block_size),
    jnp.concatenate((pos_BT, tail), axis=1),
    pad(start_BT, 1, rows, rules.NOWHERE),
    pad(ids_BKTW, 2, rows, -1),
  )
  out_BTNV = jnp.reshape(jnp.moveaxis(out_BKTGV[:, :, :T], 1, 2), (B, T, N, -1))
  lse_BTN = jnp.reshape(jnp.moveaxis(lse_BKTG[:, :, :T], 1, 2), (B, T, N))
  return out_BTNV, jnp.where(lse_BTN >= xla.NOTHING, -jnp.inf, lse_BTN)


def _over_rows_and_heads(function, q, k, v, pos_BT, start_BT, ids, *others):
  """function(q, k, v, pos, start, ids, *others) of one batch row and key head, in order."""

  def one_row(row):
    q, k, v, pos_T, start_T, ids, *others = row
    return jax.lax.map(lambda x: function(*x[:3], pos_T, start_T, *x[3:]), (q, k, v, ids, *others))

  return jax.lax.map(one_row, (q, k, v, pos_BT, start_BT, ids, *others))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: xla.Static, q_BKTGH, k_BKSH, v_BKSV, pos_BT, start_BT, ids_BKTW):
  args = (q_BKTGH, k_BKSH, v_BKSV, pos_BT, start_BT, ids_BKTW)
  return _over_rows_and_heads(functools.partial(xla.head_forward, static), *args)


def _attend_fwd(static: xla.Static, *args):
  out_BKTGV, lse_BKTG = _attend(static, *args)
  return (out_BKTGV, lse_BKTG), (args, out_BKTGV, lse_BKTG)


def _attend_bwd(static: xla.Static, residuals, cotangents):
  args, out_BKTGV, lse_BKTG = residuals
  dout_BKTGV, dlse_BKTG = cotangents
  # d lse / d scores = P, so its cotangent joins delta = out . dout with the opposite sign.
  delta_BKTG = jnp.sum(dout_BKTGV.astype(jnp.float32) * out_BKTGV.astype(jnp.float32), axis=-1)
  delta_BKTG = delta_BKTG - jnp.where(lse_BKTG >= xla.NOTHING, 0.0, dlse_BKTG)
  backward = functools.partial(xla_backward.head_backward, static)
  dq, dk, dv = _over_rows_and_heads(backward, *args, lse_BKTG, delta_BKTG, dout_BKTGV)
  return dq, dk, dv, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
