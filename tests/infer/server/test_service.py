"""The chat service without sockets, on a scripted engine: text, ends, tools, bounds, failures."""

import json
import threading
import time

import pytest

from minicpm_jax import config
from minicpm_jax.infer.server import schemas, service
from tests.infer.server import scripted
from tests.infer.server.scripted import HELLO, TOOLS


def text_of(chunks):
  return "".join(
    choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
  )


def stalled(event):
  """A script that says nothing until `event` is set, then "ok"."""

  def script(request):
    left = scripted.bytewise("ok")
    while left:
      yield left.pop(0) if event.wait(0.01) else []

  return script


# --- Text -------------------------------------------------------------------------------------


def test_a_chat_answer_has_openais_form_and_counts_tokens(make):
  chat, engine = make("né!")
  out = chat.chat(HELLO | {"model": "whatever", "temperature": 0.5, "seed": -1})
  assert out["object"] == "chat.completion" and out["model"] == "tiny"
  assert out["id"].startswith("chatcmpl-")
  (choice,) = out["choices"]
  assert choice == {
    "index": 0,
    "message": {"role": "assistant", "content": "né!", "refusal": None},
    "finish_reason": "stop",
    "logprobs": None,
  }
  prompt = [256, *b"[u]hi[a]"]
  assert engine.requests[0].prompt == prompt
  assert out["usage"]["prompt_tokens"] == len(prompt)
  assert out["usage"]["completion_tokens"] == 5  # n, two bytes of é, !, the end
  assert out["usage"]["total_tokens"] == len(prompt) + 5
  assert engine.requests[0].sampling.temperature == 0.5
  assert engine.requests[0].sampling.seed == 2**31 - 1
  assert engine.requests[0].sampling.max_new_tokens == 1024


def test_finish_reason_length_counts_tokens(make):
  chat, _ = make("éééé")
  out = chat.chat(HELLO | {"max_tokens": 4})
  assert out["choices"][0]["finish_reason"] == "length"
  assert out["choices"][0]["message"]["content"] == "éé"
  assert out["usage"]["completion_tokens"] == 4
  assert chat.chat(HELLO | {"max_completion_tokens": 9})["choices"][0]["finish_reason"] == "stop"


def test_a_stream_has_a_role_pieces_a_finish_and_usage_on_request(make):
  chat, _ = make("aé語🙂")
  chunks = list(chat.stream("chat", HELLO | {"stream": True}))
  assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
  pieces = [c["choices"][0]["delta"].get("content") for c in chunks[1:-1]]
  assert pieces == ["a", "é", "語", "🙂"]  # whole characters, nothing twice
  assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop"}
  assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-1])
  assert len({c["id"] for c in chunks}) == 1 and "usage" not in chunks[-1]
  options = {"stream": True, "stream_options": {"include_usage": True}}
  *rest, last = chat.stream("chat", HELLO | options)
  assert last["choices"] == [] and last["usage"]["completion_tokens"] == 11
  assert rest[-1]["choices"][0]["finish_reason"] == "stop" and rest[-1]["usage"] is None


def test_the_text_of_the_last_token_is_not_lost_and_assistant_is_no_magic_word(make):
  """Two of CPM.cu's defects: the last piece dropped, answers cut at "Assistant:"."""
  chat, _ = make(lambda _: [[*b"Assistant: a"], [*b" last", 257]])
  out = chat.chat(HELLO)
  assert out["choices"][0]["message"]["content"] == "Assistant: a last"
  assert text_of(chat.stream("chat", HELLO | {"stream": True})) == "Assistant: a last"


def test_stop_strings_cut_text_across_tokens_and_end_the_engines_work(make):
  chat, engine = make(lambda _: [[*b"one E"], [*b"ND"], [*b"O two"], [*b" three"], [257]])
  chunks = list(chat.stream("chat", HELLO | {"stream": True, "stop": ["ENDO", "zzz"]}))
  assert text_of(chunks) == "one "
  assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
  assert engine.cancelled == [1]
  out = chat.chat(HELLO | {"stop": "ND"})
  assert out["choices"][0]["message"]["content"] == "one E"
  assert out["usage"]["completion_tokens"] == 7  # tokens up to the stop string
  # The letters of a stop string by themselves end nothing (CPM.cu stops at any of its tokens).
  out = chat.chat(HELLO | {"stop": ["DNE"]})
  assert out["choices"][0]["message"]["content"] == "one ENDO two three"


