"""The engine against full forwards without a cache, and against itself alone and in company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate
from minicpm_jax.infer import rows as rows_lib
from minicpm_jax.infer.drafters import chain, ngram
from tests.infer import small

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8], list(range(20, 60))]
GREEDY = config.SamplingConfig(max_new_tokens=10)
DRAWN = config.SamplingConfig(temperature=1.3, top_k=40, top_p=0.95, max_new_tokens=10, seed=5)
CFG = config.EngineConfig(capacity=64, max_batch=3, chunk_size=16, min_span=16)


@pytest.fixture(scope="module")
def mup():
  return small.make()


def argmax_tokens(model, params, prompt, num):
  tokens = list(prompt)
  for _ in range(num):
    tokens.append(int(np.argmax(small.full_logits(model, params, tokens)[-1])))
  return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_full_forwards_with_more_requests_than_rows(mup):
  out = engine_lib.Engine(*mup, CFG).generate(PROMPTS, GREEDY, want_logprobs=True)
  for prompt, found, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
    assert found == argmax_tokens(*mup, prompt, 10)
    logits_TV = small.full_logits(*mup, prompt + found)[len(prompt) - 1 : -1]
    expected = logits_TV[np.arange(10), found] - np.log(np.exp(logits_TV).sum(-1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
  assert out.finish_reason == ["length"] * 4
  assert [s.prompt_tokens for s in out.stats] == [8, 1, 3, 40]


def test_what_another_form_of_the_parameters_compiles_is_no_decoding_time():
  """A full and an FR head have one drafter, weights inputs or outputs first one model."""
  model, params = generate.for_decoding(*small.make(num_layers=1), num_rows=2)
  cfg = dataclasses.replace(CFG, capacity=45, max_batch=1)  # compiled nowhere else
  for form in (params, generate.for_decoding(model, params)[1]):
    engine = engine_lib.Engine(model, form, cfg)
    first, again = (engine.generate([[1, 2]], GREEDY).stats[0].compile_seconds for _ in range(2))
    assert first > 0 and again == 0


def test_rows_of_a_batch_equal_each_alone_under_their_own_settings(mup):
  settings = [
    DRAWN,
    dataclasses.replace(DRAWN, seed=8, repetition_penalty=1.4),
    GREEDY,
    dataclasses.replace(DRAWN, temperature=0.8, min_p=0.1, max_new_tokens=4),
  ]
  requests = [engine_lib.Request(p, s) for p, s in zip(PROMPTS, settings, strict=True)]
  together = engine_lib.Engine(*mup, CFG).collect(requests)
  alone_cfg = dataclasses.replace(CFG, max_batch=1)
  alone = engine_lib.Engine(*mup, alone_cfg).collect(requests)
  assert together.tokens == alone.tokens
  assert [len(t) for t in together.tokens] == [10, 10, 10, 4]


@pytest.mark.parametrize("is_drafted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rounds_of_the_live_rows_alone_change_no_token(is_drafted, monkeypatch):
  """Rows end one after the other; drafted: a few rows complete the windows of sparse attention."""
  model, params = small.make(num_layers=1, sparse=small.SPARSE if is_drafted else None)
  drafter = ngram.NGramDrafter(num_levels=2) if is_drafted else None
  cfg = dataclasses.replace(CFG, max_batch=4, min_span=64, rounds_per_dispatch=1 + is_drafted)
  requests, lengths = [], (4, 30, 9, 14, 6, 12)
  for i, (prompt, num) in enumerate(zip([*PROMPTS, [5] * 6, [1, 2] * 3], lengths, strict=True)):
    sampling = dataclasses.replace(DRAWN, seed=i, max_new_tokens=num, repetition_penalty=1 + i / 9)
    requests.append(engine_lib.Request(prompt, sampling, want_logprobs=True))
  expected = engine_lib.Engine(model, params, cfg, drafter=drafter).collect(requests)
  shrunk = engine_lib.Engine(model, params, dataclasses.replace(cfg, shrinks=True), drafter=drafter)
  call, sizes = engine_lib.Engine._call, []

  def counted(self, function, jobs, *args, **static):
    if function.__name__ == "run":
      sizes.append((static.get("num_rows", 4), len(jobs)))
    return call(self, function, jobs, *args, **static)

  monkeypatch.setattr(engine_lib.Engine, "_call", counted)
  found = shrunk.collect(requests)
  assert found.tokens == expected.tokens and [len(t) for t in found.tokens] == [*lengths]
  for a, b in zip(found.logprobs, expected.logprobs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert {num for num, _ in sizes} == {1, 2, 4} and all(num >= live for num, live in sizes)
  assert {num for num, live in sizes if live == 1} == {1}


def test_windows_hold_the_rows_and_new_rows_are_beside_them():
  for rows, window in (
    ([3], (3, 1)),
    ([0, 1], (0, 2)),
    ([4, 5], (4, 2)),
    ([1, 3], (1, 4)),
    ([3, 5], (2, 4)),
    ([0, 4], (0, 6)),
  ):
    assert rows_lib.window(rows, 6) == window
  assert rows_lib.window_sizes(6) == [1, 2, 4, 6] and rows_lib.window_sizes(1) == [1]
  held = [[1, 2, 3, 4], [], [7, 7], [9] * 9]
  rows = [rows_lib.Row(held=tokens, kind="k") for tokens in held]
  rows[3].job = object()
  job = rows_lib.Job(0, engine_lib.Request([1, 2, 3, 4, 5]), (), engine_lib.Stats())
  choose = lambda *more: rows_lib.choose_row(rows, job, "k", *more)  # noqa: E731
  assert choose(-1, True) == (1, 1, 0)  # the row that holds least
  assert choose(-1, True, True) == (2, 2, 0)  # a window of two with row 3
  assert choose(2, True, True) == (0, 0, 3)  # what is in the cache is worth more


def test_streams_of_one_engine_may_be_read_in_turn(mup):
  engine = engine_lib.Engine(*mup, CFG)
  expected = engine.generate(PROMPTS[:2], GREEDY).tokens
  streams = [engine.stream([engine_lib.Request(p, GREEDY)]) for p in PROMPTS[:2]]
  found = [list(next(stream).tokens) for stream in streams]
  inside = engine.generate(PROMPTS[:1], GREEDY).tokens  # steps the two streams as well
  for tokens, stream in zip(found, streams, strict=True):
    for event in stream:
      tokens += event.tokens
  assert found == expected and inside == expected[:1]
  assert not engine.has_work


def test_greedy_with_a_penalty_against_the_equation(mup):
  sampling = dataclasses.replace(GREEDY, repetition_penalty=1.7)
  found = engine_lib.Engine(*mup, CFG).generate(PROMPTS[:1], sampling).tokens[0]
  tokens = list(PROMPTS[0])
  for _ in range(10):
    logits_V = small.full_logits(*mup, tokens)[-1]
    for i in set(tokens):
      logits_V[i] = logits_V[i] / 1.7 if logits_V[i] > 0 else logits_V[i] * 1.7
    tokens.append(int(np.argmax(logits_V)))
  assert found == tokens[8:]
  assert found != engine_lib.Engine(*mup, CFG).generate(PROMPTS[:1], GREEDY).tokens[0]


def test_a_request_that_joins_late_and_one_that_is_cancelled(mup):
  engine = engine_lib.Engine(*mup, CFG)
  expected = engine.generate(PROMPTS[:3], DRAWN).tokens
  first, second = (engine.add(engine_lib.Request(p, DRAWN)) for p in PROMPTS[:2])
  tokens, ends = {first: [], second: []}, {}

  def step():
    for event in engine.step():
      tokens[event.id] += event.tokens
      if event.finish_reason:
        ends[event.id] = event

  for _ in range(4):
    step()
  last = engine.cancel(second)
  assert (last.finish_reason, last.tokens) == ("cancelled", [])
  assert engine.cancel(second) is None
  third = engine.add(engine_lib.Request(PROMPTS[2], DRAWN))
  tokens[third] = []
  while engine.has_work:
    step()
  assert tokens[first] == expected[0] and tokens[third] == expected[2]
  assert tokens[second] == expected[1][: len(tokens[second])]
  assert 0 < len(tokens[second]) < 10
  assert ends[first].stats.new_tokens == 10
  assert engine.num_free_slots == 3


def test_stop_ids_of_engine_and_request_end_a_row(mup):
  engine = engine_lib.Engine(*mup, CFG)
  whole = engine.generate(PROMPTS[:2], DRAWN).tokens
  never = next(token for token in range(small.VOCAB) if token not in whole[0] + whole[1])
  out = engine.generate(PROMPTS[:2], DRAWN, stop_ids=[never, whole[0][4]])
  cut = whole[0].index(whole[0][4])
  assert (out.tokens[0], out.finish_reason[0]) == (whole[0][: cut + 1], "stop")
  engine = engine_lib.Engine(*mup, CFG, stop_ids=[whole[1][0]])
  out = engine.generate(PROMPTS[1:2], DRAWN)
  assert (out.tokens, out.finish_reason) == ([[whole[1][0]]], ["stop"])


def untyped(**fields):
  """A request of one token as outside the tests, where nothing looks at types."""
  request = engine_lib.Request([1])
  for name, value in fields.items():
    object.__setattr__(request, name, value)
  return request


@pytest.mark.parametrize(
  "request_, text",
  [
    (untyped(sampling={"top_k": 1}), "sampling: found .*expected a SamplingConfig"),
    (untyped(want_logprobs="yes"), "want_logprobs: found 'yes', expected True or False"),
    (untyped(num_top_logprobs=1.5), "num_top_logprobs: found 1.5, expected an integer"),
    (untyped(num_top_logprobs=True), "num_top_logprobs: found True, expected an integer"),
    (untyped(constraint="{}"), "constraint: found '{}', expected a TokenConstraint"),
    (untyped(prompt="abc"), "prompt: found 'abc', expected a list of token ids"),
    (untyped(prompt=[1.5]), r"prompt: found \[1.5\], expected a list of token ids"),
    (untyped(prompt=[[1, 2]]), "prompt: found .*expected a list of token ids"),
    (untyped(prompt=None), "prompt: found None, expected a list"),
    (untyped(stop_ids=5), "stop_ids: found 5, expected a list of token ids"),
    (engine_lib.Request([]), "prompt: found no token"),
    (engine_lib.Request([1, small.VOCAB]), f"found token {small.VOCAB}, expected 0..60"),
    (engine_lib.Request([1] * 64), "found 64 tokens, expected at most 63: the cache's 64"),
    (engine_lib.Request([1], stop_ids=range(17)), "stop_ids: found 17, expected at most 16"),
  ],
)
def test_bad_requests_are_refused_and_the_engine_goes_on(mup, request_, text):
  engine = engine_lib.Engine(*mup, CFG)
  with pytest.raises(ValueError, match=text):
    engine.add(request_)
  assert len(engine.generate([[1]], GREEDY).tokens[0]) == 10


def test_an_output_ends_where_the_cache_is_full(mup):
  sampling = dataclasses.replace(GREEDY, max_new_tokens=500)
  prompt = list(range(60))
  out = engine_lib.Engine(*mup, CFG).generate([prompt], sampling)
  assert out.finish_reason == ["length"]
  assert out.tokens[0] == argmax_tokens(*mup, prompt, 5)[: len(out.tokens[0])]
  assert len(out.tokens[0]) == 5  # 60 + 4 slots, the last token needs none


def test_non_finite_logits_are_refused(mup):
  model, params = mup
  broken = dict(params, final_norm={"scale": params["final_norm"]["scale"] * jnp.nan})
  with pytest.raises(ValueError, match="non-finite logits"):
    engine_lib.Engine(model, broken, CFG).generate([[1, 2]], GREEDY)


def test_no_host_transfer_inside_a_round(mup):
  """The dispatch of a round moves nothing between host and device."""
  engine = engine_lib.Engine(*mup, CFG)
  engine.generate(PROMPTS[:1], GREEDY)
  engine.add(engine_lib.Request(PROMPTS[0], GREEDY))
  engine.step()
  live = [row.job for row in engine._rows if row.job is not None]
  with jax.transfer_guard("disallow"):
    engine._dispatch(live)


def test_a_refused_or_failed_request_leaves_nothing_behind(mup):
  engine = engine_lib.Engine(*mup, CFG)
  with pytest.raises(ValueError, match="found 200 tokens"):
    engine.generate([[1, 2], [9] * 200], GREEDY)
  assert not engine.has_work
  with pytest.raises(ValueError, match="found 200 tokens"):
    list(engine.stream([engine_lib.Request([1, 2], GREEDY), engine_lib.Request([9] * 200)]))
  assert not engine.has_work and engine.num_free_slots == 3


def test_rows_that_fail_in_one_round_all_end():
  model, params = small.make(tie_embeddings=False)
  table = np.asarray(params["embed"]["embedding"]).copy()
  table[4:] = np.nan  # fine in the prompts (and as padding), not in what is said after them
  params = params | {"embed": {"embedding": jnp.asarray(table)}}
  engine = engine_lib.Engine(model, params, CFG)
  two = dataclasses.replace(GREEDY, max_new_tokens=2)
  uids = [engine.add(engine_lib.Request(prompt, two)) for prompt in ([1, 2], [3, 1])]
  engine.fill()
  failed = []
  for _ in range(10):
    try:
      engine.step()
    except engine_lib.RequestError as error:
      assert "non-finite" in str(error)
      failed.append(error.id)
  assert sorted(failed) == uids and not engine.has_work


def test_parameters_of_another_model_are_refused(mup):
  other = small.make(vocab_size=40, num_layers=1)[1]
  with pytest.raises(ValueError, match=r"^params: found an embedding of \[40, 16\], expected \[61"):
    engine_lib.Engine(mup[0], other, CFG)
  drafter = chain.ChainDrafter(mup[0])
  for draft_params, found in ((other, r"\[40, 16\]"), ((), "none")):
    with pytest.raises(ValueError, match=f"^draft_params: found an embedding of {found}, exp"):
      engine_lib.Engine(*mup, CFG, drafter=drafter, draft_params=draft_params)


def test_parameters_in_the_boxes_of_init_are_taken():
  model, params = small.make()
  boxed = model.init(jax.random.key(0), tokens_BT=jnp.zeros((1, 2), jnp.int32))["params"]
  expected = engine_lib.Engine(model, nn.unbox(boxed), CFG).generate(PROMPTS[:1], GREEDY).tokens
  assert engine_lib.Engine(model, boxed, CFG).generate(PROMPTS[:1], GREEDY).tokens == expected


def test_a_cache_smaller_than_the_tree_is_refused(mup):
  cfg = dataclasses.replace(CFG, capacity=8)
  with pytest.raises(ValueError, match="capacity: found 8 tokens, expected more than the 8 nodes"):
    engine_lib.Engine(*mup, cfg, drafter=ngram.NGramDrafter())


@pytest.mark.parametrize("rounds, is_drafted", [(1, False), (3, True)])
def test_top_logprobs_are_those_of_full_forwards(rounds, is_drafted):
  """Best first, of every token of the answer, the prefill's included; the other row has none."""
  model, params = small.make()
  cfg = config.EngineConfig(
    capacity=96, max_batch=2, chunk_size=16, min_span=128, rounds_per_dispatch=rounds
  )
  more = {}
  if is_drafted:
    more = dict(drafter=chain.ChainDrafter(model, num_levels=3), draft_params=params)
  engine = engine_lib.Engine(model, params, cfg, **more)
  prompt = [3, 1, 4, 1, 5, 9, 2, 6]
  sampling = config.SamplingConfig(temperature=0.9, max_new_tokens=12, seed=3)
  out = engine.collect(
    [
      engine_lib.Request(prompt, sampling, want_logprobs=True, num_top_logprobs=5),
      engine_lib.Request([7, 1], sampling, want_logprobs=True),
    ]
  )
  assert [len(x) for x in out.top_logprobs] == [12, 0]
  logits = small.full_logits(model, params, prompt + out.tokens[0])[len(prompt) - 1 : -1]
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for top, row in zip(out.top_logprobs[0], logp, strict=True):
    assert [i for i, _ in top] == np.argsort(-row, kind="stable")[:5].tolist()
    np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:5], atol=1e-4)
  for fields in ({"num_top_logprobs": 2}, {"want_logprobs": True, "num_top_logprobs": 21}):
    with pytest.raises(ValueError, match="num_top_logprobs: found"):
      engine.add(engine_lib.Request(prompt, sampling, **fields))
