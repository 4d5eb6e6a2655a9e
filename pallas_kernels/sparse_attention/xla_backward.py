"""Backward pass of `xla`: the probabilities are computed again from lse (infllm_v2.md section 11).

dk and dv are added up tile after tile in float32, dq pair by pair in list order; no atomics.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import xla


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
  S = k_SH.shape[0]
  if static.num_local == 0:
    return jnp.zeros((C, G, H), jnp.float32), dk, dv
  tiles, size = xla.band_keys(static, S)
  k_SH, v_SV, dk, dv = (xla.pad_keys(static, x) for x in (k_SH, v_SV, dk, dv))

  def one(carry, rows):
    q_bGH, pos_b, start_b, dout_bGV, lse_bG, delta_bG = rows
    first, low_b = xla.band_range(static, pos_b, start_b, S)
    q_RH, dout_RV = (jnp.reshape(x, (-1, x.shape[-1])) for x in (q_bGH, dout_bGV))
    lse_R1, delta_R1 = (jnp.reshape(x, (-1, 1)) for x in (lse_bG, delta_bG))

    def step(i, carry):
      dq_RH, dk, dv = carry
      at = first + i * size
      k_kH, v_kV = (jax.lax.dynamic_slice_in_dim(x, at, size) for x in (k_SH, v_SV))
      scores_Rk = xla.band_scores(static, q_RH, k_kH, at, low_b, pos_b)
      probs_Rk, dscores_Rk = _probs_and_grads(static, scores_Rk, lse_R1, delta_R1, dout_RV, v_kV)
      dscores_Rk = dscores_Rk.astype(q_RH.dtype)
      dv = _add_at(dv, xla.dot(probs_Rk.astype(dout_RV.dtype), dout_RV, (0, 0)), at)
      dk = _add_at(dk, xla.dot(dscores_Rk, q_RH, (0, 0)), at)
      return dq_RH + xla.dot(dscores_Rk, k_kH, (1, 0)), dk, dv

    dq_RH, dk, dv = jax.lax.fori_loop(0, tiles, step, (jnp.zeros(q_RH.shape, jnp.float32), *carry))
    return (dk, dv), dq_RH

  rows = (chunk.q_CGH, chunk.pos_C, chunk.start_C, dout_CGV, lse_CG, delta_CG)
  (dk, dv), dq = jax.lax.scan(one, (dk, dv), xla.in_tiles(static, *rows))
  return jnp.reshape(dq, (C, G, H)), dk[:S], dv[:S]


def _pairs_backward(
  static: xla.Static, chunk: xla.Chunk, k_SH, v_SV, dout_CGV, lse_CG, delta_CG, dk, dv, buffers
):
  """(dq [C, G, H], dk, dv, buffers) with the pairs' share added to dk and dv."""
  C, G, H = chunk.q_CGH.shape
  k_MsH, v_MsV = xla.blocks(static, k_SH), xla.blocks(static, v_SV)
  at = xla.layout(chunk.ids_CW, chunk.is_pair_CW, k_MsH.shape[0], static.config)

  def body(i, carry):
    buffers, dk, dv = carry
    token_P, block = at.token_IP[i], at.block_I[i]
    q_RH, dout_RV = xla.rows_of(chunk.q_CGH, token_P), xla.rows_of(dout_CGV, token_P)
    lse_R1, delta_R1 = (jnp.reshape(x[token_P], (-1, 1)) for x in (lse_CG, delta_CG))
    k_sH = k_MsH[block]
    scores_Rs = xla.pair_scores(static, chunk, at, i, q_RH, k_sH, is_masked=True)
    probs_Rs, dscores_Rs = _probs_and_grads(
      static, scores_Rs, lse_R1, delta_R1, dout_RV, v_MsV[block]
    )
    dscores_Rs = dscores_Rs.astype(q_RH.dtype)
    dk = _add_at(dk, xla.dot(dscores_Rs, q_RH, (0, 0)), block * static.block_size)
    dv_sV = xla.dot(probs_Rs.astype(dout_RV.dtype), dout_RV, (0, 0))
    dv = _add_at(dv, dv_sV, block * static.block_size)
    return xla.store(buffers, (xla.dot(dscores_Rs, k_sH, (1, 0)),), i, static.config.tile), dk, dv

  buffers, dk, dv = jax.lax.fori_loop(0, at.num_tiles, body, (buffers, dk, dv))
  weight_CWG = jnp.broadcast_to(
    chunk.is_pair_CW[:, :, None].astype(jnp.float32), (*chunk.is_pair_CW.shape, G)
  )
  dq_CGH = xla.sum_pairs(buffers[0], at, weight_CWG, jnp.zeros((C, G, H), jnp.float32))
  return dq_CGH, dk, dv, buffers


def head_backward(static: xla.Static, q_TGH, k_SH, v_SV, pos_T, start_T, ids_TW, lse, delta, dout):
  """(dq, dk, dv), dk and dv summed over the group and all queries in float32."""
  chunks = xla.in_chunks(static, q_TGH, pos_T, start_T, ids_TW, dout, lse, delta)
  num_pairs, num_blocks = chunks[0].ids_CW[0, 0].size, k_SH.shape[0] // static.block_size

  def one(carry, x):
    (dk, dv, buffers), (chunk, *rest) = carry, x
    dq, dk, dv = _band_backward(static, chunk, k_SH, v_SV, *rest, dk, dv)
    if chunk.ids_CW.shape[1]:
      more, dk, dv, buffers = _pairs_backward(static, chunk, k_SH, v_SV, *rest, dk, dv, buffers)
      dq = dq + more
    return (dk, dv, buffers), dq

  def step(carries, chunks):
    done = [one(c, x) for c, x in zip(carries, xla.by_lane(static, chunks), strict=True)]
    return [carry for carry, _ in done], [dq for _, dq in done]

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k_SH, v_SV)]
  buffers = xla.pair_buffers(static, num_pairs, num_blocks, q_TGH.shape[1], k_SH.shape[1])
  carries = [(*zeros, buffers) for _ in range(static.config.lanes)]
  carries, dqs = jax.lax.scan(step, carries, chunks)
  dk, dv = (sum(parts) for parts in list(zip(*carries, strict=True))[:2])
  dq = xla.in_order(dqs)
  return dq.astype(q_TGH.dtype), dk.astype(k_SH.dtype), dv.astype(v_SV.dtype)
