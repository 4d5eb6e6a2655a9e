"""Rounds of the live rows alone (EngineConfig.shrinks) for drafters with a state of their own.

Tokens would be right with any state; `accepted` of every round is what a wrong one would change.
"""

import dataclasses

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base, bita, chain, mtp
from minicpm_jax.models import bita as bita_lib
from tests.infer import bita_cases, small, test_constrained_engine, test_matrix

CFG = config.EngineConfig(capacity=96, max_batch=4, chunk_size=16, min_span=108, min_prefix=4)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8] * 7, [2], list(range(20, 45))]
LENGTHS = (30, 9, 60, 14, 25, 12, 3)
CANCELLED = 2  # the longest, in the midst of it


def drafter_of(name, model, params):
  if name == "chain":  # the draft is the target with noise
    noisy = jax.tree.map(lambda x: x + 0.02 * np.sign(np.sin(37 * x)), params)
    return chain.ChainDrafter(model, num_levels=2), noisy
  if name == "mtp":  # of random weights, so half of the vocabulary
    return mtp.make(model, params, num_levels=1, top_k=30, num_nodes=31)
  if name == "bita":  # a random mask is right where it may name a third of the vocabulary
    cfg = bita_lib.for_target(model.cfg, num_masks=1)
    draft = bita_lib.Bita(cfg, bita_cases.params_of(cfg, seed=4))
    return bita.make(draft, model, params, width=small.VOCAB // 3)
  return test_matrix.drafter_of(name, model, params, name == "minicpm")


def requests():
  """The fifth and sixth begin as earlier ones did, so that their rows are copied or go on."""
  prompts = [*PROMPTS, [*PROMPTS[1], 4, 4], [*PROMPTS[3], 1], [9, 9]]
  for i, (prompt, num) in enumerate(zip(prompts, LENGTHS, strict=True)):
    sampling = config.SamplingConfig(temperature=0.7 * (i % 2), seed=i, max_new_tokens=num)
    yield engine_lib.Request(prompt, sampling)


def served(engine):
  """{id: (tokens, accepted)} of requests that come one by one, one of which is cancelled."""
  tokens, accepted, late = {}, {}, list(requests())
  for step in range(200):
    if late and step % 3 == 0:
      tokens[engine.add(late.pop(0))] = []
    events = engine.step()
    if CANCELLED not in accepted and len(tokens.get(CANCELLED, ())) > 15:
      events.append(engine.cancel(CANCELLED))
    for event in events:
      tokens[event.id] += event.tokens
      if event.finish_reason is not None:
        accepted[event.id] = list(event.stats.accepted)
    if not late and not engine.has_work:
      return tokens, accepted
  raise AssertionError("the engine did not end")


SLOW = pytest.mark.slow
CASES = [  # drafter, sparse target, rounds of a dispatch
  ("eagle", False, 1),
  pytest.param("hier", False, 1, marks=SLOW),
  ("bita", False, 1),
  pytest.param("hier", True, 3, marks=SLOW),
  pytest.param("eagle3", True, 1, marks=SLOW),
  pytest.param("minicpm", False, 3, marks=SLOW),
  pytest.param("mtp", True, 1, marks=SLOW),
  pytest.param("chain", False, 1, marks=SLOW),
  pytest.param("chain", True, 3, marks=SLOW),
  pytest.param("bita", True, 3, marks=SLOW),
]


@pytest.mark.parametrize("name, is_sparse, rounds", CASES)
def test_rounds_of_the_live_rows_alone_draft_the_same(name, is_sparse, rounds, monkeypatch):
  model, params = test_matrix.target(is_sparse)
  drafter, draft_params = drafter_of(name, model, params)
  cfg = dataclasses.replace(CFG, rounds_per_dispatch=rounds)
  sizes = set()
  call = engine_lib.Engine._call

  def counted(self, function, jobs, *args, **static):
    if function.__name__ == "run":
      sizes.add(static.get("num_rows", CFG.max_batch))
    return call(self, function, jobs, *args, **static)

  monkeypatch.setattr(engine_lib.Engine, "_call", counted)
  found = []
  for shrinks in (False, True):
    more = dict(drafter=drafter, draft_params=draft_params)
    engine = engine_lib.Engine(model, params, dataclasses.replace(cfg, shrinks=shrinks), **more)
    found.append(served(engine))
  assert sizes == {1, 2, 4}
  plain = test_matrix.plain_engine(is_sparse).collect(list(requests())).tokens
  (whole, whole_accepted), (tokens, accepted) = found
  for uid, num in enumerate(LENGTHS):
    got = len(tokens[uid])
    assert got == num if uid != CANCELLED else 15 < got < num
    assert tokens[uid] == plain[uid][:got]
    rounds_both = min(len(accepted[uid]), len(whole_accepted[uid]))
    assert accepted[uid][:rounds_both] == whole_accepted[uid][:rounds_both]
    if uid != CANCELLED:
      assert accepted[uid] == whole_accepted[uid] and tokens[uid] == whole[uid]
  assert np.mean([n for each in accepted.values() for n in each]) > 1.05  # or it says nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eagle", "hier", "bita", "chain"])
def test_rounds_under_a_constraint_are_of_the_live_rows_too(name):
  """Rows with and without a grammar beside each other, which end one after the other."""
  model, params = test_matrix.target(False)
  drafter, draft_params = drafter_of(name, model, params)

  def calls():
    for i, (prompt, num) in enumerate(zip([*PROMPTS, [4, 4]], (5, 30, 9, 14, 12), strict=True)):
      sampling = config.SamplingConfig(temperature=0.7 * (i % 2), seed=i, max_new_tokens=num)
      grammar = test_constrained_engine.Steps(num) if i != 3 else None
      yield engine_lib.Request(prompt, sampling, constraint=grammar)

  cfg = dataclasses.replace(CFG, shrinks=True)
  more = dict(drafter=drafter, draft_params=draft_params)
  found = engine_lib.Engine(model, params, cfg, **more).collect(list(calls()))
  plain = test_matrix.plain_engine(False).collect(list(calls()))
  assert found.tokens == plain.tokens and found.finish_reason == plain.finish_reason
  assert max(n for stats in found.stats for n in stats.accepted) > 1


def test_rows_are_taken_and_put_back():
  rng = np.random.default_rng(0)
  state = {"a": rng.normal(size=(5, 3)), "b": rng.integers(0, 9, (5,))}
  for row, num in ((0, 2), (3, 2), (1, 4)):
    part = base.take_rows(state, row, num)
    for name, x in state.items():
      np.testing.assert_array_equal(part[name], x[row : row + num].astype(part[name].dtype))
    changed = base.put_rows(state, {name: -x for name, x in part.items()}, row)
    for name, x in state.items():
      expected = x.copy()
      expected[row : row + num] *= -1
      np.testing.assert_array_equal(changed[name], expected.astype(changed[name].dtype))
  assert base.take_rows(state, None, 5) is state and base.put_rows(None, state, None) is state
