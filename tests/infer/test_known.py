"""What the host knows of the rows: the same tokens without a branch on the device (a GPU waits)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate, rounds, rows
from minicpm_jax.infer import state as state_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import qtensor, tree
from tests.infer import small
from tests.models import common

CFG = config.EngineConfig(capacity=72, max_batch=1, chunk_size=64, min_span=128)
GREEDY = config.SamplingConfig(max_new_tokens=12)
DRAWN = config.SamplingConfig(temperature=1.1, max_new_tokens=12, seed=4)
# The first crosses dense_len 24 while it decodes, the second is beyond it from its prompt on.
PROMPTS = [list(range(3, 21)), list(range(20, 59))]


@dataclasses.dataclass(frozen=True)
class Counting(base.NoDrafter):
  """Proposes the numbers behind the root."""

  num_nodes: int = 3
  num_levels: int = 2

  def draft(self, params, state, root_B, length_B):
    tokens_BP = root_B[:, None] + jnp.arange(3, dtype=jnp.int32)[None, :]
    return base.chain(tokens_BP % small.VOCAB), state


DRAFTERS = {"plain": base.NoDrafter(), "tree": Counting()}


@pytest.fixture(scope="module")
def sparse():
  return small.make(sparse=small.SPARSE, attention="xla")


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "tree"])
def test_tokens_are_those_of_a_device_that_asks(sparse, name):
  requests = [engine_lib.Request(PROMPTS[0], GREEDY, want_logprobs=True)]
  requests += [engine_lib.Request(PROMPTS[1], DRAWN)]
  found = []
  for tells in (False, True):
    engine = engine_lib.Engine(*sparse, CFG, drafter=DRAFTERS[name])
    engine.tells = tells
    found.append(engine.collect(requests))
  assert found[0].tokens == found[1].tokens
  np.testing.assert_allclose(found[0].logprobs[0], found[1].logprobs[0], atol=1e-5)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_round_that_knows_has_no_branch_on_a_gpu(sparse, name, monkeypatch):
  """Lowered here under the backend's name: branches and loops as they are for a GPU."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  (model, params), drafter = sparse, DRAFTERS[name]
  params = base.Params(params, ())
  state = state_lib.init_state(model, drafter, params, 1, 80)  # more than any span
  found = {}
  for known, span in ((rounds.Known(True, True), 64), (rounds.Known(True), 16), (None, 64)):
    more = {} if known is None else {"known": known}
    traced = rounds.run.trace(model, drafter, params, state, span=span, rounds=1, **more)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found[known] = text.count("stablehlo.case")
    assert "stablehlo.while" not in text
  # Below dense_len (span 16) nothing is to be decided; without knowledge: the switch of both layers
  # and the options of sampling.
  assert list(found.values())[:2] == [0, 0] and found[None] >= 5


def test_the_decoding_form_on_a_gpu_gives_equal_logits(monkeypatch):
  model, params = small.make(model_dim=32, mlp_dim=64)
  quant = config.QuantConfig(scheme="int4", group_size=32, weights="packed", scale_dtype="f16")
  tokens = np.arange(6, dtype=np.int32)[None]
  cfg, stacked = convert.stack_layers(model.cfg, params)
  for quantised in (False, True):
    model = transformer.Transformer(cfg)
    given = tree.quantize_params(quant, stacked) if quantised else stacked
    model = small.replace(model, quant=quant) if quantised else model
    with monkeypatch.context() as patch:
      patch.setattr(jax, "default_backend", lambda: "gpu")
      fast, fast_params = generate.for_decoding(model, given)
    assert not fast.cfg.scan_layers and "qkv" in fast_params["layers_0"]["attn"]
    kernel = fast_params["layers_0"]["attn"]["qkv"]["kernel"]
    assert qtensor.is_qtensor(kernel) == quantised
    assert not quantised or (kernel.scale.dtype == jnp.float32 and kernel.is_packed)
    slow, out = (
      common.apply(m, p, tokens).logits for m, p in ((model, given), (fast, fast_params))
    )
    np.testing.assert_allclose(out, slow, atol=1e-4)


def test_caches_have_whole_slots_on_a_gpu():
  """A span that is no multiple of 1024 made XLA for GPUs copy the values."""
  assert rows.slots_of(5000, 1, "cpu") == 5000 and rows.slots_of(5000, 64, "cpu") == 5056
  assert rows.slots_of(5000, 64, "gpu") == 5120 and rows.slots_of(5120, 1, "gpu") == 5120
