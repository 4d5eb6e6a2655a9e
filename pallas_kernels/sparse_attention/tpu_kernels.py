"""Pallas TPU kernels over lists of key blocks (infllm_v2.md 19.3), used by attention and decoding.

A tile is a few queries times the G heads of one key head: R rows. Its block list is the union of
its queries' lists, with one membership bit a query; lists sit in scalar memory and the index maps
read them, so the next block is fetched while one is worked on. Steps past a list's end name its
last block again, which copies nothing. Keys stay in the model's layout, [slots, K*H]: a head
narrower than 128 lanes is read with its neighbours, and the query is zero in their lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

FLOOR = -1e30  # below every real score
NOTHING = 1e30  # lse that makes the probabilities of a row 0


def lanes(num_kv_heads: int, head_dim: int) -> int:
  """Width of the key columns that hold one head: 128, the head, or all heads if they are few."""
  if head_dim % 128 == 0:
    return head_dim
  if num_kv_heads * head_dim <= 128:
    return num_kv_heads * head_dim
  if 128 % head_dim == 0 and num_kv_heads * head_dim % 128 == 0:
    return 128
  raise NotImplementedError(f"mosaic_tpu: {num_kv_heads} key heads of {head_dim} do not fill lanes")


def _dot(a, b, contract):
  return jax.lax.dot_general(
    a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32
  )


def _keys(ref):
  """[s, C]: a block as it lies in [slots, K*H], or its heads side by side from [s, K, H]."""
  if len(ref.shape) == 2:
    return ref[...]
  return jnp.concatenate([ref[:, h, :] for h in range(ref.shape[1])], axis=1)


def _seen(logical, member_bits, bit_R1, pos_R1, start_R1, shape):
  """Bool [R, s]: the row's query lists this block, at or after its document's start, not future."""
  slot_Rs = logical * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  is_member_R1 = (member_bits & bit_R1) != 0
  return (slot_Rs <= pos_R1) & (slot_Rs >= start_R1) & is_member_R1


def _forward_body(
  physical,
  logical,
  bits,
  counts,
  column,  # scalar memory
  q_ref,
  k_ref,
  v_ref,
  bit_ref,
  pos_ref,
  start_ref,
  out_ref,
  lse_ref,
  top_ref,
  sum_ref,
  acc_ref,
  *,
  scale,
):
  del physical, column
  x, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, FLOOR)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(j < counts[x])
  def _():
    scores = scale * _dot(q_ref[...], _keys(k_ref), (1, 1))
    seen = _seen(
      logical[x, j], bits[x, j], bit_ref[...], pos_ref[...], start_ref[...], scores.shape
    )
    scores = jnp.where(seen, scores, 2 * FLOOR)
    top = jnp.maximum(top_ref[...], jnp.max(scores, axis=1, keepdims=True))
    shrink = jnp.exp(top_ref[...] - top)
    probs = jnp.exp(scores - top)
    sum_ref[...] = sum_ref[...] * shrink + jnp.sum(probs, axis=1, keepdims=True)
    acc_ref[...] = acc_ref[...] * shrink + _dot(probs.astype(v_ref.dtype), _keys(v_ref), (1, 0))
    top_ref[...] = top

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    total = sum_ref[...]
    safe = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (acc_ref[...] / safe).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total > 0, top_ref[...] + jnp.log(safe), -jnp.inf)


def _backward_q_body(
  physical,
  logical,
  bits,
  counts,
  column,
  q_ref,
  k_ref,
  v_ref,
  bit_ref,
  pos_ref,
  start_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dq_ref,
  acc_ref,
  *,
  scale,
):
  del physical, column
  x, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(j < counts[x])
  def _():
    scores = scale * _dot(q_ref[...], k_ref[...], (1, 1))
    seen = _seen(
      logical[x, j], bits[x, j], bit_ref[...], pos_ref[...], start_ref[...], scores.shape
    )
    probs = jnp.where(seen, jnp.exp(scores - lse_ref[...]), 0.0)
    dscores = probs * (_dot(dout_ref[...], v_ref[...], (1, 1)) - delta_ref[...])
    acc_ref[...] += _dot(dscores.astype(k_ref.dtype), k_ref[...], (1, 0))

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    dq_ref[...] = (scale * acc_ref[...]).astype(dq_ref.dtype)


def _backward_kv_body(
  physical,
  logical,
  bits,
  tile,
  column,
  q_ref,
  k_ref,
  v_ref,
  bit_ref,
  pos_ref,
  start_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dk_in_ref,
  dv_in_ref,
  dk_ref,
  dv_ref,
  *,
  scale,
):
  """One (block, tile) pair; pairs come sorted by block, so dk and dv of a block stay in place."""
  del tile
  p = pl.program_id(0)
  before = jnp.maximum(p - 1, 0)
  is_new = (physical[p] != physical[before]) | (column[p] != column[before])

  @pl.when((p == 0) | is_new)
  def _():
    dk_ref[...] = dk_in_ref[...]
    dv_ref[...] = dv_in_ref[...]

  @pl.when(bits[p] != 0)
  def _():
    scores = scale * _dot(q_ref[...], k_ref[...], (1, 1))
    seen = _seen(logical[p], bits[p], bit_ref[...], pos_ref[...], start_ref[...], scores.shape)
    probs = jnp.where(seen, jnp.exp(scores - lse_ref[...]), 0.0)
    dscores = probs * (_dot(dout_ref[...], v_ref[...], (1, 1)) - delta_ref[...])
    dv_ref[...] += _dot(probs.astype(dout_ref.dtype), dout_ref[...], (0, 0))
    dk_ref[...] += scale * _dot(dscores.astype(q_ref.dtype), q_ref[...], (0, 0))


def _per_tile(x, j, *_):
  del j
  return x, 0, 0


def _key_block(x, j, physical, logical, bits, counts, column):
  del logical, bits
  return physical[x, jnp.minimum(j, jnp.maximum(counts[x] - 1, 0))], column[x]


def _specs(block: int, width: int, rows: int):
  """Block specs of arrays [X, R, C], [X, R, 1], [slots, K*H] and of the member bits [R, 1]."""
  wide = pl.BlockSpec((None, rows, width), _per_tile)
  narrow = pl.BlockSpec((None, rows, 1), _per_tile)
  key = pl.BlockSpec((block, width), _key_block)
  bit = pl.BlockSpec((rows, 1), lambda x, j, *_: (0, 0))
  return wide, narrow, key, bit


def forward(lists, q_XRC, k_PC, v_PC, bit_R1, pos_XR1, start_XR1, *, block, scale, interpret):
  """(out [X, R, C], lse [X, R, 1]) of X tiles. lists: (physical, logical, bits [X, U], counts,
  column [X]) int32; k_PC: [slots, K*H], slots a multiple of the block, or [blocks, s, K, H], which
  reads all heads of a block (columns are then 0) and copies nothing beforehand."""
  X, R, C = q_XRC.shape
  wide, narrow, key, bit = _specs(block, C, R)
  if k_PC.ndim == 4:

    def whole_block(*args):
      return _key_block(*args)[0], 0, 0, 0

    key = pl.BlockSpec((None, *k_PC.shape[1:]), whole_block)
  return pl.pallas_call(
    functools.partial(_forward_body, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(X, lists[0].shape[1]),
      in_specs=[wide, key, key, bit, narrow, narrow],
      out_specs=[wide, narrow],
      scratch_shapes=[
        pltpu.VMEM((R, 1), jnp.float32),
        pltpu.VMEM((R, 1), jnp.float32),
        pltpu.VMEM((R, C), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((X, R, C), v_PC.dtype),
      jax.ShapeDtypeStruct((X, R, 1), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
    interpret=interpret,
    name="sparse_attention_forward",
  )(*lists, q_XRC, k_PC, v_PC, bit_R1, pos_XR1, start_XR1)


def backward_q(
  lists,
  q_XRC,
  k_PC,
  v_PC,
  bit_R1,
  pos_XR1,
  start_XR1,
  dout_XRC,
  lse_XR1,
  delta_XR1,
  *,
  block,
  scale,
  interpret,
):
  """dq [X, R, C]."""
  X, R, C = q_XRC.shape
  wide, narrow, key, bit = _specs(block, C, R)
  return pl.pallas_call(
    functools.partial(_backward_q_body, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(X, lists[0].shape[1]),
      in_specs=[wide, key, key, bit, narrow, narrow, wide, narrow, narrow],
      out_specs=wide,
      scratch_shapes=[pltpu.VMEM((R, C), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((X, R, C), q_XRC.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
    interpret=interpret,
    name="sparse_attention_backward_q",
  )(*lists, q_XRC, k_PC, v_PC, bit_R1, pos_XR1, start_XR1, dout_XRC, lse_XR1, delta_XR1)


def backward_kv(
  pairs,
  q_XRC,
  k_PC,
  v_PC,
  bit_R1,
  pos_XR1,
  start_XR1,
  dout_XRC,
  lse_XR1,
  delta_XR1,
  dk_PC,
  dv_PC,
  *,
  block,
  scale,
  interpret,
):
  """dk_PC, dv_PC (float32) with the pairs' share added. pairs: (physical, logical, bits, tile,
  column [P]) int32 sorted by (column, physical); blocks without a pair keep what they have."""
  _, R, C = q_XRC.shape

  def of_tile(p, physical, logical, bits, tile, column):
    return tile[p], 0, 0

  def of_block(p, physical, logical, bits, tile, column):
    return physical[p], column[p]

  wide, narrow = pl.BlockSpec((None, R, C), of_tile), pl.BlockSpec((None, R, 1), of_tile)
  key, bit = pl.BlockSpec((block, C), of_block), pl.BlockSpec((R, 1), lambda p, *_: (0, 0))
  share = jax.ShapeDtypeStruct(dk_PC.shape, jnp.float32)
  return pl.pallas_call(
    functools.partial(_backward_kv_body, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(pairs[0].shape[0],),
      in_specs=[wide, key, key, bit, narrow, narrow, wide, narrow, narrow, key, key],
      out_specs=[key, key],
    ),
    out_shape=[share, share],
    input_output_aliases={14: 0, 15: 1},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    interpret=interpret,
    name="sparse_attention_backward_kv",
  )(
    *pairs,
    q_XRC,
    k_PC,
    v_PC,
    bit_R1,
    pos_XR1,
    start_XR1,
    dout_XRC,
    lse_XR1,
    delta_XR1,
    dk_PC,
    dv_PC,
  )
