"""Block selection on TPUs (Pallas): normaliser, then scores and choice fused.

A tile is Q queries times the G heads of one key head, rows (head, query). Fine keys come phase by
phase (window i of every block), so that pooling is a maximum of whole arrays and only the windows
that reach into the next block need a shift by one lane. A tile's block scores never leave the
chip: after its last keys the kernel finds the cut by bisection on the scores' bits (they are >= 0),
breaks ties to the lower block by a running count, and writes the ids.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import gpu, spec
from pallas_kernels.common import interpret as interpret_lib
from pallas_kernels.sparse_attention import mosaic_tpu as tiles
from pallas_kernels.sparse_attention import tpu_kernels
from pallas_kernels.sparse_topk import rule as rules

FLOOR = -1e30  # below every real score
BLIND = 1e30  # normaliser of a row that sees no window: all its scores are 0
BLOCKS = 128  # blocks of a tile of scores: the lanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
  """`queries` of a tile, `norm_keys` compressed keys of a normaliser step, `chunk` tiles a call."""

  queries: int = 8
  norm_keys: int = 512
  chunk: int = 1024
  interpret: bool | None = None  # None = on a CPU

  def __post_init__(self):
    if self.queries % 8:
      raise ValueError(f"TpuConfig.queries: found {self.queries}, expected a multiple of 8")


@dataclasses.dataclass(frozen=True)
class _Sizes:
  rule: rules.Rule
  group: int
  queries: int
  num_fine: int
  num_norm: int
  norm_keys: int
  scale: float

  @property
  def norm_level(self) -> int:
    return 1 if self.rule.lse == "exact" else rules.COARSE


def _dot(q_RC, keys_nC):
  dims = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(q_RC, keys_nC, dims, preferred_element_type=jnp.float32)


def _visible(window, num, pos_X1, start_X1, rule: rules.Rule, level: int):
  """Bool: window j of the level exists, is complete in the query's past, and of its document."""
  first = level * rule.kernel_stride * window
  is_past = first + (level * rule.kernel_size - 1) <= pos_X1
  return is_past & (first >= start_X1) & (window < num)


def _norm_body(
  batch,
  column,
  last,
  q_ref,
  keys_ref,
  pos_ref,
  start_ref,
  lse_ref,
  top_ref,
  sum_ref,
  *,
  sizes: _Sizes,
):
  del batch, column
  x, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, FLOOR)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  first = j * sizes.norm_keys
  stride = sizes.norm_level * sizes.rule.kernel_stride

  @pl.when(first * stride <= last[x])
  def _():
    logits = sizes.scale * _dot(q_ref[...], keys_ref[...])
    window = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    seen = _visible(
      window, sizes.num_norm, pos_ref[...], start_ref[...], sizes.rule, sizes.norm_level
    )
    logits = jnp.where(seen, logits, 2 * FLOOR)
    top = jnp.maximum(top_ref[...], jnp.max(logits, axis=1, keepdims=True))
    sum_ref[...] = sum_ref[...] * jnp.exp(top_ref[...] - top) + jnp.sum(
      jnp.exp(logits - top), axis=1, keepdims=True
    )
    top_ref[...] = top

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    total = sum_ref[...]
    is_seeing = total > 0
    lse_ref[...] = jnp.where(
      is_seeing, top_ref[...] + jnp.log(jnp.where(is_seeing, total, 1.0)), BLIND
    )


