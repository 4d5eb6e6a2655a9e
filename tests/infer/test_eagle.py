"""EAGLE drafters: tokens of plain decoding, trees of a beam search, caches of a prefill."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base, eagle, eagle3, mtp
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer
from tests.infer import small

V, D = small.VOCAB, 16
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 1, 8], list(range(20, 60))]
SAMPLINGS = [
  config.SamplingConfig(),
  config.SamplingConfig(temperature=0.7, top_k=20, seed=1),
  config.SamplingConfig(temperature=1.2, top_p=0.9, min_p=0.05, seed=2),
  config.SamplingConfig(temperature=0.7, repetition_penalty=1.2, seed=3),
]
CFG = config.EngineConfig(capacity=96, max_batch=2, chunk_size=16, min_span=128)
SIZES = dict(num_levels=3, top_k=4, num_nodes=12)


@pytest.fixture(scope="module")
def target():
  return small.almost_bigram()


def make_draft(target, kind, seed=0, **changes):
  """Random; `minicpm` and `eagle` get an fc that passes the embedding on: the target's bigrams."""
  model, params = target
  cfg = draft_lib.for_target(model.cfg, kind, **changes)
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    small_branch = path.endswith(("o/kernel", "down/kernel"))
    x = path.endswith("scale") + rng.normal(size=leaf.shape) * (0.03 if small_branch else 0.3)
    if path == "fc/kernel" and kind != "eagle3":
      scale = 1.0 if kind == "minicpm" else 0.08
      x = np.concatenate((scale * np.diag(params["final_norm"]["scale"]), np.zeros((D, D))))
    return jnp.asarray(x, jnp.float32)

  weights = trees.map_with_path(fill, draft_lib.abstract_params(cfg)[0])
  ids = np.arange(5, 45, dtype=np.int32) if "draft_vocab_size" in changes else None
  return draft_lib.Draft(cfg, weights, ids)


def drafters(target):
  model, params = target
  fr_ids = np.random.default_rng(9).permutation(V)[:50]
  return {
    "eagle_ring": eagle.make(make_draft(target, "eagle", window_size=7), *target, **SIZES),
    "minicpm_fr": eagle.make(make_draft(target, "minicpm"), *target, fr_ids=fr_ids, **SIZES),
    "eagle3": eagle3.make(make_draft(target, "eagle3", draft_vocab_size=40), *target, **SIZES),
    "mtp_chain": mtp.make(*target, num_levels=4, top_k=1, num_nodes=5),
  }


@pytest.fixture(scope="module")
def plain(target):
  return run(engine_lib.Engine(*target, CFG))


def run(engine):
  requests = [
    engine_lib.Request(p, dataclasses.replace(s, max_new_tokens=24))
    for p, s in zip(PROMPTS, SAMPLINGS, strict=True)
  ]
  return engine.collect(requests)


