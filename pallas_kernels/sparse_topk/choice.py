"""The choice of blocks without a sort: what `ref.choose` gives, in a third of the time on a CPU.

XLA's top-k on a CPU sorts row after row on one core. Scores are >= 0, so their bits order like
integers: bisection finds the lowest score taken, then the last of equal ones (lower blocks first);
the blocks taken are bits of words, of which every place of a list looks up its own.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_topk import rule as rules

WORD = 32


def choose(scores_XM, cur_X, rule: rules.Rule, first_X):
  """(block ids [X, W] ascending, -1 = none; counts [X]) from block scores >= 0, as `ref.choose`.

  Needs a budget that holds the initial blocks and, with "joint", the local ones.
  """
  is_taken_XM = _taken(scores_XM, cur_X, rule, first_X)
  return _listed(is_taken_XM, rule.num_selected)


def _taken(scores_XM, cur_X, rule: rules.Rule, first_X):
  M = scores_XM.shape[1]
  b_1M = jnp.arange(M, dtype=jnp.int32)[None, :]
  cur_X1, first_X1 = cur_X[:, None], first_X[:, None]
  is_candidate = (b_1M >= first_X1) & (b_1M <= cur_X1)
  is_init = is_candidate & (b_1M < first_X1 + rule.init_blocks)
  is_forced = is_init | (is_candidate & (b_1M > cur_X1 - rule.num_local))
  is_paid, budget = (
    (is_forced, rule.num_selected) if rule.selection == "joint" else (is_init, rule.topk)
  )
  budget_X = budget - jnp.sum(is_paid, axis=1, dtype=jnp.int32)
  bits_XM = jax.lax.bitcast_convert_type(scores_XM.astype(jnp.float32), jnp.int32)
  bits_XM = jnp.where(is_candidate & ~is_forced, bits_XM, -1)
  lowest_X1 = _largest_with(bits_XM, budget_X, 31)[:, None]
  is_above = bits_XM > lowest_X1
  left_X = budget_X - jnp.sum(is_above, axis=1, dtype=jnp.int32)
  rank_XM = jnp.where(bits_XM == lowest_X1, M - b_1M, 0)  # of equal scores, 1 or more
  last_X1 = jnp.maximum(1, _largest_with(rank_XM, left_X, M.bit_length())[:, None])
  return is_forced | is_above | ((rank_XM >= last_X1) & (left_X > 0)[:, None])


def _largest_with(x_XM, num_X, bits: int):
  """The largest bound [X] of `bits` bits that at least `num` of x reach (0 where none has).

  Sums of WORD numbers, then of these: XLA's CPU backend makes a longer one a pass of its own over
  numbers that it has written, on one core; these it fuses with the comparison and shares out.
  """
  X, M = x_XM.shape
  x_XgL = jnp.reshape(jnp.pad(x_XM, ((0, 0), (0, -M % WORD)), constant_values=-1), (X, -1, WORD))

  def halve(i, bound_X):
    next_X = bound_X | (jnp.int32(1) << (bits - 1 - i))
    reached_Xg = jnp.sum(x_XgL >= next_X[:, None, None], axis=2, dtype=jnp.int32)
    reached_X = jnp.sum(reached_Xg, axis=1)
    return jnp.where(reached_X >= num_X, next_X, bound_X)

  return jax.lax.fori_loop(0, bits, halve, jnp.zeros(x_XM.shape[:1], jnp.int32))


def _listed(is_taken_XM, width: int):
  """(places of the set flags, ascending, -1 = none; how many are set)."""
  X, M = is_taken_XM.shape
  flags_XgL = jnp.reshape(jnp.pad(is_taken_XM, ((0, 0), (0, -M % WORD))), (X, -1, WORD))
  lane_11L = jnp.arange(WORD, dtype=jnp.uint32)[None, None, :]
  words_Xg = jnp.sum(flags_XgL.astype(jnp.uint32) << lane_11L, axis=2, dtype=jnp.uint32)
  size_Xg = jax.lax.population_count(words_Xg).astype(jnp.int32)
  end_Xg = jnp.cumsum(size_Xg, axis=1)
  place_W = jnp.arange(width, dtype=jnp.int32)
  is_before_XWg = end_Xg[:, None, :] <= place_W[None, :, None]
  own_XW = jnp.sum(is_before_XWg, axis=2, dtype=jnp.int32)
  before_XW = jnp.sum(jnp.where(is_before_XWg, size_Xg[:, None, :], 0), axis=2)
  is_own_XWg = own_XW[:, :, None] == jnp.arange(words_Xg.shape[1], dtype=jnp.int32)[None, None, :]
  word_XW = jnp.sum(jnp.where(is_own_XWg, words_Xg[:, None, :], 0), axis=2, dtype=jnp.uint32)
  bit_XW = _nth_bit(word_XW, place_W[None, :] - before_XW)
  counts_X = end_Xg[:, -1]
  ids_XW = jnp.where(place_W[None, :] < counts_X[:, None], WORD * own_XW + bit_XW, -1)
  return ids_XW, counts_X


def _nth_bit(word_X, n_X):
  """Position of the n-th (from 0) set bit, by halves."""
  at_X = jnp.zeros(word_X.shape, jnp.int32)
  for half in (16, 8, 4, 2, 1):
    low_X = (word_X >> at_X.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
    num_X = jax.lax.population_count(low_X).astype(jnp.int32)
    is_high_X = n_X >= num_X
    n_X, at_X = jnp.where(is_high_X, n_X - num_X, n_X), jnp.where(is_high_X, at_X + half, at_X)
  return at_X
