"""Requests behind prefix tokens: those of an engine whose prompts spell the tokens out."""

import dataclasses

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.deploy import prefix
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import ngram
from minicpm_jax.models import convert
from tests.models import common


def test_tokens_are_those_of_the_spelled_out_prompts():
  model, params = common.build(common.config("minicpm4_0p5b", num_layers=2))
  cfg, params = convert.unstack_layers(model.cfg, params)
  model = model.clone(cfg=cfg)
  before = prefix.key_values(model, params, (7, 1))
  sizes = config.EngineConfig(max_batch=2, capacity=48, chunk_size=16)
  prompts = [[5, 9, 11], [12, 13, 5, 9, 200], [5, 9, 11, 30], [5, 9, 11, 31]]  # rows used again
  sampling = config.SamplingConfig(max_new_tokens=6, temperature=0.0)
  found = engine_lib.Engine(model, params, sizes, before=before).generate(prompts, sampling)
  plain = engine_lib.Engine(model, params, sizes)
  wanted = plain.generate([[7, 1, *p] for p in prompts], sampling)
  assert found.tokens == wanted.tokens
  assert found.tokens != plain.generate(prompts, sampling).tokens  # the prefix matters
  assert [s.prompt_tokens for s in found.stats] == [3, 5, 4, 4]
  # The stored rows are used, not computed again: other values give other tokens.
  other = before.replace(v=np.asarray(before.v) + 1)
  changed = engine_lib.Engine(model, params, sizes, before=other).generate(prompts, sampling)
  assert changed.tokens != wanted.tokens
  with pytest.raises(ValueError, match="before: found a drafter"):
    engine_lib.Engine(model, params, sizes, before=before, drafter=ngram.NGramDrafter())
  long = common.config("minicpm4_0p5b", num_layers=2, rope="longrope", scan_layers=False)
  with pytest.raises(ValueError, match="before: found rope.kind 'longrope'"):
    long_model = model.clone(cfg=dataclasses.replace(long))
    engine_lib.Engine(long_model, params, sizes, before=before)