def _choose_body(
  batch,
  column,
  last,
  q_ref,
  fine_ref,
  pos_ref,
  start_ref,
  lse_ref,
  ids_ref,
  counts_ref,
  scores_ref,
  carry_ref,
  *,
  sizes: _Sizes,
):
  del batch, column
  x, j = pl.program_id(0), pl.program_id(1)
  rule, Q = sizes.rule, sizes.queries
  per_block = rule.block_size // rule.kernel_stride
  left = rule.kernel_size // rule.kernel_stride - 1

  @pl.when(j == 0)
  def _():
    carry_ref[...] = jnp.zeros_like(carry_ref)

  columns = pl.ds(pl.multiple_of(j * BLOCKS, BLOCKS), BLOCKS)
  is_reached = j * BLOCKS * rule.block_size <= last[x]

  @pl.when(is_reached)
  def _():
    lane = jax.lax.broadcasted_iota(jnp.int32, (Q, BLOCKS), 1)
    best = jnp.zeros((Q, BLOCKS), jnp.float32)
    right = jnp.zeros((Q, BLOCKS), jnp.float32)  # windows that reach into the next block
    for i in range(per_block):
      logits = sizes.scale * _dot(q_ref[...], fine_ref[i])
      probs = jnp.exp(jnp.minimum(logits - lse_ref[...], 80.0))
      score = jnp.sum(jnp.reshape(probs, (sizes.group, Q, BLOCKS)), axis=0)
      window = (j * BLOCKS + lane) * per_block + i
      seen = _visible(window, sizes.num_fine, pos_ref[...], start_ref[...], rule, 1)
      score = jnp.where(seen, score, 0.0)
      best = jnp.maximum(best, score)
      if i >= per_block - left:
        right = jnp.maximum(right, score)
    from_left = jnp.where(lane == 0, carry_ref[...], pltpu.roll(right, 1, axis=1))
    carry_ref[...] = right[:, BLOCKS - 1 :]
    scores_ref[:, columns] = jnp.maximum(best, from_left)

  @pl.when(jnp.logical_not(is_reached))
  def _():
    scores_ref[:, columns] = jnp.zeros((Q, BLOCKS), jnp.float32)

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    ids, counts = _choose(scores_ref[...], pos_ref[...], start_ref[...], rule, ids_ref.shape[1])
    ids_ref[...] = ids
    counts_ref[...] = counts


def _running_count(is_QM):
  """Inclusive count along the lanes by log2(M) shifts (there is no cumsum on a TPU)."""
  count = is_QM.astype(jnp.int32)
  lane = jax.lax.broadcasted_iota(jnp.int32, count.shape, 1)
  shift = 1
  while shift < count.shape[1]:
    count = count + jnp.where(lane >= shift, pltpu.roll(count, shift, axis=1), 0)
    shift *= 2
  return count


def _total(is_QM):
  return jnp.sum(is_QM.astype(jnp.int32), axis=1, keepdims=True)