def test_logprobs_are_those_of_the_tokens_in_the_text(make):
  chat, _ = make(lambda _: [[*b"ab"], [*b"cXY"], [*b"d", 257]])
  out = chat.chat(HELLO | {"logprobs": True, "stop": "XY"})
  content = out["choices"][0]["logprobs"]["content"]
  assert [c["token"] for c in content] == ["a", "b", "c"]
  assert [c["logprob"] for c in content] == [-0.97, -0.98, -0.99]
  assert content[0]["bytes"] == [97] and content[0]["top_logprobs"] == []
  chunks = list(chat.stream("chat", HELLO | {"logprobs": True, "stream": True}))
  streamed = [
    t["token"]
    for c in chunks
    for t in ((c["choices"][0].get("logprobs") or {}).get("content") or [])
  ]
  assert streamed == list("abcXYd")
  out = chat.completion({"prompt": "x", "logprobs": 0})
  assert out["choices"][0]["logprobs"] == {
    "tokens": list("abcXYd"),
    "token_logprobs": [-ord(c) / 100 for c in "abcXYd"],
    "top_logprobs": None,
    "text_offset": [0, 1, 2, 3, 4, 5],
  }


def test_top_logprobs_stand_beside_the_tokens_of_the_answer(make):
  """The scripted engine says that a token's neighbour is twice as unlikely as itself."""
  chat, engine = make(lambda _: [[*b"ab"], [*b"c", 257]])
  out = chat.chat(HELLO | {"logprobs": True, "top_logprobs": 2})
  first, *_ = content = out["choices"][0]["logprobs"]["content"]
  assert first["top_logprobs"] == [
    {"token": "a", "logprob": -0.97, "bytes": [97]},
    {"token": "b", "logprob": -1.94, "bytes": [98]},
  ]
  assert [len(c["top_logprobs"]) for c in content] == [2, 2, 2]
  assert engine.requests[0].num_top_logprobs == 2 and engine.requests[0].want_logprobs
  out = chat.completion({"prompt": "x", "logprobs": 1})["choices"][0]["logprobs"]
  assert out["top_logprobs"] == [{"a": -0.97}, {"b": -0.98}, {"c": -0.99}]
  chunks = chat.stream("chat", HELLO | {"logprobs": True, "top_logprobs": 1, "stream": True})
  found = [
    t["top_logprobs"][0]["token"]
    for c in chunks
    for t in ((c["choices"][0].get("logprobs") or {}).get("content") or [])
  ]
  assert found == list("abc")


