"""Loops that XLA's CPU backend runs at the same time, a core each.

Its executor starts what does not wait for anything, also loops, but loops share the place of their
temporaries, even of a counter or a condition, and then wait for each other. So all of that lies in
the carry here. Inside such a loop every step runs on the core of the loop, if it is small enough.
That the loops are independent is all that is promised: elsewhere they run one after the other.
"""

import jax
import jax.numpy as jnp


def loops(counts, bodies, states):
  """The states after `counts` steps of state, held = body(i, state), one loop each.

  held: what a step computes on its way. Whatever a step makes that is neither in the state nor in
  `held` nor fused into one of these is a temporary, and the loops wait for each other again.
  """
  return [_loop(*lane) for lane in zip(counts, bodies, states, strict=True)]


def _loop(count, body, state):
  def step(carry):
    _, i_2, state, _ = carry
    state, held = body(i_2[0], state)
    # The next number waits for the state, so that nobody reads the last one any more, and comes out
    # of a sort, which is fused with nothing, so that the condition is no reader of the last one.
    next_2 = i_2 + 1 + _nothing(count, state)
    i_2 = jax.lax.sort(next_2)
    return i_2[0] < count, i_2, state, (held, next_2)

  held = jax.eval_shape(body, jnp.int32(0), state)[1]
  held = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), held)
  i_2 = jnp.array([0, 2**30], jnp.int32)
  init = count > 0, i_2, state, (held, i_2)
  _, _, state, held = jax.lax.while_loop(lambda carry: carry[0], step, init)
  # XLA takes what nobody reads out of the carry.
  nothing = _nothing(count, held)
  return jax.tree.map(lambda x: x + nothing.astype(x.dtype), state)


def _nothing(count, tree):
  """0, for which XLA waits for the tree: a count of steps is never negative."""
  return sum(
    jnp.where(count < 0, jnp.ravel(x)[0], 0).astype(jnp.int32) for x in jax.tree.leaves(tree)
  )
