"""Backward pass of `xla`: the probabilities are computed again from lse (infllm_v2.md section 11).

dk and dv are added up tile after tile in float32, dq pair by pair in list order; no atomics.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import xla, xla_layout


def _probs_and_grads(static: xla.Static, scores_Rs, lse_R1, delta_R1, dout_RV, v_sV):
  """(P, dS) in float32: P = exp(S - lse), dS = scale P (dout v^T - delta) (section 11)."""
  probs_Rs = jnp.exp(scores_Rs - lse_R1)
  dprobs_Rs = xla.dot(dout_RV, v_sV, (1, 1))
  return probs_Rs, static.scale * probs_Rs * (dprobs_Rs - delta_R1)


def _add_at(total_SH, new_kH, first):
  old_kH = jax.lax.dynamic_slice_in_dim(total_SH, first, new_kH.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(total_SH, old_kH + new_kH, first, axis=0)


def _band_backward(
  static: xla.Static, chunk: xla.Chunk, k_SH, v_SV, dout_CGV, lse_CG, delta_CG, dk, dv
):
  """(dq [C, G, H], dk, dv) with the band's share added to dk [S, H] and dv [S, V]."""
  C, G, H = chunk.q_CGH.shape
  if static.num_local == 0:
    return jnp.zeros((C, G, H), jnp.float32), dk, dv
  size = xla.band_keys(static, k_SH.shape[0])

  def one(carry, rows):
    q_bGH, pos_b, low_b, dout_bGV, lse_bG, delta_bG = rows
    first, _, tiles = xla.band_range(pos_b, low_b, size)
    q_RH, dout_RV = (jnp.reshape(x, (-1, x.shape[-1])) for x in (q_bGH, dout_bGV))
    lse_R1, delta_R1 = (jnp.reshape(x, (-1, 1)) for x in (lse_bG, delta_bG))

    def step(i, carry):
      dq_RH, dk, dv = carry
      at = first + i * size
      scores_Rk, at = xla.band_scores(static, q_RH, k_SH, at, size, (low_b, pos_b))
      k_kH, v_kV = (jax.lax.dynamic_slice_in_dim(x, at, size) for x in (k_SH, v_SV))
      probs_Rk, dscores_Rk = _probs_and_grads(static, scores_Rk, lse_R1, delta_R1, dout_RV, v_kV)
      dscores_Rk = dscores_Rk.astype(q_RH.dtype)
      dv = _add_at(dv, xla.dot(probs_Rk.astype(dout_RV.dtype), dout_RV, (0, 0)), at)
      dk = _add_at(dk, xla.dot(dscores_Rk, q_RH, (0, 0)), at)
      return dq_RH + xla.dot(dscores_Rk, k_kH, (1, 0)), dk, dv

    dq_RH, dk, dv = jax.lax.fori_loop(0, tiles, step, (jnp.zeros(q_RH.shape, jnp.float32), *carry))
    return (dk, dv), dq_RH

  rows = (chunk.q_CGH, chunk.pos_C, chunk.low_C, dout_CGV, lse_CG, delta_CG)
  (dk, dv), dq = jax.lax.scan(one, (dk, dv), xla.in_tiles(static, *rows))
  return jnp.reshape(dq, (C, G, H)), dk, dv


def _pairs_backward(
  static: xla.Static, chunk: xla.Chunk, k_SH, v_SV, dout_CGV, lse_CG, delta_CG, dq, dk, dv
):
  """(dq [C, G, H], dk, dv) with the pairs' share added."""
  k_MsH, v_MsV = xla.blocks(static, k_SH), xla.blocks(static, v_SV)
  at = xla_layout.layout(chunk.ids_CW, chunk.is_pair_CW, k_MsH.shape[0], static.config.tile)
  P, G = static.config.tile, lse_CG.shape[1]

  def one_tile(i, carry):
    dq_CGH, dk, dv, q_PGH, dout_PGV = carry
    token_P, block, filled = at.token_IP[i], at.block_I[i], at.filled_I[i]
    q_PGH = xla.put_rows(q_PGH, chunk.q_CGH, token_P, filled)
    dout_PGV = xla.put_rows(dout_PGV, dout_CGV, token_P, filled)
    q_RH, dout_RV = (jnp.reshape(x, (-1, x.shape[2])) for x in (q_PGH, dout_PGV))
    # Places that are not filled hold old rows: their probabilities are 0.
    is_filled_P1 = (jnp.arange(P) < filled)[:, None]
    lse_PG = jnp.where(is_filled_P1, lse_CG[token_P], xla.NOTHING)
    lse_R1, delta_R1 = (jnp.reshape(x, (-1, 1)) for x in (lse_PG, delta_CG[token_P]))
    k_sH = k_MsH[block]
    scores_Rs = xla.pair_scores(static, chunk, at, i, q_RH, k_sH)
    probs_Rs, dscores_Rs = _probs_and_grads(
      static, scores_Rs, lse_R1, delta_R1, dout_RV, v_MsV[block]
    )
    dscores_Rs = dscores_Rs.astype(q_RH.dtype)
    dk = _add_at(dk, xla.dot(dscores_Rs, q_RH, (0, 0)), block * static.block_size)
    dv_sV = xla.dot(probs_Rs.astype(dout_RV.dtype), dout_RV, (0, 0))
    dv = _add_at(dv, dv_sV, block * static.block_size)
    more_PGH = jnp.reshape(xla.dot(dscores_Rs, k_sH, (1, 0)), (P, G, -1))

    def add(p, dq_CGH):
      new_GH = dq_CGH[token_P[p]] + more_PGH[p]
      return jax.lax.dynamic_update_index_in_dim(dq_CGH, new_GH, token_P[p], axis=0)

    return jax.lax.fori_loop(0, filled, add, dq_CGH), dk, dv, q_PGH, dout_PGV

  rows = (jnp.zeros((P, *x.shape[1:]), x.dtype) for x in (chunk.q_CGH, dout_CGV))
  return jax.lax.fori_loop(0, at.num_tiles, one_tile, (dq, dk, dv, *rows))[:3]


def head_backward(static: xla.Static, q_TGH, k_SH, v_SV, pos_T, start_T, ids_TW, lse, delta, dout):
  """(dq, dk, dv), dk and dv summed over the group and all queries in float32."""
  chunks = xla.in_chunks(static, q_TGH, pos_T, start_T, ids_TW, dout, lse, delta)

  def one(carry, x):
    chunk, *rest = x
    dq, dk, dv = _band_backward(static, chunk, k_SH, v_SV, *rest, *carry)
    dq, dk, dv = _pairs_backward(static, chunk, k_SH, v_SV, *rest, dq, dk, dv)
    return (dk, dv), dq

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_SH, v_SV))
  (dk, dv), dq = jax.lax.scan(one, zeros, chunks)
  dq = xla.in_order(dq)
  return dq.astype(q_TGH.dtype), dk.astype(k_SH.dtype), dv.astype(v_SV.dtype)
