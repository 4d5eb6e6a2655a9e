"""Hierarchical drafter: output equality, chains against a plain simulation, caches in step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base, chain, hierarchical, ngram
from tests.infer import small

CFG = config.EngineConfig(capacity=96, max_batch=2, chunk_size=16, min_span=128)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8] * 7]


def noisy(params, size):
  return jax.tree.map(lambda x: x + size * jnp.sign(jnp.sin(37 * x)), params)


def greedy(model, params, tokens, num):
  """num greedy tokens after `tokens`, by full forwards."""
  tokens = list(tokens)
  for _ in range(num):
    tokens.append(int(small.full_logits(model, params, tokens)[-1].argmax()))
  return tokens[-num:]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_equal_plain_sampling(temperature):
  """The small model is the target with noise; its own drafter is a one-layer model."""
  model, params = small.make()
  tiny, tiny_params = small.make(num_layers=1)
  drafter = hierarchical.HierarchicalDrafter(model, chain.ChainDrafter(tiny, num_levels=2), 3)
  sampling = config.SamplingConfig(temperature=temperature, max_new_tokens=40, seed=1)
  engine = engine_lib.Engine(
    model, params, CFG, drafter=drafter, draft_params=(noisy(params, 0.01), tiny_params)
  )
  found = engine.generate(PROMPTS, sampling)
  plain = engine_lib.Engine(model, params, CFG).generate(PROMPTS, sampling)
  assert found.tokens == plain.tokens
  lengths = list(itertools.chain.from_iterable(s.accepted for s in found.stats))
  assert 1 <= min(lengths) and 3 <= max(lengths) <= drafter.num_levels + 1
  # Both lists of SpecMQuant: the inner one is what the small model accepted of each tree.
  state = engine.draft_state
  assert (np.asarray(state.num_drafted_B) >= np.asarray(state.num_trees_B)).all()
  assert (np.asarray(state.num_drafted_B) >= 3 * len(found.stats[0].accepted)).any()


def test_chain_is_what_the_small_model_says():
  """Greedy tokens of the small model, as many as whole trees bring beyond min_length."""
  model, params = small.make()
  drafter = hierarchical.HierarchicalDrafter(model, ngram.NGramDrafter(num_levels=2), 4)
  draft_params = base.Params(params, (params, ()))
  state = drafter.init_state(model, draft_params, 2, 64)
  prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 1, 2]]
  for row, prompt in enumerate(prompts):
    new = base.Committed(
      tokens_BT=jnp.asarray([prompt + [0] * (8 - len(prompt))]),
      next_BT=jnp.asarray([(prompt + [0] * 9)[1:9]]),
      features_BTD=jnp.zeros((1, 8, 1)),
      start_B=jnp.asarray([0]),
      num_B=jnp.asarray([len(prompt) - 1]),
      row=jnp.int32(row),
    )
    state = drafter.prefill(draft_params, state, new)
  root_B = jnp.asarray([p[-1] for p in prompts], jnp.int32)
  length_B = jnp.asarray([len(p) - 1 for p in prompts], jnp.int32)
  tree, state = jax.jit(lambda s: drafter.draft(draft_params, s, root_B, length_B))(state)
  for row, prompt in enumerate(prompts):
    tok = np.asarray(tree.tok_BP[row])
    num = int((tok != base.CUT).sum()) - 1
    assert 4 <= num <= drafter.num_levels
    assert tok[0] == prompt[-1] and tok[1 : num + 1].tolist() == greedy(model, params, prompt, num)
    assert (tok[num + 1 :] == base.CUT).all()
    assert num == int(state.num_drafted_B[row]) and 2 <= int(state.num_trees_B[row]) <= 4


def test_small_model_is_in_step_after_every_commit():
  """A perfect small model: the target accepts every chain to its end, round after round."""
  model, params = small.make()
  tiny, tiny_params = small.make(num_layers=1)
  drafter = hierarchical.HierarchicalDrafter(model, chain.ChainDrafter(tiny, num_levels=1), 3)
  engine = engine_lib.Engine(
    model, params, CFG, drafter=drafter, draft_params=(params, tiny_params)
  )
  out = engine.generate([PROMPTS[0]], config.SamplingConfig(max_new_tokens=48))
  assert min(out.stats[0].accepted[:-1]) >= drafter.min_length + 1


def test_drafts_that_do_not_fit_are_refused():
  model, params = small.make()
  other, other_params = small.make(vocab_size=50)
  with pytest.raises(ValueError, match="small model: found a vocabulary of 50, expected .* 61"):
    engine_lib.Engine(
      model,
      params,
      CFG,
      drafter=hierarchical.HierarchicalDrafter(other, ngram.NGramDrafter()),
      draft_params=(other_params, ()),
    )
  with pytest.raises(ValueError, match="min_length: found 0"):
    hierarchical.HierarchicalDrafter(model, ngram.NGramDrafter(), 0)
  with pytest.raises(ValueError, match="found 68 tree nodes"):
    hierarchical.HierarchicalDrafter(model, ngram.NGramDrafter(num_levels=7), 60)
  inner = dataclasses.replace(chain.ChainDrafter(other), num_levels=2)
  with pytest.raises(ValueError, match="draft model: found a vocabulary of 50"):
    engine_lib.Engine(
      model,
      params,
      CFG,
      drafter=hierarchical.HierarchicalDrafter(model, inner),
      draft_params=(params, other_params),
    )
