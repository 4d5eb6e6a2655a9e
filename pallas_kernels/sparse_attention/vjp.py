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
  T = q_BTNH.shape[1]
  static = _static(q_BTNH, k_BSKH, block_size, num_local, config)
  args = _rows(static, q_BTNH, k_BSKH, v_BSKV, ids_BKTW, pos_BT, start_BT)
  out_BKTGV, lse_BKTG = _attend(static, *args)
  lse_BTN = _from_rows(lse_BKTG, T)
  return _from_rows(out_BKTGV, T), jnp.where(lse_BTN >= xla.NOTHING, -jnp.inf, lse_BTN)


def backward_xla(residuals, cotangents, *, block_size, num_local=0, config=None):
  """(dq, dk, dv) of another backend's forward. residuals: (q, k, v, ids, pos, start, out, lse)."""
  q_BTNH, k_BSKH, v_BSKV, *lists, out_BTNV, lse_BTN = residuals
  static = _static(q_BTNH, k_BSKH, block_size, num_local, config)
  lse_BTN = jnp.where(lse_BTN > -jnp.inf, lse_BTN, xla.NOTHING)
  args = _rows(static, q_BTNH, k_BSKH, v_BSKV, *lists)
  rows = functools.partial(_to_rows, static, heads=k_BSKH.shape[2])
  # Rows of padding have no dout, so that any lse of theirs gives 0.
  residuals = (args, rows(out_BTNV), rows(lse_BTN))
  dq_BKTGH, dk_BKSH, dv_BKSV = _attend_bwd(static, residuals, [rows(x) for x in cotangents])[:3]
  dk_BSKH, dv_BSKV = (jnp.moveaxis(x, 1, 2)[:, : k_BSKH.shape[1]] for x in (dk_BKSH, dv_BKSV))
  return _from_rows(dq_BKTGH, q_BTNH.shape[1]), dk_BSKH, dv_BSKV


def _static(q_BTNH, k_BSKH, block_size, num_local, config) -> xla.Static:
  config = config or xla.default_config(q_BTNH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2])
  return xla.Static(block_size, num_local, q_BTNH.shape[-1] ** -0.5, config)


def _pad(x, axis, multiple, value=0):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths, constant_values=value)


def _to_rows(static: xla.Static, x_BTN, heads: int):
  """[B, K, T', G, ...] of [B, T, N, ...], T' whole chunks."""
  B, T, N = x_BTN.shape[:3]
  x = jnp.moveaxis(jnp.reshape(x_BTN, (B, T, heads, N // heads, *x_BTN.shape[3:])), 2, 1)
  return _pad(x, 2, static.config.chunk)


def _from_rows(x_BKTG, num_queries: int):
  """[B, T, N, ...] of [B, K, T', G, ...]."""
  x = jnp.moveaxis(x_BKTG[:, :, :num_queries], 1, 2)
  return jnp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:]))


def _rows(static: xla.Static, q_BTNH, k_BSKH, v_BSKV, ids_BKTW, pos_BT, start_BT):
  """Arguments of `_attend`."""
  B, T = q_BTNH.shape[:2]
  rows = static.config.chunk
  # Positions of padding go on counting: a tile of the band is one run of positions.
  pos_BT = jnp.broadcast_to(pos_BT, (B, T))
  tail = pos_BT[:, -1:] + jnp.arange(1, -T % rows + 1, dtype=jnp.int32)[None, :]
  return (
    _to_rows(static, q_BTNH, k_BSKH.shape[2]),
    _pad(jnp.moveaxis(k_BSKH, 2, 1), 2, static.block_size),
    _pad(jnp.moveaxis(v_BSKV, 2, 1), 2, static.block_size),
    jnp.concatenate((pos_BT, tail), axis=1),
    _pad(start_BT, 1, rows, rules.NOWHERE),
    _pad(ids_BKTW, 2, rows, -1),
  )


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


def delta(out, dout, dlse, sees_something):
  """out . dout of every row, less the cotangent of its lse: d lse / d scores = P joins there."""
  products = out.astype(jnp.float32) * dout.astype(jnp.float32)
  return jnp.sum(products, axis=-1) - jnp.where(sees_something, dlse, 0.0)


def _attend_bwd(static: xla.Static, residuals, cotangents):
  args, out_BKTGV, lse_BKTG = residuals
  dout_BKTGV, dlse_BKTG = cotangents
  delta_BKTG = delta(out_BKTGV, dout_BKTGV, dlse_BKTG, lse_BKTG < xla.NOTHING)
  backward = functools.partial(xla_backward.head_backward, static)
  dq, dk, dv = _over_rows_and_heads(backward, *args, lse_BKTG, delta_BKTG, dout_BKTGV)
  return dq, dk, dv, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