def _choose(scores_QM, pos_Q1, start_Q1, rule: rules.Rule, width: int):
  """(ids [Q, width], counts [Q, 1]) by section 7."""
  block = jax.lax.broadcasted_iota(jnp.int32, scores_QM.shape, 1)
  first_Q1 = start_Q1 // rule.block_size
  cur_Q1 = jnp.where(pos_Q1 >= start_Q1, pos_Q1 // rule.block_size, -1)
  is_candidate = (block >= first_Q1) & (block <= cur_Q1)
  is_init = is_candidate & (block < first_Q1 + rule.init_blocks)
  is_forced = is_init | (is_candidate & (block > cur_Q1 - rule.num_local))
  is_free = is_candidate & jnp.logical_not(is_forced)
  if rule.selection == "joint":
    need = rule.num_selected - _total(is_forced)
  else:
    need = rule.topk - _total(is_init)
  need = jnp.maximum(need, 0)
  bits = jnp.where(is_free, pltpu.bitcast(scores_QM, jnp.int32), -1)

  def narrow(step, cut):
    probe = cut | jnp.left_shift(1, 30 - step)
    return jnp.where(_total(bits >= probe) >= need, probe, cut)

  cut = jax.lax.fori_loop(0, 31, narrow, jnp.zeros_like(need))
  cut = jnp.where(_total(is_free) > need, cut, 0)
  is_above, is_tie = is_free & (bits > cut), is_free & (bits == cut)
  room = need - _total(is_above)
  is_taken = is_forced | is_above | (is_tie & (_running_count(is_tie) <= room))
  rank = jnp.where(is_taken, _running_count(is_taken) - 1, -1)
  place = jax.lax.broadcasted_iota(jnp.int32, (scores_QM.shape[0], width), 1)

  def put(w, ids):
    is_here = rank == w
    id_Q1 = jnp.sum(jnp.where(is_here, block + 1, 0), axis=1, keepdims=True) - 1
    return jnp.where(place == w, id_Q1, ids)

  ids = jax.lax.fori_loop(0, rule.num_selected, put, jnp.full(place.shape, -1, jnp.int32))
  return ids, _total(is_taken)


def select_tpu(
  q_BTNH,
  fine_BFKH,
  coarse_BCKH,
  q_offset,
  start_BT,
  rule: rules.Rule,
  num_slots: int,
  config: TpuConfig | None = None,
  interpret: bool | None = None,
):
  """As `xla.select_xla`, or NotImplementedError with the reason."""
  config = spec.requested(config or TpuConfig(), interpret)
  B, T, N, H = q_BTNH.shape
  F, K = fine_BFKH.shape[1:3]
  G, Q, C = N // K, config.queries, tpu_kernels.lanes(K, H)
  gpu.check_arrays("sparse_topk", q=q_BTNH, fine=fine_BFKH)
  is_interpreted = interpret_lib.is_interpreted("sparse_topk", config.interpret, "tpu")
  per_block = rule.block_size // rule.kernel_stride
  if rule.kernel_size // rule.kernel_stride - 1 > per_block:
    raise NotImplementedError(f"sparse_topk: a window of {rule.kernel_size} spans three blocks")
  norm_BcKH = fine_BFKH if rule.lse == "exact" else coarse_BCKH
  num_norm, W = norm_BcKH.shape[1], rule.num_selected
  norm_keys = min(config.norm_keys, -(-max(num_norm, 1) // 16) * 16)
  sizes = _Sizes(rule, G, Q, F, num_norm, norm_keys, H**-0.5)
  M = -(-rule.num_blocks(num_slots) // BLOCKS) * BLOCKS
  WP = -(-W // 128) * 128

  def flat(x_BcKH, length):
    x = jnp.reshape(x_BcKH[:, :length], (B, -1, K * H))
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))

  fine_BMpC = jnp.reshape(flat(fine_BFKH, M * per_block), (B, M, per_block, K * H))
  fine_BpMC = jnp.moveaxis(fine_BMpC, 2, 1)
  norm_BcC = flat(norm_BcKH, max(1, -(-num_norm // norm_keys)) * norm_keys)

  padded = -(-T // Q) * Q
  num_tiles = padded // Q
  offset_B = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
  pos_BT = offset_B[:, None] + jnp.arange(padded, dtype=jnp.int32)[None, :]
  start_BT = jnp.pad(start_BT, ((0, 0), (0, padded - T)), constant_values=rules.NOWHERE)
  pos_BtQ, start_BtQ = (jnp.reshape(x, (B, num_tiles, Q)) for x in (pos_BT, start_BT))
  last_Bt = jnp.max(jnp.where(start_BtQ <= pos_BtQ, pos_BtQ, -1), axis=-1)
  q = jnp.pad(q_BTNH, ((0, 0), (0, padded - T), (0, 0), (0, 0)))
  q = jnp.transpose(jnp.reshape(q, (B, num_tiles, Q, K, G, H)), (0, 1, 3, 4, 2, 5))
  X = B * num_tiles * K
  tile_X = jnp.arange(X, dtype=jnp.int32)
  batch_X, head_X = tile_X // (num_tiles * K), tile_X % K
  arrays = dict(
    q=tiles.embed(jnp.reshape(q, (X, G * Q, H)), C, head_X),
    pos=jnp.repeat(jnp.reshape(pos_BtQ, (-1, Q, 1)), K, axis=0),
    start=jnp.repeat(jnp.reshape(start_BtQ, (-1, Q, 1)), K, axis=0),
    batch=batch_X,
    column=head_X * H // C,
    last=jnp.repeat(jnp.reshape(last_Bt, (-1,)), K),
  )
  chunk = min(config.chunk, X)
  more = -X % chunk
  arrays = {
    name: jnp.reshape(
      jnp.concatenate((x, jnp.broadcast_to(x[:1], (more, *x.shape[1:])))), (-1, chunk, *x.shape[1:])
    )
    for name, x in arrays.items()
  }

  def run(c):
    scalars = (c["batch"], c["column"], c["last"])
    rows = [jnp.tile(c[name], (1, G, 1)) for name in ("pos", "start")]
    lse = _normalise(sizes, scalars, c["q"], norm_BcC, *rows, is_interpreted)
    return _scores_and_choice(
      sizes, scalars, c["q"], fine_BpMC, c["pos"], c["start"], lse, WP, is_interpreted
    )

  ids, counts = jax.lax.map(run, arrays)
  ids = jnp.reshape(jnp.reshape(ids, (-1, Q, WP))[:X, :, :W], (B, num_tiles, K, Q, W))
  counts = jnp.reshape(jnp.reshape(counts, (-1, Q))[:X], (B, num_tiles, K, Q))
  ids_BKTW = jnp.reshape(jnp.moveaxis(ids, 2, 1), (B, K, padded, W))[:, :, :T]
  return ids_BKTW, jnp.reshape(jnp.moveaxis(counts, 2, 1), (B, K, padded))[:, :, :T]


def _per_tile(x, j, *_):
  del j
  return x, 0, 0


def _normalise(sizes: _Sizes, scalars, q_XRC, norm_BcC, pos_XR1, start_XR1, is_interpreted):
  """Log-sum-exp [X, R, 1] over the visible keys of the normaliser's level."""
  X, R, C = q_XRC.shape
  step = sizes.norm_keys
  tokens = step * sizes.norm_level * sizes.rule.kernel_stride

  def keys(x, j, batch, column, last):
    return batch[x], jnp.minimum(j, jnp.maximum(last[x], 0) // tokens), column[x]

  narrow = pl.BlockSpec((None, R, 1), _per_tile)
  return pl.pallas_call(
    functools.partial(_norm_body, sizes=sizes),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(X, norm_BcC.shape[1] // step),
      in_specs=[
        pl.BlockSpec((None, R, C), _per_tile),
        pl.BlockSpec((None, step, C), keys),
        narrow,
        narrow,
      ],
      out_specs=narrow,
      scratch_shapes=[pltpu.VMEM((R, 1), jnp.float32), pltpu.VMEM((R, 1), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((X, R, 1), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
    interpret=is_interpreted,
    name="sparse_topk_normalise",
  )(*scalars, q_XRC, norm_BcC, pos_XR1, start_XR1)


def _scores_and_choice(
  sizes: _Sizes, scalars, q_XRC, fine_BpMC, pos_XQ1, start_XQ1, lse_XR1, width, is_interpreted
):
  """(ids [X, Q, width], counts [X, Q, 1])."""
  X, R, C = q_XRC.shape
  Q, (_, per_block, M, _) = sizes.queries, fine_BpMC.shape
  tokens = BLOCKS * sizes.rule.block_size

  def keys(x, j, batch, column, last):
    return batch[x], 0, jnp.minimum(j, jnp.maximum(last[x], 0) // tokens), column[x]

  narrow = pl.BlockSpec((None, Q, 1), _per_tile)
  return pl.pallas_call(
    functools.partial(_choose_body, sizes=sizes),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(X, M // BLOCKS),
      in_specs=[
        pl.BlockSpec((None, R, C), _per_tile),
        pl.BlockSpec((None, per_block, BLOCKS, C), keys),
        narrow,
        narrow,
        pl.BlockSpec((None, R, 1), _per_tile),
      ],
      out_specs=[pl.BlockSpec((None, Q, width), _per_tile), narrow],
      scratch_shapes=[pltpu.VMEM((Q, M), jnp.float32), pltpu.VMEM((Q, 1), jnp.float32)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((X, Q, width), jnp.int32),
      jax.ShapeDtypeStruct((X, Q, 1), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
    interpret=is_interpreted,
    name="sparse_topk_choose",
  )(*scalars, q_XRC, fine_BpMC, pos_XQ1, start_XQ1, lse_XR1)