@pytest.mark.parametrize(
  "name", ["eagle_ring", "minicpm_fr", "eagle3", pytest.param("mtp_chain", marks=pytest.mark.slow)]
)
def test_tokens_equal_plain_decoding(target, plain, name):
  drafter, draft_params = drafters(target)[name]
  engine = engine_lib.Engine(*target, CFG, drafter=drafter, draft_params=draft_params)
  found = run(engine)
  assert found.tokens == plain.tokens
  accepted = [n for stats in found.stats for n in stats.accepted]
  assert max(accepted) > 1, "nothing was ever accepted: the test shows nothing"
  if name == "minicpm_fr":
    assert np.mean(accepted) > 1.3
  if name != "eagle3" and name != "mtp_chain":
    return
  # The draft's cache after the rounds is that of one pass over the true tokens.
  state = engine._state
  uid = engine.add(engine_lib.Request(PROMPTS[3], config.SamplingConfig(max_new_tokens=9)))
  tokens = list(PROMPTS[3])
  while engine.has_work:
    tokens += [t for event in engine.step() if event.id == uid for t in event.tokens]
  row = next(i for i, r in enumerate(engine._rows) if r.held[: len(PROMPTS[3])] == PROMPTS[3])
  state, length = engine._state, int(engine._state.cache.length[row])
  model, params = target
  forward = jax.jit(lambda p, ids: model.apply({"params": p}, ids, tap_layers=drafter.tap_layers))
  out = forward(params, jnp.asarray([tokens[:length]]))
  features = out.taps if drafter.tap_layers else out.hidden
  e = model.cfg.scale_emb * params["embed"]["embedding"][jnp.asarray([tokens[1 : length + 1]])]
  empty = draft_lib.init_cache(drafter.cfg, 1, state.draft.cache.positions_BR.shape[1])
  args = (empty, e, features, jnp.arange(length)[None], jnp.ones((1, length), bool))
  hidden, cache = jax.jit(draft_lib.extend, static_argnums=0)(
    drafter.cfg, draft_params["model"], *args
  )
  assert length >= 47
  np.testing.assert_array_equal(state.draft.cache.positions_BR[row, :length], np.arange(length))
  for found_kv, expected_kv in zip(
    (*state.draft.cache.k, *state.draft.cache.v), (*cache.k, *cache.v), strict=True
  ):
    np.testing.assert_allclose(found_kv[row, :length], expected_kv[0, :length], atol=1e-4)
  np.testing.assert_allclose(state.draft.feature_BD[row], hidden[0, -1], atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("minicpm", marks=pytest.mark.slow), "eagle3"])
def test_tree_equals_a_beam_search_over_single_paths(target, kind):
  """Every path is run through the draft alone, behind the committed rows: no scratch, no masks."""
  changes = {"draft_vocab_size": 40} if kind == "eagle3" else {}
  draft = make_draft(target, kind, seed=4, **changes)
  weights = trees.map_with_path(lambda p, x: x * (1 if "scale" in p else 1.5), draft.params)
  draft = dataclasses.replace(draft, params=weights)
  drafter, draft_params = eagle.make(draft, *target, **SIZES)
  params = base.Params(target[1], draft_params)
  cfg, model, rng = drafter.cfg, draft_lib.DraftModel(drafter.cfg), np.random.default_rng(0)
  tokens = rng.integers(0, V, 10)
  new = base.Committed(
    tokens_BT=jnp.asarray(tokens[None, :9]),
    next_BT=jnp.asarray(tokens[None, 1:]),
    features_BTD=jnp.asarray(rng.normal(size=(1, 9, cfg.feature_dim)), jnp.float32),
    start_B=jnp.zeros(1, jnp.int32),
    num_B=jnp.full((1,), 9, jnp.int32),
  )
  state = jax.jit(drafter.commit)(params, drafter.init_state(target[0], params, 1, 32), new)
  root, length = jnp.asarray(tokens[9:], jnp.int32), jnp.full((1,), 9, jnp.int32)
  tree, _ = jax.jit(drafter.draft)(params, state, root, length)

  ids = np.arange(V) if draft.ids is None else draft.ids
  table = target[1]["embed"]["embedding"] * target[0].cfg.scale_emb
  head = target[1]["lm_head"]["kernel"]
  committed = (draft_lib.cached(state.cache), state.cache.positions_BR[:, None, :] >= 0)

  @jax.jit
  def outputs(path_1n, features_1nD):
    n = path_1n.shape[1]
    positions = 9 + jnp.arange(n)[None]
    past = (committed[0], jnp.broadcast_to(committed[1], (1, n, 32)))
    args = (
      jnp.take(table, path_1n, axis=0),
      features_1nD,
      draft_lib.position_tables(cfg, positions),
    )
    own = jnp.tril(jnp.ones((1, n, n), bool))
    return model.apply({"params": draft.params}, *args, (past,), own)[0]

  logits_of = jax.jit(lambda x: model.apply({"params": draft.params}, x, head, method="logits"))

  def log_probs(path):
    """log p over the head's rows after a path of tokens below the root."""
    features = [state.feature_BD]
    for n in range(1, len(path) + 1):
      out = outputs(jnp.asarray([path[:n]]), jnp.stack(features, 1))
      features.append(out[:, -1])
    logits = np.asarray(logits_of(features[-1][:, None])[0, 0], np.float64)
    return logits - np.log(np.sum(np.exp(logits)))

  beam, candidates = [((), 0.0)], {}
  for _ in range(3):
    grown = []
    for path, score in beam:
      p = log_probs(list(path))
      for row in np.argsort(-p, kind="stable")[:4]:
        grown.append(((*path, int(ids[row])), score + p[row]))
    candidates |= dict(grown)
    beam = sorted(grown, key=lambda item: -item[1])[:4]
  expected = set(sorted(candidates, key=lambda path: -candidates[path])[:11])

  found = set()
  for node in range(1, 12):
    path = np.flatnonzero(np.asarray(tree.anc_BPP[0, node]))
    path = sorted(path, key=lambda j: int(tree.depth_BP[0, j]))
    found.add(tuple(int(tree.tok_BP[0, j]) for j in path[1:]))
  assert found == expected
  assert max(map(len, expected)) >= 2
  assert int(tree.tok_BP[0, 0]) == tokens[9]


