"""A conversation with a small random model over bytes: what the model is asked, what comes back."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.infer import chat as chat_lib
from minicpm_jax.infer import generate
from minicpm_jax.models import transformer

TEMPLATE = (
  "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
  "{% if add_generation_prompt %}[a]{% endif %}"
)
SAMPLING = config.SamplingConfig(temperature=1.0, max_new_tokens=12, seed=3)


def make_cfg(**fields):
  small = dict(vocab_size=260, model_dim=16, mlp_dim=16, num_layers=1, num_heads=2)
  small |= dict(num_kv_heads=1, head_dim=8, max_position=96, stop_ids=(257,))
  return config.ModelConfig(**(small | fields))


@pytest.fixture(scope="module")
def model_and_params():
  model = transformer.Transformer(make_cfg())
  shapes, _ = transformer.abstract_params(model)
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2 + (x.ndim == 1), x.dtype), shapes
  )


@pytest.mark.smoke
def test_an_answer_is_the_decoded_tokens_of_the_rendered_conversation(
  model_and_params, byte_tokenizer
):
  tok = byte_tokenizer(chat_template=TEMPLATE)
  chat = chat_lib.Chat(*model_and_params, tok, sampling=SAMPLING, system="S")
  answer = chat.say("hi")
  prompt = [256, *b"[s]S[u]hi[a]"]
  expected = generate.generate(
    *generate.for_decoding(*model_and_params), [prompt], SAMPLING, stop_ids=(257, 259)
  )
  assert answer == tok.decode(expected.tokens[0])
  assert chat.stats.prompt_tokens == len(prompt)
  assert chat.stats.new_tokens == len(expected.tokens[0])
  assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
  assert chat.messages[-1]["content"] == answer
  chat.reset()
  assert chat.messages == [{"role": "system", "content": "S"}]
  assert chat.say("hi") == answer


def test_donated_weights_are_held_once(byte_tokenizer):
  """By jax's own list of arrays; what both forms share lives on, and the answer is the same."""
  model = transformer.Transformer(make_cfg(num_layers=3, mlp_dim=256))
  params = transformer.init_params(model, jax.random.key(0))

  def held(donate):
    given = jax.tree.map(jnp.copy, params)
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    tok = byte_tokenizer(chat_template=TEMPLATE)
    chat = chat_lib.Chat(model, given, tok, sampling=SAMPLING, donate=donate)
    gc.collect()
    more = sum(x.nbytes for x in jax.live_arrays()) - before
    return more, chat.say("hi"), given

  size = sum(x.nbytes for x in jax.tree.leaves(params))
  both, expected, given = held(False)
  assert not any(x.is_deleted() for x in jax.tree.leaves(given))
  own, answer, given = held(True)
  assert answer == expected
  assert abs(own) < 0.01 * size < 0.3 * size < both  # as much as there was before
  assert given["layers"]["mlp"]["up"]["kernel"].is_deleted()


def test_donated_weights_may_lie_at_two_places():
  model = transformer.Transformer(make_cfg(num_layers=2, scan_layers=False))
  params = transformer.init_params(model, jax.random.key(0))
  one = jnp.ones((model.cfg.model_dim,), jnp.bfloat16)
  given = jax.tree.map(lambda x: one if x.shape == one.shape else x.astype(one.dtype), params)
  expected = generate.for_decoding(model, jax.tree.map(jnp.copy, given))[1]
  found = generate.for_decoding(model, given, donate=True)[1]
  assert one.is_deleted()
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_second_turn_sees_the_first(model_and_params, byte_tokenizer, monkeypatch):
  seen = []

  def record(model, params, prompts, sampling, **kwargs):
    seen.append(bytes(prompts[0][1:]))
    tokens_BR = np.array([[*"né".encode(), 259]])
    yield generate.Chunk(
      tokens_BR=tokens_BR, logprobs_BR=np.zeros((1, 4)), seconds=0.5, compile_seconds=0.0
    )

  monkeypatch.setattr(generate, "stream", record)
  chat = chat_lib.Chat(*model_and_params, byte_tokenizer(chat_template=TEMPLATE))
  assert list(chat.stream("a")) == ["né"]
  assert chat.say("b") == "né"
  assert seen == [b"[u]a[a]", "[u]a[a]né[u]b[a]".encode()]


