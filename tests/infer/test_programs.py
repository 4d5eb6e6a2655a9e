"""Warm-up: after it nothing compiles (counted by jax itself), and tokens are as without it."""

import contextlib
import dataclasses

import jax
import jax.monitoring
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import answers, generate, programs, requests
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import rounds as rounds_lib
from minicpm_jax.infer.drafters import chain, ngram
from minicpm_jax.quant import prefix as prefix_lib
from tests.infer import small, test_constrained_engine

CFG = config.EngineConfig(capacity=77, max_batch=2, chunk_size=16, min_span=32)
DRAWN = config.SamplingConfig(temperature=1.1, top_p=0.9, max_new_tokens=9, seed=4)


@contextlib.contextmanager
def compilations():
  """Names of what is compiled meanwhile."""
  names = []

  def note(event, seconds, **more):
    del seconds
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(more.get("fun_name"))

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


def test_requests_of_the_first_span_compile_nothing_and_say_what_they_said():
  """Weights that are bound to a device, as checkpoints bring them, change the state's form."""
  model, params = generate.for_decoding(*small.make(num_layers=1))
  params = jax.device_put(params, jax.devices()[0])
  engine = engine_lib.Engine(model, params, CFG)
  with compilations() as names:
    num = engine.warm_up()
  assert num == 5 and len(names) >= num and engine.compile_seconds > 0 and not engine.has_work
  prompts = [[3, 1, 4, 1, 5], [9], [2, 6] * 6, [3, 1, 4, 1, 5, 9]]
  calls = [requests.Request(p, dataclasses.replace(DRAWN, seed=i)) for i, p in enumerate(prompts)]
  calls[1] = dataclasses.replace(calls[1], want_logprobs=True, num_top_logprobs=2)
  calls[2] = dataclasses.replace(calls[2], sampling=config.SamplingConfig(max_new_tokens=9))
  with compilations() as names:
    found = engine.collect(calls)
    engine.cancel(engine.add(requests.Request([1, 2], DRAWN)))
  assert names == [] and [s.compile_seconds for s in found.stats] == [0.0] * 4
  assert [s.cached_tokens for s in found.stats] == [0] * 4
  cold = engine_lib.Engine(model, params, CFG).collect(calls)
  assert found.tokens == cold.tokens and found.top_logprobs == cold.top_logprobs
  engine.add(requests.Request([1], DRAWN))
  with pytest.raises(ValueError, match="warm_up: found requests under way"):
    engine.warm_up()


@pytest.mark.parametrize("is_bound", [pytest.param(False, marks=pytest.mark.slow), True])
def test_requests_under_a_constraint_compile_nothing_either(is_bound):
  """Of one row and of both; the tree of a draft lies where the weights are bound to."""
  model, params = generate.for_decoding(*small.make(num_layers=1))
  cfg = dataclasses.replace(CFG, shrinks=True, capacity=64)
  params = jax.device_put(params, jax.devices()[0]) if is_bound else params
  more = dict(drafter=ngram.NGramDrafter(num_levels=2, min_match=1)) if is_bound else {}

  def calls():
    steps, spells = test_constrained_engine.Steps, test_constrained_engine.Spells
    drawn = [dataclasses.replace(DRAWN, seed=i, max_new_tokens=n) for i, n in enumerate((5, 9))]
    return [
      requests.Request([7, 1, 8], drawn[0], constraint=steps(4)),
      requests.Request([3, 1, 4, 1, 5], drawn[1], constraint=steps(9)),
      requests.Request([9], drawn[0]),
      requests.Request([2, 6], drawn[1], constraint=spells(9), fast_forward=True),
    ]

  engine = engine_lib.Engine(model, params, cfg, **more)
  without = engine.warm_up()
  assert engine.warm_up(is_constrained=True) == without + 5  # two halves, one row and two; resume
  with compilations() as names:
    found = engine.collect(calls())
  assert names == [] and [s.compile_seconds for s in found.stats] == [0.0] * 4
  assert found.stats[3].forced_tokens == 5
  cold = engine_lib.Engine(model, params, dataclasses.replace(cfg, shrinks=False)).collect(calls())
  assert found.tokens == cold.tokens and found.finish_reason == cold.finish_reason


