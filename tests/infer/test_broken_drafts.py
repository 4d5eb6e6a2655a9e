"""Drafts whose weights or logits are not finite cost acceptance, never the answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.infer import chain as classic
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base, bita, chain, eagle, eagle3, hierarchical, mtp
from minicpm_jax.models import bita as bita_lib
from tests.infer import bita_cases, small, test_eagle

CFG = config.EngineConfig(capacity=112, max_batch=2, chunk_size=16, min_span=112)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8] * 5]
SIZES = dict(num_levels=3, top_k=4, num_nodes=12)
SAMPLINGS = [config.SamplingConfig(max_new_tokens=24, temperature=t) for t in (0.0, 1.5, 1.5, 1.5)]


@pytest.fixture(scope="module")
def target():
  return small.almost_bigram()


@pytest.fixture(scope="module")
def plain(target):
  return run(engine_lib.Engine(*target, CFG)).tokens


def run(engine):
  """Two rows at a time: later ones meet in the caches what the first have left."""
  requests = [
    engine_lib.Request(PROMPTS[i % 2], dataclasses.replace(sampling, seed=i))
    for i, sampling in enumerate(SAMPLINGS)
  ]
  return engine.collect(requests)


def spoilt(params, pattern, value, at=(0,)):
  """`params` with one number of every leaf whose path ends with `pattern` replaced."""
  hits = []

  def change(path, x):
    if not path.endswith(pattern):
      return x
    hits.append(path)
    return x.at[(0,) * (x.ndim - len(at)) + at].set(value)

  params = trees.map_with_path(change, jax.tree.map(jnp.asarray, params))
  assert hits, pattern
  return params


def broken(name, target, value):
  """(drafter, draft params) with `value` somewhere in the draft."""
  model, params = target
  if name == "eagle layer":
    drafter, given = eagle.make(test_eagle.make_draft(target, "eagle"), *target, **SIZES)
    return drafter, given | {"model": spoilt(given["model"], "down/kernel", value)}
  if name == "eagle head":  # one token's logits
    ids = np.arange(5, 45)
    draft = test_eagle.make_draft(target, "minicpm")
    drafter, given = eagle.make(draft, *target, fr_ids=ids, **SIZES)
    return drafter, given | {"head_DR": given["head_DR"].at[0, 3].set(value)}
  if name == "eagle3":
    draft = test_eagle.make_draft(target, "eagle3", draft_vocab_size=40)
    drafter, given = eagle3.make(draft, *target, **SIZES)
    return drafter, given | {"model": spoilt(given["model"], "v/kernel", value)}
  if name == "mtp":
    drafter, given = mtp.make(*target, **SIZES)
    return drafter, given | {"model": spoilt(given["model"], "fc/kernel", value)}
  if name == "chain":
    return chain.ChainDrafter(model, num_levels=3), spoilt(params, "layers_1/mlp/up/kernel", value)
  if name.startswith("hier"):  # the small model is the target
    inner, given = eagle.make(test_eagle.make_draft(target, "minicpm"), *target, **SIZES)
    drafter = hierarchical.HierarchicalDrafter(model, inner, 4)
    if name == "hier inner":
      return drafter, (params, given | {"model": spoilt(given["model"], "q/kernel", value)})
    return drafter, (spoilt(params, "layers_1/attn/v/kernel", value), given)
  cfg = bita_lib.for_target(model.cfg)
  drafter, given = bita.make(bita_lib.Bita(cfg, bita_cases.params_of(cfg, seed=4)), *target)
  return drafter, spoilt(given, {"bita masks": "embedding", "bita prompts": "kernel"}[name], value)


NAMES = "eagle layer,eagle head,eagle3,mtp,chain,hier,hier inner,bita masks,bita prompts".split(",")


@pytest.mark.parametrize(
  "value",
  [
    np.nan,
    pytest.param(np.inf, marks=pytest.mark.slow),
    pytest.param(3e38, marks=pytest.mark.slow),
  ],
  ids=["nan", "inf", "huge"],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_that_of_plain_decoding(target, plain, name, value):
  drafter, given = broken(name, target, value)
  found = run(engine_lib.Engine(*target, CFG, drafter=drafter, draft_params=given))
  assert found.tokens == plain
  assert set(found.finish_reason) == {"length"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_level_that_is_not_finite_is_cut_and_the_one_above_stays(target, value):
  """The first level comes from a finite feature, whatever hangs on it from the broken layer."""
  drafter, given = broken("eagle layer", target, value)
  params = base.Params(target[1], given)
  state = drafter.init_state(target[0], params, 1, 32)
  state = state.replace(feature_BD=jnp.asarray(np.random.default_rng(1).normal(size=(1, 16)), "f"))
  zero = jnp.zeros(1, jnp.int32)
  tree, _ = jax.jit(drafter.draft)(params, state, zero, zero)
  tok_P, parent_P, depth_P = (
    np.asarray(x[0]) for x in (tree.tok_BP, tree.parent_BP, tree.depth_BP)
  )
  np.testing.assert_array_equal(depth_P[1:], depth_P[parent_P[1:]] + 1)
  logits_V = np.asarray(state.feature_BD @ target[1]["lm_head"]["kernel"])[0]
  assert tok_P[depth_P == 1].tolist() == np.argsort(-logits_V, kind="stable")[:4].tolist()
  assert (tok_P[depth_P > 1] == base.CUT).all() and (depth_P > 1).any()


def test_classic_sampling_draws_from_the_target_where_a_draft_has_no_law():
  """Nothing is accepted from a q of NaN; the token is the target's by the same uniform number."""
  p_BAV = jnp.asarray(np.random.default_rng(2).dirichlet(np.ones(7), size=(64, 3)), jnp.float32)
  accept_BL, last_BA = (jnp.asarray(np.random.default_rng(n).random((64, n)), "f") for n in (2, 3))
  q_BLV = jnp.full((64, 2, 7), np.nan, jnp.float32)
  found = classic.verify_chain(jnp.ones((64, 2), jnp.int32), q_BLV, p_BAV, accept_BL, last_BA)
  cdf_BV = np.cumsum(np.asarray(p_BAV[:, 0], np.float64), axis=1)
  expected_B = (cdf_BV > np.asarray(last_BA[:, :1]) * cdf_BV[:, -1:]).argmax(1)
  assert (np.asarray(found[0]) == 1).all()
  np.testing.assert_array_equal(found[1][:, 0], expected_B)
