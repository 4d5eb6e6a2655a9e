"""BiTA: candidates against float64 numpy, output equality, files; see also test_speculation."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt, config
from minicpm_jax.core import trees
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base, bita, chain, hierarchical
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import transformer
from tests.infer import bita_cases, small
from tests.models import common

CFG = config.EngineConfig(capacity=96, max_batch=2, chunk_size=16, min_span=256)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 1, 8] * 7]


def draft_of(model, **sizes):
  cfg = bita_lib.for_target(model.cfg, **sizes)
  return bita_lib.Bita(cfg, bita_cases.params_of(cfg, seed=4))


@pytest.mark.parametrize("is_scanned", [False, True])
def test_candidates_are_those_of_the_masks_behind_the_last_accepted_node(is_scanned):
  """After every round: width best of mask 1, one less of mask 2, of mask 3 (float64 numpy)."""
  model, params = small.make(scan_layers=is_scanned)
  draft = draft_of(model, num_prompts=4)
  drafter, weights = bita.make(draft, model, params)
  engine = engine_lib.Engine(model, params, CFG, drafter=drafter, draft_params=weights)
  assert (drafter.num_nodes, base.num_rows(drafter)) == (13, 52)
  engine.add(engine_lib.Request(PROMPTS[0], config.SamplingConfig(max_new_tokens=12)))
  tokens, num_checked = list(PROMPTS[0]), 0
  while engine.has_work:
    for event in engine.step():
      tokens += event.tokens
    if engine._pending or len(tokens) < len(PROMPTS[0]) + 2:
      continue
    # All that was dispatched has been read: the state is behind tokens[:-1], the last is the root.
    found = np.asarray(engine.draft_state.tok_BC)[0]
    masks = bita_cases.after(model.cfg, params, draft.params, tokens[:-1])[1:]
    best = [np.argsort(-row, kind="stable")[: 5 - i] for i, row in enumerate(masks)]
    assert found.tolist() == np.concatenate(best).tolist()
    num_checked += 1
  assert num_checked >= 1


def test_masks_change_nothing_of_the_nodes_and_nodes_are_those_of_plain_forwards():
  """One verification of 52 rows against a chain of tokens without any mask token."""
  model, params = small.make()
  draft = draft_of(model)
  drafter, weights = bita.make(draft, model, params)
  full = base.Params(params, weights)
  state = bita.State(jnp.asarray(np.arange(12)[None] % 7 + 20, jnp.int32))
  tree, _ = drafter.draft(full, state, jnp.asarray([5], jnp.int32), jnp.asarray([0], jnp.int32))
  assert tree.parent_BP[0].tolist() == [0] * 6 + [1] * 4 + [6] * 3
  assert tree.depth_BP[0].tolist() == [0] + [1] * 5 + [2] * 4 + [3] * 3
  rows = drafter.ride(full, tree)
  from minicpm_jax.models import cache as cache_lib

  cache = cache_lib.init(model.cfg, 1, 128, per_row=True)
  prompt = jnp.asarray([PROMPTS[1]], jnp.int32)
  cache = common.apply(model, params, prompt, cache=cache).cache
  out = common.apply(
    model,
    params,
    jnp.pad(tree.tok_BP, ((0, 0), (0, 39))),
    cache=cache,
    step=cache_lib.Step(anc_BTT=rows.anc_BRR, depth_BT=rows.depth_BR),
    ahead=rows.ahead,
  )
  for node in range(13):
    path = [j for j in range(13) if bool(tree.anc_BPP[0, node, j])]
    text = PROMPTS[1] + [int(tree.tok_BP[0, j]) for j in path]
    expected = bita_cases.after(model.cfg, params, draft.params, text)
    at = [node, *range(13 + 3 * node, 16 + 3 * node)]
    np.testing.assert_allclose(out.logits[0, np.asarray(at)], expected, atol=1e-4)


def test_tokens_equal_plain_sampling():
  """Rows of unequal length; some drafts are right. Sparse targets are in test_matrix."""
  model, params = small.make()
  drafter, weights = bita.make(draft_of(model), model, params)
  engine = engine_lib.Engine(model, params, CFG, drafter=drafter, draft_params=weights)
  plain = engine_lib.Engine(model, params, CFG)
  accepted = []
  for sampling in (
    config.SamplingConfig(max_new_tokens=64, repetition_penalty=1.2),
    config.SamplingConfig(max_new_tokens=64, temperature=0.8, seed=2),
  ):
    found = engine.generate(PROMPTS, sampling)
    assert found.tokens == plain.generate(PROMPTS, sampling).tokens
    accepted.append(max(n for stats in found.stats for n in stats.accepted))
  assert min(accepted) > 1, accepted


def test_files_come_back_bit_for_bit(tmp_path):
  model, params = small.make()
  draft = draft_of(model, num_masks=2, num_prompts=5)
  ckpt.save_bita(tmp_path / "bita", draft)
  ckpt.save_bita(tmp_path / "bita", draft)  # in place
  found = ckpt.load_bita(tmp_path / "bita", model.cfg)
  assert found.cfg == draft.cfg
  for path, leaf in trees.flatten_paths(draft.params).items():
    np.testing.assert_array_equal(trees.flatten_paths(found.params)[path], leaf)
  other = small.replace(model, num_layers=3)
  with pytest.raises(ckpt.errors.ConfigError, match="num_layers: found 2, expected the target's 3"):
    ckpt.load_bita(tmp_path / "bita", other.cfg)
  with pytest.raises(FileNotFoundError, match="found no such folder"):
    ckpt.load_bita(tmp_path / "none", model.cfg)
  raw = json.loads((tmp_path / "bita" / "config.json").read_text())
  for change, match in (
    ({"num_masks": 4}, "mask_embeddings: found \\(2, 16\\), expected \\(4, 16\\)"),
    ({"num_prompts": "x"}, "num_prompts: found 'x', expected a number"),
    ({"model_type": "llama"}, "model_type: found 'llama', expected 'bita'"),
  ):
    (tmp_path / "bita" / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ckpt.errors.CheckpointError, match=match):
      ckpt.load_bita(tmp_path / "bita", model.cfg)


def test_what_does_not_fit_is_refused():
  model, params = small.make()
  draft = draft_of(model)
  with pytest.raises(ValueError, match=r"width: found 7 with 3 masks \(76 rows\), .* most 64"):
    bita.make(draft, model, params, width=7)
  with pytest.raises(ValueError, match="width: found 2 with 3 masks"):
    bita.make(draft, model, params, width=2)
  other, other_params = small.make(model_dim=24)
  with pytest.raises(ValueError, match="model_dim: found 16, expected the target's 24"):
    bita.make(draft, other, other_params)
  drafter, weights = bita.make(draft, model, params)
  wrong = weights | {"masks": {"embedding": weights["masks"]["embedding"][:2]}}
  with pytest.raises(ValueError, match=r"masks/embedding: found \[2, 16\], expected \[3, 16\]"):
    engine_lib.Engine(model, params, CFG, drafter=drafter, draft_params=wrong)
  small_cache = config.EngineConfig(capacity=52)
  with pytest.raises(ValueError, match="found 52 tokens, expected more than the 52 nodes"):
    engine_lib.Engine(model, params, small_cache, drafter=drafter, draft_params=weights)
  with pytest.raises(ValueError, match="bita: found a target with latent attention"):
    bita_lib.for_target(transformer.Transformer(_mla()).cfg)
  with pytest.raises(ValueError, match="inner drafter: found one with mask tokens"):
    engine_lib.Engine(
      model,
      params,
      CFG,
      drafter=hierarchical.HierarchicalDrafter(model, drafter, 2),
      draft_params=(params, weights),
    )
  assert base.num_rows(chain.ChainDrafter(model)) == 5


def _mla():
  from minicpm_jax.models import zoo

  return zoo.minicpm3_4b()
