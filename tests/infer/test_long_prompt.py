"""A prompt of 32k tokens through the sparse path of the engine, with bounded memory."""

import resource

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from tests.infer import small

LENGTH = 32_768


@pytest.mark.slow
def test_32k_tokens_on_a_cpu():
  """The released geometry (blocks of 64, 96 selected, dense below 8192); chunks of 512.

  T x S scores of one head alone would take 4 GB. The first token is that of one forward without
  a cache.
  """
  model, params = small.make(
    sparse=config.SparseAttentionConfig(lse="coarse"), num_layers=1, max_position=2 * LENGTH
  )
  prompt = np.random.default_rng(3).integers(0, small.VOCAB, LENGTH).tolist()
  cfg = config.EngineConfig(capacity=LENGTH + 64, min_span=LENGTH + 128)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  engine = engine_lib.Engine(model, params, cfg)
  out = engine.generate([prompt], config.SamplingConfig(max_new_tokens=4), want_logprobs=True)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < 1.5e6, f"peak memory grew by {grown / 1e6:.2f} GB"
  run = jax.jit(lambda p, t: model.apply({"params": p}, t, return_logits=False).hidden[:, -1:])
  hidden = run(params, np.asarray([prompt], np.int32))
  logits_V = model.apply({"params": params}, hidden, method="unembed")[0, 0]
  logprobs_V = np.asarray(jax.nn.log_softmax(logits_V))
  assert out.tokens[0][0] == int(np.argmax(logprobs_V))
  assert out.logprobs[0][0] == pytest.approx(float(logprobs_V.max()), abs=1e-4)
