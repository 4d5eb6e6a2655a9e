"""Output equality of learned drafters (inference.md 22.7): sparse targets, grammars, FR lists.

`test_speculation` has the same for n-grams, second models and garbage on dense and sparse targets.
"""

import functools

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import bita, chain, eagle, hierarchical, mtp
from minicpm_jax.models import bita as bita_lib
from tests.infer import bita_cases, small, test_constrained_engine, test_eagle

# 108 slots, and below a hierarchy of 4 + 2 + 3 nodes, are no whole blocks of the sparse target.
CFG = config.EngineConfig(capacity=96, max_batch=2, chunk_size=16, min_span=108)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8] * 7]
SIZES = dict(num_levels=3, top_k=4, num_nodes=12)
FILTERS = {
  "none": {},
  "top_k": dict(top_k=20),
  "top_p": dict(top_p=0.9),
  "min_p": dict(min_p=0.05),
  "penalty": dict(repetition_penalty=1.2),
}


@functools.cache
def target(is_sparse):
  """Almost a bigram model, so that simple drafts are often right; its dense_len is 24."""
  more = dict(sparse=small.SPARSE) if is_sparse else {}
  model, params = small.make(tie_embeddings=False, mtp=config.MTPConfig(), **more)
  params = trees.map_with_path(
    lambda path, x: 0.1 * x if path.endswith(("o/kernel", "down/kernel")) else x, params
  )
  return model, params


def drafter_of(name, model, params, has_fr):
  made = (model, params)
  ids = np.random.default_rng(9).permutation(small.VOCAB)[:50] if has_fr else None
  if name in ("eagle", "minicpm"):
    draft = test_eagle.make_draft(made, name, window_size=0 if has_fr else 9)
    return eagle.make(draft, *made, fr_ids=ids, **SIZES)
  if name == "eagle3":
    draft = test_eagle.make_draft(made, "eagle3", draft_vocab_size=40)
    return eagle.make(draft, *made, **SIZES)
  if name == "mtp":
    return mtp.make(*made, fr_ids=ids, num_levels=2, top_k=3, num_nodes=8)
  if name == "hier":  # the small model is the target with noise
    noisy = jax.tree.map(lambda x: x + 0.01 * np.sign(np.sin(37 * x)), params)
    tiny, tiny_params = small.make(num_layers=1)
    inner = chain.ChainDrafter(tiny, num_levels=2)
    return hierarchical.HierarchicalDrafter(model, inner, 4), (noisy, tiny_params)
  cfg = bita_lib.for_target(model.cfg)
  return bita.make(bita_lib.Bita(cfg, bita_cases.params_of(cfg, seed=4)), *made)


@functools.cache
def plain_engine(is_sparse):
  return engine_lib.Engine(*target(is_sparse), CFG)


SLOW = pytest.mark.slow
CASES = [  # drafter, sparse, grammar, FR, temperature, filter
  ("eagle3", True, True, False, 0.0, "none"),
  ("hier", True, True, False, 0.7, "top_p"),
  ("bita", True, True, False, 1.2, "penalty"),
  pytest.param("minicpm", True, True, True, 0.7, "min_p", marks=SLOW),
  pytest.param("eagle", True, False, False, 1.2, "penalty", marks=SLOW),
  pytest.param("eagle", False, True, True, 0.0, "penalty", marks=SLOW),
  pytest.param("minicpm", True, False, False, 0.0, "none", marks=SLOW),
  pytest.param("eagle3", False, True, False, 1.2, "top_k", marks=SLOW),
  pytest.param("mtp", True, True, True, 1.2, "top_k", marks=SLOW),
  pytest.param("mtp", True, False, False, 0.0, "penalty", marks=SLOW),
  pytest.param("hier", True, False, False, 0.0, "penalty", marks=SLOW),
  pytest.param("bita", True, True, False, 0.0, "none", marks=SLOW),
  pytest.param("bita", False, True, False, 0.7, "min_p", marks=SLOW),
]


@pytest.mark.parametrize("name, is_sparse, has_grammar, has_fr, temperature, filter_", CASES)
def test_tokens_equal_plain_sampling(name, is_sparse, has_grammar, has_fr, temperature, filter_):
  """Two rows of unequal length, the first maybe under a grammar; the sparse target crosses its
  dense_len in both; three keys."""
  model, params = target(is_sparse)
  drafter, draft_params = drafter_of(name, model, params, has_fr)
  engine = engine_lib.Engine(model, params, CFG, drafter=drafter, draft_params=draft_params)
  accepted = []
  for seed in range(3):
    fields = FILTERS[filter_] | dict(temperature=temperature, seed=seed)
    sampling = config.SamplingConfig(max_new_tokens=40, **fields)

    def requests(sampling=sampling):
      grammar = test_constrained_engine.Steps(38) if has_grammar else None
      first = engine_lib.Request(PROMPTS[0], sampling, constraint=grammar)
      return [first, engine_lib.Request(PROMPTS[1], sampling)]

    found, plain = engine.collect(requests()), plain_engine(is_sparse).collect(requests())
    assert found.tokens == plain.tokens and found.finish_reason == plain.finish_reason
    accepted += [n for stats in found.stats for n in stats.accepted]
    if not temperature:
      break  # all keys say the same
  assert max(accepted) > 1  # something was accepted, or the test says nothing
