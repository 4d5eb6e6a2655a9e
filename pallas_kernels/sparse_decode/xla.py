"""Sparse decoding in XLA. One query of a row gathers its blocks, as `sparse_attention`'s "gather".

Several queries of a row (a draft tree, a short chunk) list about the same blocks: on a CPU each
block that any of them lists is read once and multiplied with all of them, in a loop over so many.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import gather

TOGETHER = 16  # blocks of one product
FLOOR = -1e30  # maximum of nothing


def decode_xla(q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM, *, block_size):
  """As `api.decode_blocks`."""
  args = (q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM)
  if q_BTNH.shape[1] > 1 and jax.default_backend() == "cpu":  # a GPU's loop would ask the host
    return attend_union(*args, block_size=block_size)
  return gather.attend_gather(*args, block_size=block_size)


def attend_union(q_BTNH, k, v, ids_BKTW, pos_BT, start_BT, base_B, page_table_BM, *, block_size):
  """As `api.decode_blocks`: one row's queries of one key head against the union of their lists."""
  B, T, N, H = q_BTNH.shape
  K, S, V = k.shape[2], k.shape[1], v.shape[3]
  G, s = N // K, block_size
  M = -(-S // s) if page_table_BM is None else page_table_BM.shape[1]
  U = min(TOGETHER, M)
  query_T1 = jnp.arange(T, dtype=jnp.int32)[:, None]
  lane_1s = jnp.arange(s, dtype=jnp.int32)[None, :]

  def one(x):
    q_TGH, ids_TW, pos_T, start_T, table, head = x
    empty_TM = jnp.zeros((T, M), bool)
    is_listed_TM = empty_TM.at[query_T1, jnp.where(ids_TW >= 0, ids_TW, M)].set(True, mode="drop")
    is_any_M = jnp.any(is_listed_TM, axis=0)
    order_M = jnp.argsort(~is_any_M).astype(jnp.int32)  # listed ones first
    order_M = jnp.pad(order_M, (0, -M % U), constant_values=-1)
    q_RH = jnp.reshape(q_TGH, (T * G, H))

    def step(i, carry):
      top_R1, sum_R1, out_RV = carry
      ids_U = jax.lax.dynamic_slice_in_dim(order_M, i * U, U)
      at_Us = jnp.maximum(ids_U, 0)[:, None] * s + lane_1s
      if page_table_BM is None:
        first, base = table
        rows_Us = jnp.minimum(at_Us + base, S - 1) + first
      else:
        rows_Us = jnp.maximum(table[jnp.maximum(ids_U, 0)], 0)[:, None] * s + lane_1s
      rows_x = jnp.reshape(rows_Us, (-1,)) * K + head  # as they lie
      k_xH, v_xV = (jnp.reshape(x, (-1, x.shape[-1]))[rows_x] for x in (k, v))
      scores_Rx = H**-0.5 * jnp.einsum("RH,xH->Rx", q_RH, k_xH, preferred_element_type=jnp.float32)
      is_own_TU1 = (is_listed_TM[:, jnp.maximum(ids_U, 0)] & (ids_U >= 0)[None, :])[:, :, None]
      is_past_TUs = (at_Us[None] <= pos_T[:, None, None]) & (at_Us[None] >= start_T[:, None, None])
      seen_T1x = jnp.reshape(is_own_TU1 & is_past_TUs, (T, 1, U * s))
      seen_Rx = jnp.reshape(jnp.broadcast_to(seen_T1x, (T, G, U * s)), (T * G, -1))
      scores_Rx = jnp.where(seen_Rx, scores_Rx, 2 * FLOOR)
      new_R1 = jnp.maximum(top_R1, jnp.max(scores_Rx, axis=1, keepdims=True))
      probs_Rx = jnp.exp(scores_Rx - new_R1)
      less_R1 = jnp.exp(top_R1 - new_R1)
      new_RV = jnp.einsum(
        "Rx,xV->RV", probs_Rx.astype(v.dtype), v_xV, preferred_element_type=jnp.float32
      )
      sum_R1 = sum_R1 * less_R1 + jnp.sum(probs_Rx, axis=1, keepdims=True)
      return new_R1, sum_R1, out_RV * less_R1 + new_RV

    none_R1 = jnp.zeros((T * G, 1), jnp.float32)
    init = none_R1 + FLOOR, none_R1, jnp.zeros((T * G, V), jnp.float32)
    steps = -(-jnp.sum(is_any_M, dtype=jnp.int32) // U)
    top_R1, sum_R1, out_RV = jax.lax.fori_loop(0, steps, step, init)
    is_seen_R1 = sum_R1 > 0
    sum_R1 = jnp.where(is_seen_R1, sum_R1, 1.0)
    lse_R1 = jnp.where(is_seen_R1, top_R1 + jnp.log(sum_R1), -jnp.inf)
    return jnp.reshape(out_RV / sum_R1, (T, G, V)), jnp.reshape(lse_R1, (T, G))

  def by_head(x_B):
    return jnp.repeat(x_B, K, axis=0)

  if page_table_BM is None:
    first_B = S * jnp.arange(B, dtype=jnp.int32)
    table = (by_head(first_B), by_head(jnp.zeros_like(first_B) if base_B is None else base_B))
  else:
    table = by_head(page_table_BM)
  q_BKTGH = jnp.moveaxis(jnp.reshape(q_BTNH, (B, T, K, G, H)), 2, 1)
  heads = (jnp.reshape(q_BKTGH, (B * K, T, G, H)), jnp.reshape(ids_BKTW, (B * K, T, -1)))
  heads += (by_head(pos_BT), by_head(start_BT), table)
  out, lse = jax.lax.map(one, (*heads, jnp.arange(B * K, dtype=jnp.int32) % K))
  out_BTKGV = jnp.moveaxis(jnp.reshape(out, (B, K, T, G, V)), 1, 2).astype(v.dtype)
  lse_BTKG = jnp.moveaxis(jnp.reshape(lse, (B, K, T, G)), 1, 2)
  return jnp.reshape(out_BTKGV, (B, T, N, V)), jnp.reshape(lse_BTKG, (B, T, N))
