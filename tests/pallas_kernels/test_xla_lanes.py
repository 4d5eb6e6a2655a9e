"""Loops beside each other: values against a loop in numpy, and that XLA leaves what they hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_attention import xla_lanes


def _run(counts, states, rows):
  def body(i, state):
    total, seen = state
    row = rows[i]
    squares = row[:, None] * row[None, :]
    return (total + squares, seen + 1), (row, squares)

  return xla_lanes.loops(list(counts), [body] * len(counts), states)


def test_loops_count_their_own_steps():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(6, 5)).astype(np.float32)
  counts = np.array([0, 4, 6], np.int32)
  states = [(np.full((5, 5), z, np.float32), np.int32(10 * z)) for z in range(3)]
  results = jax.jit(_run)(counts, jax.tree.map(jnp.asarray, states), rows)
  for count, (total, seen), (start, first) in zip(counts, results, states, strict=True):
    expected = start + sum((np.outer(rows[i], rows[i]) for i in range(count)), np.zeros((5, 5)))
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    assert seen == first + count


def test_what_steps_hold_and_the_condition_stay_in_the_carry():
  """XLA would take unused values out, and loops with temporaries do not run at the same time."""
  state = jnp.zeros((5, 5)), jnp.int32(0)
  compiled = jax.jit(_run).lower(jnp.array([2, 3]), [state, state], jnp.ones((6, 5))).compile()
  carries = re.findall(r"= \((pred\[\][^)]*)\) while\(", compiled.as_text())
  assert len(carries) == 2
  for carry in carries:
    assert carry.count("f32[5,5]") == 2 and "f32[5]" in carry