def test_fr_head_with_all_ids_permuted_draws_the_same_trees(target):
  draft = make_draft(target, "minicpm", seed=2)
  permuted = np.random.default_rng(1).permutation(V)
  sets = []
  for fr_ids in (None, permuted):
    drafter, draft_params = eagle.make(draft, *target, fr_ids=fr_ids, **SIZES)
    params = base.Params(target[1], draft_params)
    drafter.check(target[0], params)
    state = drafter.init_state(target[0], params, 2, 16)
    state = state.replace(
      feature_BD=jnp.asarray(np.random.default_rng(5).normal(size=(2, D)), jnp.float32)
    )
    tree, _ = jax.jit(drafter.draft)(params, state, jnp.array([1, 2]), jnp.array([0, 0]))
    tok, parent = np.asarray(tree.tok_BP), np.asarray(tree.parent_BP)
    sets.append([{(t, tok[b, p]) for t, p in zip(tok[b], parent[b], strict=True)} for b in (0, 1)])
  assert sets[0] == sets[1]


def refusals():
  def wide(target):
    cfg = dataclasses.replace(target[0].cfg, model_dim=24)
    return make_draft(target, "minicpm"), (transformer.Transformer(cfg), target[1]), {}

  def ids(target):
    return make_draft(target, "minicpm"), target, {"fr_ids": [1, V]}

  def eagle3_fr(target):
    return make_draft(target, "eagle3", draft_vocab_size=40), target, {"fr_ids": [1, 2]}

  def lost(target):
    draft = make_draft(target, "minicpm")
    params = {name: x for name, x in draft.params.items() if name != "fc"}
    return dataclasses.replace(draft, params=params), target, {}

  def big(target):
    return make_draft(target, "minicpm"), target, {"num_nodes": 65}

  def few(target):
    return make_draft(target, "minicpm"), target, {"fr_ids": [1, 2]}

  def no_ids(target):
    draft = make_draft(target, "eagle3", draft_vocab_size=40)
    return dataclasses.replace(draft, ids=None), target, {}

  return [
    (wide, "draft.layer.model_dim: found 16, expected the target's 24"),
    (ids, "found id 61, expected 0..60"),
    (eagle3_fr, "fr_ids: found a list"),
    (lost, "draft params: fc/kernel: found none"),
    (big, "num_nodes: found 65"),
    (few, "top_k: found 4, expected at most the head's 2"),
    (no_ids, "draft ids: found none"),
  ]


@pytest.mark.parametrize("case, match", refusals(), ids=lambda x: getattr(x, "__name__", ""))
def test_drafts_that_do_not_fit_are_refused(target, case, match):
  draft, (model, params), changes = case(target)
  with pytest.raises(ValueError, match=match):
    drafter, draft_params = eagle.make(draft, model, params, **SIZES | changes)
    engine_lib.Engine(model, params, CFG, drafter=drafter, draft_params=draft_params)