def test_warming_up_later_leaves_no_stale_prompt_behind():
  model, params = generate.for_decoding(*small.make(num_layers=1))
  cfg = dataclasses.replace(CFG, max_batch=1, min_prefix=4)
  prompt, greedy = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], config.SamplingConfig(max_new_tokens=9)
  engine = engine_lib.Engine(model, params, cfg)
  expected = engine.generate([prompt], greedy)
  assert engine.generate([prompt], greedy).stats[0].cached_tokens == 11
  engine.warm_up()
  found = engine.generate([prompt], greedy)
  assert found.stats[0].cached_tokens == 0 and found.tokens == expected.tokens


def test_prefix_tokens_are_no_part_of_what_a_request_may_hold():
  model, params = generate.for_decoding(*small.make(num_layers=1))
  rows = np.ones((1, 5, model.cfg.num_kv_heads, model.cfg.head_dim), np.float32)
  before = prefix_lib.Prefix(rows, rows, (1, 2, 3, 4, 5))
  engine = engine_lib.Engine(model, params, CFG, before=before)
  engine.warm_up(28)
  with compilations() as names:
    engine.generate([[6] * 20], config.SamplingConfig(max_new_tokens=8))
  assert names == []


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize(
  "rounds, levels, chunk, num, batch",
  [(1, 0, 64, None, 1), (3, 2, 16, 100, 1), (1, 0, 16, None, 5)],
)
def test_the_plan_holds_all_that_requests_ask_for(
  tells, rounds, levels, chunk, num, batch, monkeypatch
):
  """What an engine of canned answers calls for, prompts of every length, greedy and drawn."""
  model, params = small.make(num_layers=1, sparse=small.SPARSE)
  cfg = dataclasses.replace(
    CFG, capacity=160, chunk_size=chunk, rounds_per_dispatch=rounds, max_batch=batch, min_prefix=4
  )
  cfg = dataclasses.replace(cfg, shrinks=True, min_span=30)  # the engine's: 32, whole blocks
  more = {}
  if levels:
    more = dict(drafter=chain.ChainDrafter(model, num_levels=levels), draft_params=params)
  engine = engine_lib.Engine(model, params, cfg, **more)
  engine.tells = tells
  asked, A = set(), levels + 1

  def key(function, args, static):
    shape = tuple(x.shape for x in args)
    return (function is rounds_lib.prefill, shape, *sorted(static.items(), key=str))

  def call(function, jobs, *args, **static):
    asked.add(key(function, args, static))
    rounds = static.get("rounds", 1)
    B = static.get("num_rows", cfg.max_batch)
    shape = (1, 1, 1) if function is rounds_lib.prefill else (B, rounds, A)
    tokens = np.ones(shape, np.int32)
    logprobs = np.zeros(shape, np.float32)
    return answers.Answer(tokens, logprobs, None, None, np.zeros(shape[0], bool))

  monkeypatch.setattr(engine, "_call", call)
  sizes = engine._sizes()
  num = sizes.first if num is None else num
  draws = [config.SamplingConfig(), config.SamplingConfig(temperature=1.0)]
  for length in (*range(1, num - 1, 3), num - 1):
    sampling = dataclasses.replace(draws[length % 2], max_new_tokens=num - length)
    begin = [length % 7] * (length // 2)  # some begin as the row's last one did
    prompt = begin + [1] * (length - len(begin))
    engine.generate([prompt] * (1 + length % batch), sampling)
  planned = [*programs.prefills(sizes, num, engine._free_mask), *programs.runs(sizes, num)]
  planned = {key(*program) for program in planned}
  assert asked <= planned
  assert len(asked) > 0.6 * len(planned)  # other rows ask for some of the rest
