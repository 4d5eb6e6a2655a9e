"""tune_tree: replayed accept lengths are those of real decoding; the rule by hand."""

import re

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate, tune
from minicpm_jax.infer.drafters import base, mtp, ngram
from tests.infer import small


@pytest.fixture(scope="module")
def pair():
  """A target whose branches are small, and its MTP module, which is then sometimes right."""
  model, params = small.make(tie_embeddings=False, mtp=config.MTPConfig())
  params = trees.map_with_path(
    lambda path, x: 0.1 * x if path.endswith(("o/kernel", "down/kernel")) else x, params
  )
  proj = np.concatenate((np.zeros((16, 16)), np.diag(params["final_norm"]["scale"])))
  params = params | {"mtp": params["mtp"] | {"proj": {"kernel": np.float32(proj)}}}
  return model, params


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replayed_accept_lengths_are_those_of_decoding(pair, temperature):
  model, params = pair
  drafter, draft_params = mtp.make(model, params, num_levels=2, top_k=3, num_nodes=3)
  drafters = tune.sizes_for(drafter, (4, 8, 12, 60))
  assert list(drafters) == [4, 8, 12]
  prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]]
  sampling = config.SamplingConfig(temperature=temperature, max_new_tokens=24, seed=4)
  cfg = config.EngineConfig(capacity=64, chunk_size=16, min_span=128)
  texts, expected = None, {}
  for n, made in drafters.items():
    engine = engine_lib.Engine(model, params, cfg, drafter=made, draft_params=draft_params)
    out = engine.generate(prompts, sampling)
    texts = [[*p, *t] for p, t in zip(prompts, out.tokens, strict=True)]
    expected[n] = np.mean([a for s in out.stats for a in s.accepted])
  both = base.Params(params, draft_params)
  found = tune.accept_lengths(model, both, drafters, texts, [len(p) for p in prompts])
  assert found == pytest.approx(expected)
  assert 1 < found[4] <= found[8] <= found[12]


def test_the_rule_by_hand():
  """tau T_t / (T_d + T_v): 8 nodes 2.0 * 10 / (1 + 11) = 1.667, 32 nodes 2.6 * 10 / (1 + 20)."""
  rows = tune.costs({1: 10.0, 8: 11.0, 32: 20.0}, {8: 1.0, 32: 1.0}, {8: 2.0, 32: 2.6})
  assert [r.speedup for r in rows] == pytest.approx([1.0, 20 / 12, 26 / 21])
  assert tune.best(rows).num_nodes == 8
  slow = tune.costs({1: 10.0, 8: 30.0}, {8: 1.0}, {8: 2.0})
  assert tune.best(slow).num_nodes == 1  # speculation does not pay: plain decoding
  for verify, draft, match in (
    ({8: 3.0}, {8: 1.0}, r"verify_ms: found no time of \[1\] nodes"),
    ({1: 1.0, 8: 3.0}, {}, r"draft_ms: found no time of \[8\] nodes"),
    ({1: 1.0, 8: 0.0}, {8: 0.0}, "verify_ms: found 0 for 8 nodes"),
  ):
    with pytest.raises(ValueError, match=match):
      tune.costs(verify, draft, {8: 2.0})
  with pytest.raises(ValueError, match="rows: found none"):
    tune.best([])


def test_times_are_measured_for_every_size(pair):
  model, params = pair
  drafter, draft_params = mtp.make(model, params, num_levels=2, top_k=3, num_nodes=3)
  drafters = tune.sizes_for(drafter, (4, 8))
  verify, draft = tune.measure(
    model, base.Params(params, draft_params), drafters, length=16, repeats=1
  )
  assert set(verify) == {1, 4, 8} and set(draft) == {4, 8}
  assert min([*verify.values(), *draft.values()]) > 0


def test_timed_step_copies_no_cache(pair, monkeypatch):
  """A round of the engine moves the path in place; what is timed for it must as well."""
  model, params = generate.for_decoding(*pair, num_rows=4)
  texts, jit = [], jax.jit

  def spying(function, **options):
    jitted = jit(function, **options)

    def call(*args):
      texts.append(jitted.lower(*args).compile().as_text())
      return jitted(*args)

    return call

  monkeypatch.setattr(tune.jax, "jit", spying)
  run = tune._verify_step(model, params, 4, 16)
  monkeypatch.undo()
  run()
  cfg = model.cfg
  cache = f"1,{16 + base.MAX_NODES},{cfg.num_kv_heads},{cfg.head_dim}"
  assert f"[{cache}]" in texts[0]
  assert not re.findall(rf"= f32\[{cache}\]\S* copy\(", texts[0])


def test_bad_input(pair):
  model, params = pair
  drafter, draft_params = mtp.make(model, params, num_levels=2, top_k=3, num_nodes=3)
  with pytest.raises(ValueError, match="found NGramDrafter, whose tree has one size"):
    tune.sizes_for(ngram.NGramDrafter())
  with pytest.raises(ValueError, match=r"sizes: found \(2, 60\), expected one in 3..13"):
    tune.sizes_for(drafter, (2, 60))
  with pytest.raises(ValueError, match="num_prompt: found 3 for a text of 4 tokens"):
    tune.accept_lengths(
      model, base.Params(params, draft_params), tune.sizes_for(drafter), [[1, 2, 3, 4]], [3]
    )