def test_a_stop_string_ends_the_answer(model_and_params, byte_tokenizer):
  tok = byte_tokenizer(chat_template=TEMPLATE)
  answer = chat_lib.Chat(*model_and_params, tok, sampling=SAMPLING).say("hi")
  assert len(answer) > 5
  chat = chat_lib.Chat(*model_and_params, tok, sampling=SAMPLING, stop=[answer[3:5]])
  assert chat.say("hi") == answer[: answer.index(answer[3:5])]
  assert chat.messages[-1]["content"] == answer[: answer.index(answer[3:5])]


def test_a_closed_stream_keeps_what_was_said(model_and_params, byte_tokenizer):
  chat = chat_lib.Chat(*model_and_params, byte_tokenizer(chat_template=TEMPLATE), sampling=SAMPLING)
  pieces = chat.stream("hi")
  first = next(pieces)
  pieces.close()
  assert chat.messages[-1] == {"role": "assistant", "content": first}


def test_an_answer_ends_at_max_position_and_a_full_conversation_is_refused(
  model_and_params, byte_tokenizer
):
  tok = byte_tokenizer(chat_template=TEMPLATE)
  chat = chat_lib.Chat(*model_and_params, tok, sampling=SAMPLING)
  chat.say("x" * (96 - 7 - 5))  # bos + [u] + [a] are 7 tokens
  assert chat.stats.new_tokens <= 5
  chat.reset()
  with pytest.raises(ValueError, match="found 97 tokens, expected fewer than max_position 96"):
    chat.say("x" * 90)
  assert chat.messages == []


def test_template_comes_from_the_tokenizer_then_from_the_family(byte_tokenizer):
  from minicpm_jax.text import templates

  cfg, llama = make_cfg(), make_cfg(arch="llama")
  assert chat_lib.template_for(cfg, byte_tokenizer(chat_template=TEMPLATE)) == TEMPLATE
  assert chat_lib.template_for(cfg, byte_tokenizer()) == templates.CHATML
  assert chat_lib.template_for(llama, byte_tokenizer()) == templates.CHATML
  five = make_cfg(arch="llama", vocab_size=130560)
  assert chat_lib.template_for(five, byte_tokenizer()) == templates.MINICPM5
  plain = byte_tokenizer()
  plain.special_tokens = {"<s>": 256, "</s>": 257}
  assert chat_lib.template_for(cfg, plain) == templates.MINICPM2
  with pytest.raises(ValueError, match="chat template: found none"):
    chat_lib.template_for(llama, plain)


def test_stop_ids_are_those_of_config_tokenizer_and_chatml(byte_tokenizer):
  assert chat_lib.stop_ids(make_cfg(stop_ids=(7, 257)), byte_tokenizer()) == (7, 257, 259)


def test_a_model_without_a_tokenizer_is_refused(model_and_params):
  with pytest.raises(ValueError, match="tok: found None"):
    chat_lib.Chat(*model_and_params, None)


def test_rates_leave_compilation_and_the_first_token_out():
  stats = chat_lib.Stats(prompt_tokens=40)
  zeros = np.zeros((1, 1))
  for seconds, compile_seconds in ((2.0, 9.0), (0.5, 5.0), (0.5, 0.0)):
    stats.add(
      generate.Chunk(
        tokens_BR=zeros, logprobs_BR=zeros, seconds=seconds, compile_seconds=compile_seconds
      )
    )
  expected = "40 prompt tokens, prefill 20.0 tok/s, 3 new tokens, decode 2.0 tok/s, "
  assert stats.line() == expected + "compilation 14.0 s"
