"""Speculative output equals plain output token for token, whatever the drafter (inference.md 5)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base, chain, ngram
from tests.infer import small

CFG = config.EngineConfig(capacity=96, max_batch=2, chunk_size=16, min_span=128)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8] * 7]
FILTERS = {
  "none": {},
  "top_k": dict(top_k=20),
  "top_p": dict(top_p=0.9),
  "min_p": dict(min_p=0.05),
  "penalty": dict(repetition_penalty=1.2),
}


@dataclasses.dataclass(frozen=True)
class Garbage:
  """Trees of random shape and tokens; also checks what it is told of the committed tokens."""

  num_nodes: int = 9
  num_levels: int = 4
  tap_layers: tuple[int, ...] = (1,)
  reuses_prefix: bool = True

  def check(self, model: Any, params: Any) -> None:
    pass

  def init_state(self, model: Any, params: Any, batch_size: int, capacity: int) -> Any:
    return jnp.zeros((batch_size,), jnp.int32)

  def prefill(self, params: Any, state: Any, new: base.Committed) -> Any:
    return state.at[new.row].set(new.start_B[0] + new.num_B[0])

  def draft(self, params: Any, state: Any, root_B: Any, length_B: Any) -> Any:
    def one(root, length):
      key = jax.random.fold_in(jax.random.key(0), root * 1000 + length)
      draws = jax.random.uniform(key, (2, self.num_nodes))
      parent, depth = [jnp.int32(0)], [jnp.int32(0)]
      for node in range(1, self.num_nodes):
        wanted = (draws[0, node] * node).astype(jnp.int32)
        wanted = jnp.where(jnp.stack(depth)[wanted] < self.num_levels, wanted, 0)
        parent.append(wanted)
        depth.append(jnp.stack(depth)[wanted] + 1)
      tok = (draws[1] * 8).astype(jnp.int32).at[0].set(root)
      parent, depth = jnp.stack(parent), jnp.stack(depth)
      return tok, parent, depth, tree_lib.ancestors(parent, self.num_levels)

    return base.Tree(*jax.vmap(one)(root_B, length_B)), state

  def commit(self, params: Any, state: Any, new: base.Committed) -> Any:
    return state + new.num_B

  def copy_row(self, state: Any, source: Any, target: Any) -> Any:
    return base.copy_rows(state, source, target)


def drafters():
  """(drafter, its params) by name; "self" is the target as its own draft: all is accepted."""
  other, other_params = small.make(num_layers=1)
  model, params = small.make()
  return {
    "ngram": (ngram.NGramDrafter(num_levels=3, num_chains=2, min_match=1), ()),
    "chain": (chain.ChainDrafter(other, num_levels=3), other_params),
    "self": (chain.ChainDrafter(model, num_levels=4), params),
    "garbage": (Garbage(), ()),
  }


SLOW = pytest.mark.slow
PAIRS = [  # every pair of (drafter, filter), (drafter, temperature), (filter, temperature), target
  ("ngram", 0.0, "penalty", "sparse"),
  ("ngram", 1.2, "top_p", "dense"),
  ("chain", 0.0, "none", "dense"),
  ("chain", 1.2, "top_k", "sparse"),
  ("self", 0.7, "none", "dense"),
  ("garbage", 1.2, "none", "sparse"),
  pytest.param("ngram", 0.7, "min_p", "dense", marks=SLOW),
  pytest.param("chain", 0.7, "penalty", "dense", marks=SLOW),
  pytest.param("self", 0.0, "none", "sparse", marks=SLOW),
  pytest.param("self", 1.2, "penalty", "dense", marks=SLOW),
  pytest.param("garbage", 0.7, "top_k", "dense", marks=SLOW),
  pytest.param("garbage", 0.0, "penalty", "sparse", marks=SLOW),
]


def target_of(name):
  return small.make(**(dict(sparse=small.SPARSE) if name == "sparse" else {}))


_PLAIN = {}


def plain_tokens(target, sampling, seeds):
  key = (target, sampling)
  if key not in _PLAIN:
    _PLAIN[key] = [
      engine_lib.Engine(*target_of(target), CFG).generate(
        PROMPTS, dataclasses.replace(sampling, seed=seed)
      )
      for seed in seeds
    ]
  return [out.tokens for out in _PLAIN[key]]


@pytest.mark.parametrize("drafter, temperature, filter_, target", PAIRS)
def test_tokens_equal_plain_sampling(drafter, temperature, filter_, target):
  """64 tokens, two rows of unequal length, two keys; the sparse target crosses its dense_len."""
  made, draft_params = drafters()[drafter]
  sampling = config.SamplingConfig(temperature=temperature, max_new_tokens=64, **FILTERS[filter_])
  engine = engine_lib.Engine(*target_of(target), CFG, drafter=made, draft_params=draft_params)
  accepted = []
  for seed, expected in zip((1, 2), plain_tokens(target, sampling, (1, 2)), strict=True):
    out = engine.generate(PROMPTS, dataclasses.replace(sampling, seed=seed))
    assert out.tokens == expected
    accepted += itertools.chain.from_iterable(s.accepted for s in out.stats)
  if drafter != "garbage" or temperature > 0:
    assert max(accepted) > 1  # something was accepted, or the test says nothing


@pytest.mark.parametrize("rounds", [1, 5])
def test_stop_ids_and_limits_cut_inside_an_accepted_path(rounds):
  made, draft_params = drafters()["self"]
  cfg = dataclasses.replace(CFG, rounds_per_dispatch=rounds)
  engine = engine_lib.Engine(*small.make(), cfg, drafter=made, draft_params=draft_params)
  sampling = config.SamplingConfig(max_new_tokens=40)
  out = engine.generate(PROMPTS, sampling)
  assert min(s.mean_accepted for s in out.stats) > 4  # its own draft: all is accepted
  whole = engine_lib.Engine(*small.make(), CFG).generate(PROMPTS, sampling).tokens
  assert out.tokens == whole
  for num in (1, 2, 6, 8, 9):
    out = engine.generate(PROMPTS, dataclasses.replace(sampling, max_new_tokens=num))
    assert out.tokens == [row[:num] for row in whole]
    stop = whole[0][num]
    out = engine.generate(PROMPTS, sampling, stop_ids=[stop])
    assert out.tokens[0] == whole[0][: whole[0].index(stop) + 1]
    assert out.finish_reason[0] == "stop"


@pytest.mark.parametrize("name", ["ngram", "self"])
def test_a_cached_prefix_changes_nothing_but_the_work(name):
  made, draft_params = drafters()[name]
  cfg = dataclasses.replace(CFG, min_prefix=8)
  engine = engine_lib.Engine(*small.make(), cfg, drafter=made, draft_params=draft_params)
  fresh = engine_lib.Engine(*small.make(), dataclasses.replace(CFG, min_prefix=-1))
  sampling = config.SamplingConfig(temperature=0.9, max_new_tokens=12)
  start = list(range(20, 52))
  first = engine.generate([start], sampling)
  prompts = [start + first.tokens[0] + [5, 6], start + [9] * 3, start[:20] + [1]]
  assert first.tokens == fresh.generate([start], sampling).tokens
  out = engine.generate(prompts, sampling)
  assert out.tokens == fresh.generate(prompts, sampling).tokens
  assert [s.cached_tokens for s in out.stats] == [42, 31, 19]


def test_ngram_repeats_what_followed():
  drafter = ngram.NGramDrafter(num_levels=4, num_chains=2, min_match=2)
  ids = np.zeros((1, 32), np.int32)
  text = [1, 2, 3, 10, 11, 12, 13, 14, 2, 3, 20, 21, 5, 1, 2]
  ids[0, : len(text)] = text
  state = ngram.State(ids_BS=jnp.asarray(ids))
  draft = lambda text: drafter.draft(  # noqa: E731
    base.Params(None, None), state, jnp.asarray([3], jnp.int32), jnp.asarray([len(text)])
  )
  tree, _ = draft(text)
  # "1 2 3" matches three tokens at the start; "2 3" goes on with 20.
  assert tree.tok_BP.tolist() == [[3, 10, 11, 12, 13, 20, 21, 5, 1]]
  assert tree.parent_BP.tolist() == [[0, 0, 1, 2, 3, 0, 5, 6, 7]]
  tree, _ = draft(text[:12])  # ... 20 21 | 3: the pair was never said
  assert tree.tok_BP.tolist() == [[3] + [base.CUT] * 8]


def test_ngram_goes_round_where_the_match_runs_into_the_present():
  drafter = ngram.NGramDrafter(num_levels=5, min_match=2)
  text = [9, 9, 4, 5, 4, 5, 4]
  ids = jnp.asarray(text + [0] * 9, jnp.int32)[None]
  args = (jnp.asarray([5], jnp.int32), jnp.asarray([len(text)], jnp.int32))
  tree, _ = drafter.draft(base.Params(None, None), ngram.State(ids_BS=ids), *args)
  assert tree.tok_BP.tolist() == [[5, 4, 5, 4, 5, 4]]


def test_drafts_that_do_not_fit_are_refused():
  other, other_params = small.make(vocab_size=50)
  with pytest.raises(ValueError, match="found a vocabulary of 50, expected the target's 61"):
    engine_lib.Engine(
      *small.make(), CFG, drafter=chain.ChainDrafter(other), draft_params=other_params
    )
  with pytest.raises(ValueError, match="found 65 tree nodes, expected 1..64"):
    ngram.NGramDrafter(num_levels=16, num_chains=4)
  with pytest.raises(ValueError, match="min_match: found 5, expected 1..4"):
    ngram.NGramDrafter(min_match=5)


@pytest.mark.parametrize("selection, most", [("joint", 16), ("split", 8)])
def test_paths_beyond_the_local_window_are_refused(selection, most):
  """In the worst place a plain step still selects the block of the path's first token."""
  sparse = dataclasses.replace(small.SPARSE, selection=selection)
  size, blocks = sparse.block_size, sparse.window_size // sparse.block_size
  first_local = lambda pos: pos // size - blocks + (selection == "split")  # noqa: E731
  reach = lambda depth: all(  # noqa: E731
    first_local(start + depth) <= start // size for start in range(5 * size)
  )
  assert reach(most) and not reach(most + 1)
  base.check_window(sparse, most)
  model, params = small.make(sparse=sparse)
  drafter = ngram.NGramDrafter(num_levels=most + 1)
  with pytest.raises(ValueError, match=f"num_levels: found {most + 1}, expected at most {most}"):
    engine_lib.Engine(model, params, CFG, drafter=drafter)
  short = dataclasses.replace(CFG, capacity=sparse.dense_len - 1)  # stays dense
  engine_lib.Engine(model, params, short, drafter=drafter)


