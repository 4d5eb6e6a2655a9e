"""Constraints in the engine: greedy against full forwards, drafts against none, schemas hold."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import constrained, engine
from minicpm_jax.infer.drafters import ngram
from tests.infer import constrained_cases

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
SIZES = config.EngineConfig(capacity=512, max_batch=4, chunk_size=64, min_span=512)
SCHEMA = {
  "type": "object",
  "properties": {
    "names": {"type": "array", "items": {"enum": ["aa", "ab", "ba"]}, "maxItems": 5},
    "n": {"type": "integer", "minimum": 0, "maximum": 999},
  },
  "required": ["names", "n"],
  "additionalProperties": False,
}


@pytest.fixture(scope="module")
def decode(tiny_engine_parts):
  """decode(compiler's constraints, sampling, seeds, drafter) -> token lists, stats."""
  engines = {}

  def run(constraints, sampling, drafter=None):
    if drafter not in engines:
      engines[drafter] = engine.Engine(*tiny_engine_parts, SIZES, drafter=drafter, stop_ids=(257,))
    prompts = [[256, *b"names: aa ab"[: 6 + i]] for i in range(len(constraints))]
    requests = [
      engine.Request(prompt, sampling, (), constraint)
      for prompt, constraint in zip(prompts, constraints, strict=True)
    ]
    return prompts, engines[drafter].collect(requests)

  return run


@pytest.fixture(scope="module")
def compiler(tiny_engine_parts):
  from tests.infer.conftest import ByteTokenizer

  return constrained.GrammarCompiler(ByteTokenizer(), 260, stop_ids=(257,))


def test_greedy_tokens_are_the_best_allowed_ones_of_full_forwards(
  tiny_engine_parts, decode, compiler
):
  model, params = tiny_engine_parts
  forward = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT).logits)
  sampling = config.SamplingConfig(max_new_tokens=60)
  prompts, out = decode([compiler.json_schema(SCHEMA, compact=True)], sampling)
  ids, reference = list(prompts[0]), compiler.json_schema(SCHEMA, compact=True)
  for token in out.tokens[0]:
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(ids)] = ids
    logits_V = np.asarray(forward(jnp.asarray(padded))[0, len(ids) - 1])
    assert token == int(np.argmax(np.where(reference.allowed(), logits_V, -np.inf)))
    assert reference.consume(token)
    ids.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_drafts_the_constrained_tokens_are_those_without(decode, compiler, temperature):
  sampling = config.SamplingConfig(temperature=temperature, max_new_tokens=120, seed=5, top_k=200)
  make = [
    lambda: compiler.json_schema(SCHEMA),
    lambda: compiler.regex("(ab ){10,20}"),
    lambda: compiler.choice(["abab" * 8, "aaaa" * 8]),
    lambda: None,
  ]
  plain = decode([m() for m in make], sampling)[1]
  drafted = decode([m() for m in make], sampling, ngram.NGramDrafter(num_levels=4, min_match=1))[1]
  assert drafted.tokens == plain.tokens and drafted.finish_reason == plain.finish_reason
  assert plain.finish_reason[:3] == ["stop"] * 3
  assert max(s.mean_accepted for s in drafted.stats) > 1.2  # drafts were taken
  assert all(s.mean_accepted == 1.0 for s in plain.stats)
  value = json.loads(bytes(t for t in plain.tokens[0] if t < 256))
  jsonschema.validate(value, SCHEMA)


def test_finished_answers_under_random_schemas_validate(decode, compiler):
  rng = np.random.default_rng(11)
  schemas = [constrained_cases.random_schema(rng) for _ in range(12)]
  sampling = config.SamplingConfig(temperature=1.0, max_new_tokens=300)
  num_finished = 0
  for first in range(0, 12, 4):
    part = schemas[first : first + 4]
    _, out = decode([compiler.json_schema(s, compact=True) for s in part], sampling)
    for schema, tokens, reason in zip(part, out.tokens, out.finish_reason, strict=True):
      if reason == "stop":
        num_finished += 1
        text = bytes(t for t in tokens if t < 256).decode()
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
  assert num_finished >= 6