def test_n_choices_have_noise_of_their_own_and_one_usage(make):
  chat, engine = make(lambda r: scripted.bytewise("ab" * (r.sampling.seed - 6)), max_batch=2)
  body = HELLO | {"n": 3, "seed": 7}
  out = chat.chat(body)
  assert [c["index"] for c in out["choices"]] == [0, 1, 2]
  assert [c["message"]["content"] for c in out["choices"]] == ["ab", "abab", "ababab"]
  assert [c["finish_reason"] for c in out["choices"]] == ["stop"] * 3
  assert out["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
  assert out["usage"]["completion_tokens"] == 3 + 5 + 7
  streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
  *rest, last = chat.stream("chat", streamed)
  assert last["choices"] == [] and last["usage"]["completion_tokens"] == 15
  assert all(c["usage"] is None for c in rest)
  texts, ends = [""] * 3, []
  for chunk in rest:
    (choice,) = chunk["choices"]
    texts[choice["index"]] += choice["delta"].get("content") or ""
    ends += [choice["index"]] if choice["finish_reason"] else []
  assert texts == ["ab", "abab", "ababab"] and sorted(ends) == [0, 1, 2]
  out = chat.completion({"prompt": "x", "n": 2, "seed": 7, "logprobs": 0})
  assert [c["logprobs"]["text_offset"] for c in out["choices"]] == [[0, 1], [0, 1, 2, 3]]


def test_choices_that_the_queue_cannot_hold_are_refused_and_a_failure_ends_all(make):
  stop = threading.Event()
  chat, engine = make(stalled(stop), max_batch=1, max_queue=3)
  with pytest.raises(schemas.ApiError, match="n: found 4, expected at most 3, as many") as caught:
    chat.submit("chat", HELLO | {"n": 4})
  error = caught.value.body()["error"]
  assert caught.value.status == 400 and error["type"] == "invalid_request_error"
  assert error["param"] == "n" and chat.report()["requests_rejected_full"] == 0
  running = chat.submit("chat", HELLO)
  while not chat.num_running:
    pass
  waiting = chat.submit("chat", HELLO)
  with pytest.raises(schemas.ApiError) as caught:  # two places are left, later there may be three
    chat.submit("chat", HELLO | {"n": 3})
  assert caught.value.status == 429
  running.cancel()
  waiting.cancel()
  while chat.num_running or chat.num_waiting:
    pass
  reply = chat.submit("chat", HELLO | {"n": 3})
  engine.failure = RuntimeError("broken")
  with pytest.raises(schemas.ApiError, match="broken"):
    reply.whole()
  engine.failure = None
  assert all(answer.is_cancelled for answer in reply.answers)
  stop.set()
  assert chat.chat(HELLO)["choices"][0]["message"]["content"] == "ok"


def test_text_completions_take_text_or_ids(make):
  chat, engine = make("ok")
  for prompt, expected in (("hi", [256, *b"hi"]), ([1, 2], [1, 2]), (["hi"], [256, *b"hi"])):
    out = chat.completion({"prompt": prompt})
    assert out["object"] == "text_completion" and out["choices"][0]["text"] == "ok"
    assert engine.requests[-1].prompt == expected
  chunks = list(chat.stream("completion", {"prompt": "x", "stream": True}))
  assert [c["choices"][0]["text"] for c in chunks] == ["o", "k", ""]
  assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_sampling_defaults_are_the_servers(make):
  chat, engine = make("ok", sampling=config.SamplingConfig(temperature=0.6, top_p=0.9, top_k=7))
  chat.chat(HELLO | {"top_p": 0.5, "top_k": -1})
  sampling = engine.requests[0].sampling
  assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 0)
  chat.chat(HELLO)
  first, second = engine.requests
  assert second.sampling.top_k == 7 and first.sampling.seed != second.sampling.seed


def test_content_parts_roles_and_template_arguments(make):
  template = "{{ enable_thinking }}|" + scripted.TEMPLATE
  chat, engine = make("ok", template=template)
  image = {"type": "image_url", "image_url": {"url": "data:"}}  # of parts only text is used
  parts = [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
  messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
  chat.chat({"messages": messages, "enable_thinking": False, "user": "me"})
  assert bytes(engine.requests[0].prompt[1:]) == b"False|[s]S[u]ab[a]"


# --- Tools ------------------------------------------------------------------------------------


CALL = '<|tool_call_start|>\n```python\nget_weather(city="Bonn")\n```\n<|tool_call_end|>'


def test_tools_reach_the_prompt_and_calls_come_back(make):
  chat, engine = make("Let me see.\n" + CALL)
  body = HELLO | {"tools": TOOLS, "max_tokens": 200}
  out = chat.chat(body)
  assert "def get_weather(city: str = None)" in bytes(engine.requests[0].prompt[1:]).decode()
  (choice,) = out["choices"]
  assert choice["finish_reason"] == "tool_calls"
  assert choice["message"]["content"] == "Let me see."
  (call,) = choice["message"]["tool_calls"]
  assert call["type"] == "function" and call["function"]["name"] == "get-weather"
  assert json.loads(call["function"]["arguments"]) == {"city": "Bonn"}

  chunks = list(chat.stream("chat", body | {"stream": True}))
  assert text_of(chunks) == "Let me see.\n"
  deltas = [c["choices"][0]["delta"] for c in chunks]
  calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
  assert len(calls) == 1
  assert calls[0][0]["index"] == 0 and calls[0][0]["function"]["name"] == "get-weather"
  assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

  # The turn after it: the call and the result are in the prompt.
  answered = [*HELLO["messages"], choice["message"], {"role": "tool", "content": "rain"}]
  chat.chat({"messages": answered, "tools": TOOLS})
  prompt = bytes(engine.requests[-1].prompt[1:]).decode()
  assert f"Let me see.{CALL}[t]rain[a]" in prompt


def test_broken_calls_and_answers_without_tools_stay_text(make):
  broken = "<|tool_call_start|>\nrm_rf('/')\n<|tool_call_end|>"
  chat, _ = make(broken)
  out = chat.chat(HELLO | {"tools": TOOLS})
  assert out["choices"][0]["message"]["content"] == broken
  assert out["choices"][0]["finish_reason"] == "stop"
  assert "tool_calls" not in out["choices"][0]["message"]
  for body in (HELLO, HELLO | {"tools": TOOLS, "tool_choice": "none"}):
    assert chat.chat(body)["choices"][0]["message"]["content"] == broken


def test_a_template_that_shows_tools_gets_them(make):
  template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}<tool_call>"
  chat, engine = make(
    '<tool_call>{"name": "get-weather", "arguments": {}}</tool_call>', template=template
  )
  out = chat.chat(HELLO | {"tools": TOOLS})
  assert bytes(engine.requests[0].prompt[1:]) == b"get-weather;<tool_call>"
  assert out["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
  assert out["choices"][0]["message"]["content"] is None


# --- Constraints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "fields, good, bad",
  [
    ({"response_format": {"type": "json_object"}}, '{"a": 1}', "["),
    (
      {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}},
      "12",
      "x",
    ),
    ({"grammar": 'start: "a"+'}, "aaa", "b"),
    ({"grammar": {"regex": "b{2}"}}, "bb", "a"),
    ({"grammar": {"choice": ["yes", "no"]}}, "yes", "x"),
    ({"grammar": {"sql": {"t": ["c"]}}}, "SELECT c FROM t", "D"),
    ({"grammar": {"sql": True}}, "SELECT x FROM y", "D"),
    ({"tools": TOOLS, "tool_choice": "required"}, CALL, "x"),
  ],
)
def test_formats_become_constraints(make, fields, good, bad):
  pytest.importorskip("llguidance")
  chat, engine = make("1")
  chat.chat(HELLO | fields)
  constraint = engine.requests[0].constraint
  assert not constraint.consume(ord(bad[0]))
  assert all(constraint.consume(b) for b in good.encode()) and constraint.is_accepting()


