"""A prompt of 32k tokens through the sparse path of the engine, with bounded memory."""

import resource

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import rounds
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


def test_a_sparse_prompt_compiles_one_prefill(monkeypatch):
  """All chunks of 16 read one span, that of the whole prompt; a dense one's spans double."""
  model, params = small.make(sparse=small.SPARSE, attention="xla")
  whole = config.EngineConfig(capacity=136, max_batch=1, chunk_size=128, min_span=256)
  chunked = config.EngineConfig(capacity=136, max_batch=1, chunk_size=16, min_span=16)
  prompt = np.random.default_rng(1).integers(0, small.VOCAB, 96).tolist()
  sampling = config.SamplingConfig(max_new_tokens=6)
  expected = engine_lib.Engine(model, params, whole).generate([prompt], sampling)
  call, spans = engine_lib.Engine._call, []

  def counted(self, function, *args, **static):
    if function is rounds.prefill:
      spans.append(static["span"])
    return call(self, function, *args, **static)

  monkeypatch.setattr(engine_lib.Engine, "_call", counted)
  found = engine_lib.Engine(model, params, chunked).generate([prompt], sampling, want_logprobs=True)
  assert found.tokens == expected.tokens
  assert len(spans) == 6 and set(spans) == {128}
  spans.clear()
  engine_lib.Engine(*small.make(), chunked).generate([prompt], sampling)
  assert spans == [16, 32, 64, 64, 128, 128]