@pytest.mark.parametrize("shrinks", [False, True])
def test_rows_that_wait_keep_the_draft_of_a_copied_beginning(shrinks):
  """The draft is the target, so it is right in every round, unless its cache was written over while
  prompts that begin alike waited beside a row that decodes."""
  model, params = small.make()
  cfg = config.EngineConfig(
    capacity=96, max_batch=4, chunk_size=16, min_span=128, min_prefix=4, shrinks=shrinks
  )
  drafter = chain.ChainDrafter(model, num_levels=3)
  engine = engine_lib.Engine(model, params, cfg, drafter=drafter, draft_params=params)
  beginning = [(7 * i) % small.VOCAB for i in range(40)]
  engine.generate([beginning], config.SamplingConfig(max_new_tokens=8))
  greedy = config.SamplingConfig(max_new_tokens=40)
  engine.add(engine_lib.Request([3, 1, 4], greedy))
  engine.step()
  for i in range(3):
    engine.add(engine_lib.Request([*beginning[: 30 - i], 50 + i, *range(20)], greedy))
  stats = {}
  while engine.has_work:
    stats |= {event.id: event.stats for event in engine.step() if event.finish_reason}
  assert [s.cached_tokens for s in stats.values()] == [0, 29, 28, 27]
  assert all(set(s.accepted[:-1]) == {4} for s in stats.values())