@pytest.mark.parametrize(
  "template, call",
  [
    (
      "<tool_call> {{ tools }}",
      '<tool_call>\n{"name": "get-weather", "arguments": {"city": "B"}}\n</tool_call>',
    ),
    (
      "<function name= {{ tools }}",
      '<function name="get-weather"><param name="city">B</param></function>',
    ),
  ],
)
def test_a_required_call_is_in_the_style_of_the_template(make, template, call):
  pytest.importorskip("llguidance")
  chat, engine = make(call, template=template)
  choice = {"type": "function", "function": {"name": "get-weather"}}
  out = chat.chat(HELLO | {"tools": TOOLS, "tool_choice": choice})
  constraint = engine.requests[0].constraint
  assert all(constraint.consume(b) for b in call.encode()) and constraint.is_accepting()
  arguments = out["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
  assert json.loads(arguments) == {"city": "B"}


# --- Queue, cancellation, failures, life ------------------------------------------------------


def test_the_queue_is_bounded_and_a_cancelled_request_gives_its_place_back(make):
  go = threading.Event()
  chat, engine = make(stalled(go), max_batch=1, max_queue=2)
  running = chat.submit("chat", HELLO)
  while not chat.num_running:
    pass
  waiting = [chat.submit("chat", HELLO) for _ in range(2)]
  with pytest.raises(schemas.ApiError, match="2 requests wait already, at most 2") as caught:
    chat.submit("chat", HELLO)
  assert caught.value.status == 429 and caught.value.body()["error"]["type"] == "rate_limit_error"
  waiting[0].cancel()
  while chat.num_waiting > 1:
    pass
  third = chat.submit("chat", HELLO)
  go.set()
  for item in (running, waiting[1], third):
    assert item.whole()["choices"][0]["message"]["content"] == "ok"
  assert len(engine.requests) == 3
  report = chat.report()
  assert report["requests_rejected_full"] == 1 and report["requests_cancelled"] == 1
  assert report["requests_completed"] == 3 and report["requests_accepted"] == 4
  assert report["requests_waiting"] == report["requests_running"] == 0


def test_a_client_that_goes_away_frees_its_row(make):
  go = threading.Event()
  chat, engine = make(
    lambda r: [[*b"a"]] if len(r.prompt) > 12 else scripted.bytewise("ok"), max_batch=1
  )
  stream = chat.stream(
    "chat", {"messages": [{"role": "user", "content": "long one"}], "stream": True}
  )
  assert next(stream)["choices"][0]["delta"]["role"] == "assistant"
  assert next(stream)["choices"][0]["delta"]["content"] == "a"  # and nothing more comes
  stream.close()
  assert chat.chat(HELLO)["choices"][0]["message"]["content"] == "ok"
  assert engine.cancelled == [1] and not go.is_set()
  assert chat.report()["requests_cancelled"] == 1


def test_a_failing_step_fails_its_requests_and_the_next_ones_are_served(make):
  chat, engine = make("ok")
  engine.failure = RuntimeError("device lost")
  with pytest.raises(schemas.ApiError, match="engine: device lost") as caught:
    chat.chat(HELLO)
  assert caught.value.status == 500 and caught.value.body()["error"]["type"] == "server_error"
  assert chat.health()["status"] == "ok"
  engine.failure = None
  assert chat.chat(HELLO)["choices"][0]["message"]["content"] == "ok"
  engine.failure = RuntimeError("device lost")
  for _ in range(service.MAX_FAILURES):
    with pytest.raises(schemas.ApiError):
      chat.chat(HELLO)
  assert chat.health()["status"] == "failed"
  with pytest.raises(schemas.ApiError, match="engine has failed") as caught:
    chat.chat(HELLO)
  assert caught.value.status == 503


def test_a_grammar_over_its_limits_is_an_error_and_not_half_an_answer(make):
  pytest.importorskip("llguidance")

  def script(request):
    if request.constraint is not None:
      request.constraint.matcher.consume_token(ord("b"))  # what a limit does
    return scripted.bytewise("a")

  chat, _ = make(script)
  with pytest.raises(schemas.ApiError, match="grammar: ") as caught:
    chat.chat(HELLO | {"grammar": {"regex": "a+"}})
  assert caught.value.code == "grammar_limit"
  assert chat.chat(HELLO)["choices"][0]["message"]["content"] == "a"


def test_closing_ends_what_runs_and_refuses_what_waits_and_what_comes(make):
  go = threading.Event()
  chat, _ = make(stalled(go), max_batch=1)
  running = chat.submit("chat", HELLO)
  while not chat.num_running:
    pass
  waiting = chat.submit("chat", HELLO)
  closing = threading.Thread(target=chat.close)
  closing.start()
  with pytest.raises(schemas.ApiError, match="shutting down") as caught:
    waiting.whole()
  assert caught.value.status == 503
  with pytest.raises(schemas.ApiError, match="shutting down"):
    chat.submit("chat", HELLO)
  go.set()
  assert running.whole()["choices"][0]["message"]["content"] == "ok"
  closing.join()
  assert chat.health()["status"] == "shutting down"


def test_closing_does_not_wait_for_ever(make):
  chat, engine = make(stalled(threading.Event()), max_batch=1)
  running = chat.submit("chat", HELLO)
  while not chat.num_running:
    pass
  chat.close(0.05)
  with pytest.raises(schemas.ApiError, match="shutting down"):
    running.whole()
  assert engine.cancelled == [1]


def test_models_health_and_metrics(make):
  chat, _ = make("abc")
  (model,) = chat.models()["data"]
  assert model["id"] == "tiny" and model["max_model_len"] == 600
  health = chat.health()
  assert health["status"] == "ok" and health["model_loaded"] is True
  assert health["memory_usage"]["process"] > 2**20
  for _ in range(3):
    chat.chat(HELLO)
  report = chat.report()
  assert report["completion_tokens"] == report["tokens_generated"] == 12
  assert report["prompt_tokens"] == 27 and report["mean_accept_length"] == 1.0
  assert report["queue_limit"] == 64 and report["rows"] == 2


def test_a_compilation_counts_once_whatever_the_number_that_wait_for_it(make):
  chat, engine = make("abc", max_batch=4)
  step, engine.compile_seconds = engine.step, 0.0

  def slow():
    events = step()
    if not engine.compile_seconds:
      time.sleep(0.05)
      engine.compile_seconds += 0.04
    for event in events:
      if event.stats is not None:
        event.stats.compile_seconds = 0.04
    return events

  engine.step = slow
  chat.chat(HELLO | {"n": 4})
  report = chat.report()
  assert report["compile_seconds"] == pytest.approx(0.04)
  assert report["tokens_per_second"] > 0
