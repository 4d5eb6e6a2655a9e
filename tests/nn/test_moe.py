"""Routing, balance loss and grouped experts against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.config import MoEConfig
from minicpm_jax.models import zoo
from minicpm_jax.nn import moe

CFG = zoo.tiny(zoo.minicpm_moe_8x2b())
E, X, D, F = 4, 2, 8, 12


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_router_weights_are_the_softmax_over_the_chosen_logits():
  x, kernel = normal(0, 2, 5, D), normal(1, D, E)
  probs, weights, index = moe.route(x, kernel, X)
  logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  for b, t in np.ndindex(2, 5):
    chosen = np.argsort(-logits[b, t])[:X]
    np.testing.assert_array_equal(index[b, t], chosen)
    expected = np.exp(logits[b, t, chosen]) / np.exp(logits[b, t, chosen]).sum()
    np.testing.assert_allclose(weights[b, t], expected, rtol=1e-4)
    np.testing.assert_allclose(probs[b, t].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("counts", ["all_slots", "top1"])
def test_balance_loss_counts(counts):
  """E * sum f_e P_e by hand: two tokens, four experts, the third token is padding."""
  probs = jnp.asarray([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]]])
  index = jnp.asarray([[[0, 1], [3, 2], [0, 1]]])
  is_token = jnp.asarray([[True, True, False]])
  f = {"all_slots": [0.25, 0.25, 0.25, 0.25], "top1": [0.5, 0, 0, 0.5]}[counts]
  expected = 4 * np.dot(f, [0.25, 0.25, 0.25, 0.25])
  cfg = MoEConfig(num_experts=4, aux_counts=counts)
  assert float(moe.balance_loss(probs, index, is_token, cfg)) == pytest.approx(expected)
  alone = moe.balance_loss(probs[:, :2], index[:, :2], None, cfg)
  assert float(alone) == pytest.approx(expected)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, E), min_size=12, max_size=12), st.sampled_from([1, 3, 8]))
def test_layout_groups_every_row_once(experts, block):
  at = moe.layout(jnp.asarray(experts, jnp.int32), E, block)
  rows = np.asarray(at.row_P)[np.asarray(at.is_row_P)]
  kept = [r for r, e in enumerate(experts) if e < E]
  assert sorted(rows.tolist()) == kept
  for r in kept:
    place = int(at.place_R[r])
    assert int(at.row_P[place]) == r and bool(at.is_row_P[place])
    assert int(at.block_expert_M[place // block]) == experts[r]
    assert place // block < int(at.num_blocks)


@pytest.mark.parametrize("use_ragged_dot", [False, True], ids=["blocks", "ragged"])
@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["all-here", "some-elsewhere"])
def test_grouped_experts_equal_the_loop(use_ragged_dot, is_elsewhere):
  """Values and gradients; expert 3 lives on another device in the second case."""
  x = normal(0, 19, D)
  kernels = tuple(0.3 * normal(i, *s) for i, s in ((1, (E, D, F)), (2, (E, D, F)), (3, (E, F, D))))
  _, weights, index = moe.route(x[None], normal(4, D, E), X)
  weights, index = weights[0], index[0]
  if is_elsewhere:
    index = jnp.where(index == 3, E, index)

  def grouped(x, weights, kernels):
    y = moe.experts(x, weights, index, *kernels, CFG, use_ragged_dot=use_ragged_dot)
    return jnp.sum(jnp.sin(y))

  def loop(x, weights, kernels):
    gate, up, down = kernels
    y = jnp.zeros_like(x)
    for e in range(E):
      weight = jnp.sum(jnp.where(index == e, weights, 0), axis=1, keepdims=True)
      y = y + weight * ((jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return jnp.sum(jnp.sin(y))

  found = jax.jit(jax.value_and_grad(grouped, (0, 1, 2)))(x, weights, kernels)
  expected = jax.jit(jax.value_and_grad(loop, (0, 1, 2)))(x, weights, kernels)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)
