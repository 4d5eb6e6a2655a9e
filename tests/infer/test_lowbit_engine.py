"""Decoding on packed codes: the tokens of the model whose kernels are the dequantised floats."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import engine, generate, rounds
from minicpm_jax.models import convert, transformer
from minicpm_jax.quant import qtensor
from tests.models import common

SAMPLING = config.SamplingConfig(max_new_tokens=12, temperature=0.8, seed=3)
PROMPT = [5, 17, 200, 3, 99]


def lowbit(scheme, size):
  cfg, params = common.config(), common.build(common.config())[1]
  cfg = dataclasses.replace(cfg, quant=config.QuantConfig(scheme=scheme, group_size=size))
  return convert.to_codes(cfg, params)


@pytest.mark.parametrize(
  "scheme, size, num_rows", [("int8", -1, 1), ("int8", -1, 4), ("int4", 16, 1), ("ternary", -1, 1)]
)
def test_tokens_are_those_of_the_dequantised_model(scheme, size, num_rows):
  cfg, codes = lowbit(scheme, size)
  model, params = generate.for_decoding(transformer.Transformer(cfg), codes, num_rows)
  kernel = params["layers_0"]["mlp"]["gate_up"]["kernel"]
  is_by_output = num_rows > 1 and jax.default_backend() == "cpu"
  assert (kernel.is_by_output, kernel.is_packed) == (is_by_output, not is_by_output)
  plain_cfg, plain = convert.fuse(cfg, codes)
  other = generate.for_decoding(transformer.Transformer(plain_cfg), plain)
  assert not qtensor.is_qtensor(other[1]["layers_0"]["mlp"]["gate_up"]["kernel"])
  found = generate.generate(model, params, [PROMPT], SAMPLING)
  expected = generate.generate(*other, [PROMPT], SAMPLING)
  assert found.tokens == expected.tokens
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("scheme, size", [("int4", 16), ("ternary", -1)])
def test_rounded_inputs_are_those_of_training_with_them(scheme, size):
  """act_bits on codes, decoded row by row, against the latent model that rounds."""
  quant = config.QuantConfig(scheme=scheme, group_size=size, act_bits=8)
  cfg, params = common.config(), common.build(common.config())[1]
  latent_cfg = dataclasses.replace(cfg, quant=quant)
  codes_cfg, codes = convert.to_codes(latent_cfg, params, "packed")
  assert codes_cfg.quant.act_bits == 8
  model, codes = generate.for_decoding(transformer.Transformer(codes_cfg), codes)
  greedy = config.SamplingConfig(max_new_tokens=6)
  found = generate.generate(model, codes, [PROMPT], greedy)
  latent = transformer.Transformer(latent_cfg)
  tokens, forward = [*PROMPT, *found.tokens[0]], jax.jit(latent.apply)
  logits = forward({"params": params}, np.asarray([tokens])).logits[0, len(PROMPT) - 1 : -1]
  assert found.tokens[0] == logits.argmax(axis=-1).tolist()
  expected = jax.nn.log_softmax(logits)[np.arange(6), np.asarray(found.tokens[0])]
  np.testing.assert_allclose(found.logprobs[0], expected, atol=1e-3)
  off = dataclasses.replace(codes_cfg.quant, act_bits=None)
  plain = dataclasses.replace(model.cfg, quant=off)
  other = generate.generate(transformer.Transformer(plain), codes, [PROMPT], greedy)
  assert np.abs(np.subtract(found.logprobs[0][:1], other.logprobs[0][:1])).max() > 1e-4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for few rows is the CPU's")
def test_unpacked_codes_do_not_travel_through_the_loop():
  """XLA moves what a loop does not change in front of it: unpacked codes as integers or floats."""
  model, params = generate.for_decoding(*_decoder("int4", 16))
  eng = engine.Engine(model, params, config.EngineConfig(capacity=32, rounds_per_dispatch=2))
  lowered = rounds.run.lower(model, eng.drafter, eng.params, eng._state, span=48, rounds=2)
  loops = [line for line in lowered.compile().as_text().splitlines() if " while(" in line]
  carried = {
    (kind, math.prod(map(int, dims.split(","))))
    for line in loops
    for kind, dims in re.findall(r"\b(f32|s32|u32|u8)\[([\d,]+)\]", line.split(" while(")[0])
  }
  codes = [k.codes for k in jax.tree.leaves(params, is_leaf=qtensor.is_qtensor) if _is_low(k)]
  assert {("u8", c.size) for c in codes} <= carried
  slices = {c.size // (16 // 2) for c in codes}  # one byte of every block, as the sum reads it
  assert not {(kind, n) for kind, n in carried if kind in ("s32", "u32") and n in slices}


def _decoder(scheme, size):
  cfg, codes = lowbit(scheme, size)
  return transformer.Transformer(cfg), codes


def _is_low(leaf):
  return qtensor.is_qtensor(leaf)
