"""Constraints in the engine: masks against full forwards, trees against the plain loop."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import chain, ngram
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


def test_a_constraint_that_allows_nothing_ends_its_request_alone():
  constraint = Steps(5)
  constraint.allowed = list
  engine = engine_lib.Engine(*small.make(), CFG)
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
  assert "the constraint allows no token" in str(errors[0])
  assert ends == {uid: "cancelled", other: "length"}
  assert tokens == engine.generate(PROMPTS[1:], GREEDY).tokens[0]
