"""Constraints in the engine: masks against full forwards, trees against the plain loop."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import programs
from minicpm_jax.infer import rounds as rounds_lib
from minicpm_jax.infer.drafters import base, chain, eagle, ngram
from minicpm_jax.models import draft as draft_lib
from tests.infer import small

CFG = config.EngineConfig(capacity=64, max_batch=2, chunk_size=16, min_span=128)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7, 1, 8]]


class Steps:
  """Allows tokens t with (t + last) % 3 != 0, `limit` of them; keeps count of its calls."""

  def __init__(self, limit):
    self.said, self.limit, self.depth = [0], limit, 0

  def allowed(self):
    return [t for t in range(small.VOCAB) if (t + self.said[-1]) % 3]

  def fill_mask(self, row):
    row[:] = 0
    for t in self.allowed():
      row.view(np.uint32)[t // 32] |= np.uint32(1 << (t % 32))

  def consume(self, token):
    if self.is_stopped() or token not in self.allowed():
      return False
    self.said.append(token)
    return True

  def rollback(self, num):
    del self.said[len(self.said) - num :]

  def is_accepting(self):
    return self.is_stopped()

  def is_stopped(self):
    return len(self.said) > self.limit


def run(sampling, drafter=None, draft_params=(), with_free_row=False):
  engine = engine_lib.Engine(*small.make(), CFG, drafter=drafter, draft_params=draft_params)
  constraint = Steps(14)
  requests = [engine_lib.Request(PROMPTS[0], sampling, constraint=constraint)]
  if with_free_row:
    requests.append(engine_lib.Request(PROMPTS[1], sampling))
  out = engine.collect(requests)
  assert constraint.said[1:] == out.tokens[0]
  assert out.finish_reason[0] == "stop"
  return out


GREEDY = config.SamplingConfig(max_new_tokens=30)
DRAWN = dataclasses.replace(GREEDY, temperature=1.1, top_p=0.95, seed=4)


def test_greedy_is_the_argmax_of_what_is_allowed():
  found = run(GREEDY).tokens[0]
  assert len(found) == 14
  tokens, last = list(PROMPTS[0]), 0
  for new in found:
    logits_V = small.full_logits(*small.make(), tokens)[-1]
    logits_V[[t for t in range(small.VOCAB) if (t + last) % 3 == 0]] = -np.inf
    assert new == int(np.argmax(logits_V))
    tokens.append(new)
    last = new
  free = engine_lib.Engine(*small.make(), CFG).generate(PROMPTS[:1], GREEDY)
  assert free.tokens[0][:14] != found


@pytest.mark.parametrize("name", ["ngram", "self"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_trees_equal_the_plain_loop_and_leave_other_rows_alone(name, sampling):
  expected = run(sampling)
  drafter = {
    "ngram": (ngram.NGramDrafter(num_levels=3, num_chains=2, min_match=1), ()),
    "self": (chain.ChainDrafter(small.make()[0], num_levels=3), small.make()[1]),
  }[name]
  out = run(sampling, *drafter, with_free_row=True)
  assert out.tokens[0] == expected.tokens[0]
  free = engine_lib.Engine(*small.make(), CFG).generate(PROMPTS[1:], sampling)
  assert out.tokens[1] == free.tokens[0]
  if name == "self":
    assert max(out.stats[0].accepted) > 1


class Spells(Steps):
  """Three free tokens, then five that are spelled out, and so on; knows what it forces."""

  def allowed(self):
    at = len(self.said) - 1
    return [(7 * at + 3) % small.VOCAB] if at % 8 >= 3 else super().allowed()

  def forced_tokens(self):
    found, said = [], len(self.said)
    while not self.is_stopped() and len(self.allowed()) == 1:
      found += self.allowed()
      self.said.append(found[-1])
    del self.said[said:]
    return found


@pytest.mark.parametrize("target", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["none", "self"])
def test_forced_tokens_go_in_as_a_chunk_and_change_nothing(name, target):
  """Equal tokens in fewer forwards: greedy, and drawn under a penalty that must see them too. The
  sparse target crosses its dense_len inside the answer."""
  model, params = small.make(**(dict(sparse=small.SPARSE) if target == "sparse" else {}))
  more = {}
  if name == "self":
    more = dict(drafter=chain.ChainDrafter(model, num_levels=3), draft_params=params)
  engine = engine_lib.Engine(model, params, CFG, **more)
  for sampling in (GREEDY, dataclasses.replace(DRAWN, repetition_penalty=1.3)):
    outs = []
    for is_fast in (False, True):
      constraint = Spells(27)
      request = engine_lib.Request(
        PROMPTS[0], sampling, constraint=constraint, fast_forward=is_fast
      )
      free = engine_lib.Request(PROMPTS[1], sampling)
      outs.append(engine.collect([request, free]))
      assert constraint.said[1:] == outs[-1].tokens[0]
    assert outs[0].tokens == outs[1].tokens and outs[0].finish_reason == outs[1].finish_reason
    slow, fast = (out.stats[0] for out in outs)
    assert slow.forced_tokens == 0 and fast.forced_tokens >= 12
    num_chunks = -(-fast.forced_tokens // 5)
    assert len(fast.accepted) + 2 * num_chunks <= len(slow.accepted) or name == "self"
    assert len(fast.accepted) < len(slow.accepted)
    # All but the prefill's; the last round may have gone beyond the end of the constraint.
    num_said = sum(fast.accepted) + fast.forced_tokens
    assert fast.new_tokens - 1 <= num_said <= fast.new_tokens - 1 + (3 if name == "self" else 0)


class TwoCuts(Spells):
  """What is spelled out may be cut otherwise too; `forced_tokens` knows one cut."""

  def allowed(self):
    found = super().allowed()
    return found if len(found) > 1 else [found[0], (found[0] + 1) % small.VOCAB]

  def forced_tokens(self):
    spells = Spells(self.limit)
    spells.said = self.said
    return spells.forced_tokens()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_draft_does_not_go_past_what_is_forced(sampling):
  """A draft may be right about another cut of it: the tokens are those without a draft."""
  model, params = small.make()
  drafter = dict(drafter=chain.ChainDrafter(model, num_levels=3), draft_params=params)
  outs = []
  for more in ({}, drafter):
    request = engine_lib.Request(PROMPTS[0], sampling, constraint=TwoCuts(27), fast_forward=True)
    outs.append(engine_lib.Engine(model, params, CFG, **more).collect([request]))
  assert outs[0].tokens == outs[1].tokens
  assert outs[0].stats[0].forced_tokens == outs[1].stats[0].forced_tokens > 0
  assert max(outs[1].stats[0].accepted) > 1


def test_forced_tokens_end_at_limits_and_stop_ids():
  engine = engine_lib.Engine(*small.make(), CFG)

  def run(**fields):
    constraint = Spells(27)
    request = engine_lib.Request(PROMPTS[0], constraint=constraint, fast_forward=True, **fields)
    out = engine.collect([request])
    return out.tokens[0], out.finish_reason[0], out.stats[0].forced_tokens

  whole, reason, _ = run(sampling=GREEDY)
  assert reason == "stop" and len(whole) == 27
  for num in (4, 5, 6, 12):
    sampling = dataclasses.replace(GREEDY, max_new_tokens=num)
    tokens, reason, forced = run(sampling=sampling)
    assert (tokens, reason) == (whole[:num], "length") and (forced > 0) == (num > 4)
  stop = whole[5]
  tokens, reason, _ = run(sampling=GREEDY, stop_ids=[stop])
  assert (tokens, reason) == (whole[: whole.index(stop) + 1], "stop")
  with pytest.raises(ValueError, match="fast_forward: found no constraint that knows"):
    engine.add(engine_lib.Request([1], GREEDY, constraint=Steps(3), fast_forward=True))
  with pytest.raises(ValueError, match="fast_forward: found with want_logprobs"):
    engine.add(engine_lib.Request([1], GREEDY, (), Spells(3), True, fast_forward=True))


def test_drafts_begin_with_what_the_constraint_allows():
  """A draft that is the target: its first token is then the one that is sampled, every round; an
  EAGLE tree has no forbidden node at its first level."""
  out = run(GREEDY, chain.ChainDrafter(small.make()[0], num_levels=3), small.make()[1])
  assert min(out.stats[0].accepted[:-1]) >= 2
  model, params = small.make()
  draft = draft_lib.for_target(model.cfg, "minicpm")
  weights = draft_lib.init_params(draft, jax.random.key(0))
  ids = np.asarray([3, 5, 8, 20, 21, 40], np.int32)
  for fr_ids in (None, ids):
    drafter, draft_params = eagle.make(
      draft_lib.Draft(draft, weights), model, params, fr_ids=fr_ids, top_k=4, num_nodes=9
    )
    full = base.Params(params, draft_params)
    state = drafter.init_state(model, full, 1, 64)
    args = (state, jnp.asarray([5], jnp.int32), jnp.asarray([0], jnp.int32))
    mask_1W = np.zeros((1, 2), np.int32)
    for allowed in ([8, 21, 50], [50]):
      mask_1W[:] = 0
      for token in allowed:
        mask_1W.view(np.uint32)[0, token // 32] |= np.uint32(1 << (token % 32))
      tree, _ = drafter.draft(full._replace(root_mask_BW=jnp.asarray(mask_1W)), *args)
      first = np.asarray(tree.tok_BP)[np.asarray(tree.depth_BP) == 1]
      can_be_said = set(allowed) & set(range(small.VOCAB) if fr_ids is None else ids.tolist())
      assert set(first.tolist()) - {base.CUT} == can_be_said
      below = np.asarray(tree.tok_BP)[np.asarray(tree.depth_BP) == 2]
      assert (below >= 0).any() or not can_be_said


@pytest.mark.parametrize("stops", [[61], [-1], [2, 99]])
def test_stop_ids_that_no_token_can_be_are_refused(stops):
  found = max(stops, key=abs)
  match = f"stop_ids: found {found}, expected tokens of 0..60"
  with pytest.raises(ValueError, match=match):
    engine_lib.Engine(*small.make(), CFG, stop_ids=stops)
  with pytest.raises(ValueError, match=match):
    engine_lib.Engine(*small.make(), CFG).add(engine_lib.Request([1], GREEDY, stops))


@pytest.fixture(scope="module")
def engine_of_two():
  return engine_lib.Engine(*small.make(), CFG)


@pytest.mark.parametrize("broken", ["allowed", "fill_mask", "consume"])
def test_a_constraint_that_allows_nothing_or_raises_ends_its_request_alone(broken, engine_of_two):
  """`fill_mask` and `consume` raise when they are asked for the third time."""
  constraint, engine, calls = Steps(30), engine_of_two, []
  whole = getattr(constraint, broken)

  def fail(*args):
    calls.append(args)
    if len(calls) > 2:
      raise KeyError("it")
    return whole(*args)

  setattr(constraint, broken, list if broken == "allowed" else fail)
  other = engine.add(engine_lib.Request(PROMPTS[1], GREEDY))
  uid = engine.add(engine_lib.Request([1], GREEDY, constraint=constraint))
  tokens, ends, errors = [], {}, []
  while engine.has_work:
    try:
      events = engine.step()
    except engine_lib.RequestError as error:
      errors.append(error)
      continue
    for event in events:
      tokens += event.tokens if event.id == other else []
      ends |= {event.id: event.finish_reason} if event.finish_reason else {}
  assert [error.id for error in errors] == [uid]
  expected = "allows no token" if broken == "allowed" else "its constraint raised KeyError: 'it'"
  assert expected in str(errors[0])
  assert ends == {uid: "cancelled", other: "length"}
  assert tokens == engine.generate(PROMPTS[1:], GREEDY).tokens[0]


def test_compilation_is_in_no_rate_of_any_row(monkeypatch):
  """On a clock that only compilation moves, also that of the draft and of another row's prefill."""
  clock = types.SimpleNamespace(now=0.0)

  class Timed:
    def __init__(self, name):
      self.function, self.__name__, self.is_compiled = getattr(rounds_lib, name), name, False

    def lower(self, *args, **static):
      return self

    def compile(self):
      clock.now, self.is_compiled = clock.now + 100, True

    def __call__(self, *args, **static):
      if not self.is_compiled:
        self.compile()
      return self.function(*args, **static)

  for name in ("prefill", "draft", "verify"):
    monkeypatch.setattr(rounds_lib, name, Timed(name))
  monkeypatch.setattr(programs, "_COMPILED", set())
  for module in (engine_lib, programs):
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
  model, params = small.make()
  drafter = chain.ChainDrafter(model, num_levels=3)
  engine = engine_lib.Engine(model, params, CFG, drafter=drafter, draft_params=params)
  out = engine.collect([engine_lib.Request(p, GREEDY, constraint=Steps(6)) for p in PROMPTS])
  assert engine.compile_seconds == clock.now == 300
  for stats in out.stats:
    assert stats.prefill_seconds == stats.decode_seconds == 0
