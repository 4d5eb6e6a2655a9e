"""Requests that the chat service refuses: status, field and message of the error body."""

import pytest

from minicpm_jax import config
from minicpm_jax.infer.server import schemas
from tests.infer.server.scripted import HELLO, TOOLS


def nested(levels):
  """A schema of lists of lists, `levels` objects deep below response_format."""
  schema = {"type": "integer"}
  for _ in range(levels - 3):
    schema = {"type": "array", "items": schema}
  return {"type": "json_schema", "json_schema": {"schema": schema}}


def test_a_body_of_a_hundred_levels_is_read():
  body = HELLO | {"response_format": nested(99)}
  assert schemas.parse_chat(body, config.ServerConfig()).options.format.kind == "json_schema"


@pytest.mark.parametrize(
  "fields, param, message",
  [
    ({"messages": []}, "messages", "messages: found none"),
    ({"messages": "hi"}, "messages", "messages: found 'hi', expected list"),
    (
      {"messages": [{"role": "robot", "content": ""}]},
      "messages",
      r"messages\[0\].role: found 'robot'",
    ),
    ({"messages": [{"role": "user"}]}, "messages", r"messages\[0\].content: found None"),
    ({"messages": [1]}, "messages", r"messages\[0\].role"),
    (
      {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
      "messages",
      r"messages\[0\].content\[0\]: found",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", r"content\[0\]: found 'x'"),
    (
      {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
      "messages",
      r"content: found \[{'type': 'image_url', .*expected a part of text",
    ),
    (
      {"messages": [{"role": "user", "content": [{"type": "picture"}]}]},
      "messages",
      r"content\[0\]: found {'type': 'picture'}, expected a part of text",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "tool_calls: found"),
    (
      {"messages": [{"role": "assistant", "tool_calls": 5}]},
      "messages",
      "calls: found 5, exp",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "half a surrogate pair"),
    ({"tools": [{"\ud800": 1}]}, None, "half a surrogate pair"),
    ({"response_format": nested(100)}, None, "body: found more than 100 levels of nesting"),
    ({"temperature": 2.5}, "temperature", r"temperature: found 2.5, expected 0.0..2.0"),
    ({"temperature": "hot"}, "temperature", "expected float"),
    ({"temperature": float("nan")}, "temperature", "expected a finite number"),
    ({"top_p": 0}, "top_p", "top_p: found 0.0"),
    ({"min_p": 1.01}, "min_p", "min_p: found 1.01"),
    ({"max_tokens": 0}, "max_tokens", r"expected 1..65536"),
    ({"max_tokens": True}, "max_tokens", "expected int"),
    ({"max_tokens": 65537}, "max_tokens", r"expected 1..65536"),
    ({"n": 17}, "n", "n: found 17, expected 1..16"),
    ({"n": 0}, "n", "n: found 0, expected 1..16"),
    ({"logit_bias": {"1": 5}}, "logit_bias", "only {} is supported"),
    ({"top_logprobs": 3}, "logprobs", "found without logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "expected 0..20"),
    ({"best_of": 2}, "best_of", "only 1 is supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "only 0 is supported"),
    ({"bogus": 1}, "bogus", "bogus: unknown field"),
    ({"stop": [""]}, "stop", "stop: found"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stream": "yes"}, "stream", "expected bool"),
    ({"stream_options": {"x": 1}}, "x", "unknown field"),
    ({"tools": [{"type": "x"}]}, "tools", r"tools\[0\]"),
    ({"tool_choice": "required"}, "tool_choice", "found without tools"),
    (
      {"tools": TOOLS, "tool_choice": "x"},
      "tool_choice",
      "expected auto, none, required or one of",
    ),
    ({"response_format": {"type": "xml"}}, "response_format", "found 'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "schema: found None"),
    ({"grammar": {"regex": 1}}, "grammar", "grammar: found"),
    ({"grammar": "a", "response_format": {"type": "json_object"}}, None, "found several"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "expected dict"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "found 'messages', which"),
    ({"chat_template_kwargs": {"eos_token": ""}}, "chat_template_kwargs", "found 'eos_token'"),
  ],
)
def test_malformed_requests_are_400_with_the_field_and_the_service_goes_on(
  make, fields, param, message
):
  chat, _ = make("ok")
  with pytest.raises(schemas.ApiError, match=message) as caught:
    chat.chat(HELLO | fields)
  assert caught.value.status == 400 and caught.value.param == param
  error = caught.value.body()["error"]
  assert error["type"] == "invalid_request_error" and error["message"]
  assert chat.chat(HELLO)["choices"][0]["message"]["content"] == "ok"
  assert chat.report()["requests_rejected"] == 1


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"grammar": "start: x"}, 'unknown name: "x"'),
    ({"grammar": {"regex": "(("}}, "unclosed group"),
    (
      {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
      "json_schema: Invalid type: foo",
    ),
  ],
)
def test_bad_grammars_are_400(make, fields, message):
  pytest.importorskip("llguidance")
  chat, _ = make("ok")
  with pytest.raises(schemas.ApiError, match=message) as caught:
    chat.chat(HELLO | fields)
  assert caught.value.status == 400 and caught.value.code == "invalid_grammar"


@pytest.mark.parametrize(
  "prompt, message",
  [
    (None, "prompt: found None"),
    ([], "prompt: found a list"),
    (["a", "b"], "prompt: found a list"),
    ([1, 999], r"ids outside 0\.\.259"),
    ([-1], "ids outside"),
    ("x" * 700, "prompt: found 701 tokens, expected at most 599"),
  ],
)
def test_bad_prompts_are_400(make, prompt, message):
  chat, _ = make("ok")
  with pytest.raises(schemas.ApiError, match=message) as caught:
    chat.completion({"prompt": prompt})
  assert caught.value.status == 400


def test_a_template_that_refuses_is_400(make):
  chat, _ = make("ok", template="{{ raise_exception('no system turns') }}")
  with pytest.raises(schemas.ApiError, match="no system turns"):
    chat.chat(HELLO)


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff", b"[" * 100_000, b""])
def test_bodies_that_are_no_json_object(data):
  with pytest.raises(schemas.ApiError, match="body: "):
    schemas.read_json(data)
