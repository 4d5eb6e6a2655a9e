"""The loopback server: the real openai client and raw sockets against it."""

import asyncio
import itertools
import json
import socket
import threading
import time
import urllib.parse

import pytest

from minicpm_jax.infer.server import app, service
from tests.infer.server import scripted

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {
  "type": "object",
  "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
  "required": ["ok", "n"],
  "additionalProperties": False,
}
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "set_light",
      "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
        "required": ["on", "level"],
      },
    },
  }
]


def client_of(url):
  return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


# --- A real model -----------------------------------------------------------------------------


def test_openai_client_chats_and_equal_seeds_give_equal_text_streamed_or_not(real_server):
  url, _ = real_server
  client = client_of(url)
  assert [m.id for m in client.models.list()] == ["tiny"]
  settings = dict(model="tiny", messages=HELLO, temperature=1.0, seed=3, max_tokens=12)
  whole = client.chat.completions.create(**settings)
  assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
  text = whole.choices[0].message.content
  options = {"include_usage": True}
  chunks = list(client.chat.completions.create(**settings, stream=True, stream_options=options))
  streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
  assert streamed == text and len(chunks) > 4
  assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].choices == []
  other = client.chat.completions.create(**settings | {"seed": 4})
  assert other.choices[0].message.content != text
  plain = client.completions.create(model="tiny", prompt="ab", max_tokens=5, logprobs=0)
  assert plain.usage.prompt_tokens == 3 and len(plain.choices[0].logprobs.token_logprobs) == 5
  assert all(x < 0 for x in plain.choices[0].logprobs.token_logprobs)


def test_openai_client_gets_json_of_its_schema_and_calls_of_its_tools(real_server):
  pytest.importorskip("llguidance")
  jsonschema = pytest.importorskip("jsonschema")
  client = client_of(real_server[0])
  format_ = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
  for seed in range(2):
    settings = dict(model="tiny", messages=HELLO, temperature=1.0, seed=seed, max_tokens=300)
    out = client.chat.completions.create(**settings, response_format=format_)
    assert out.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(out.choices[0].message.content), SCHEMA)
    out = client.chat.completions.create(**settings, tools=TOOLS, tool_choice="required")
    assert out.choices[0].finish_reason == "tool_calls"
    for call in out.choices[0].message.tool_calls:
      assert call.function.name == "set_light"
      jsonschema.validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])
  chunks = client.chat.completions.create(
    **settings, tools=TOOLS, tool_choice="required", stream=True
  )
  deltas = [c.choices[0].delta for c in chunks]
  assert any(d.tool_calls and d.tool_calls[0].function.name == "set_light" for d in deltas)


def test_many_at_once_get_what_they_get_alone(real_server):
  client = client_of(real_server[0])

  def ask(i):
    settings = dict(model="tiny", messages=[{"role": "user", "content": "q" * (1 + i % 5)}])
    out = client.chat.completions.create(**settings, temperature=1.0, seed=i, max_tokens=3 + i % 7)
    return out.choices[0].message.content

  alone = [ask(i) for i in range(12)]
  together = [None] * 12

  def run(i):
    together[i] = ask(i)

  threads = [threading.Thread(target=run, args=(i,)) for i in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert together == alone


def test_openai_errors_and_the_server_goes_on(real_server):
  url, _ = real_server
  client = client_of(url)
  with pytest.raises(openai.BadRequestError) as caught:
    client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
  assert caught.value.status_code == 400 and caught.value.param == "temperature"
  assert caught.value.body["type"] == "invalid_request_error"
  with pytest.raises(openai.BadRequestError, match="prompt: found 901 tokens") as caught:
    client.completions.create(model="tiny", prompt="x" * 900)
  assert caught.value.code == "context_length_exceeded"
  with pytest.raises(openai.BadRequestError, match="json_schema: Invalid type"):
    bad = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "foo"}}}
    client.chat.completions.create(model="tiny", messages=HELLO, response_format=bad)
  for method, path, body, status in (
    ("POST", "/v1/chat/completions", b"{", 400),
    ("POST", "/v1/chat/completions", b"[]", 400),
    ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
    ("POST", "/v1/completions", b'{"prompt": 1}', 400),
    ("POST", "/v1/chat/completions", b" " * (4 * 2**20 + 1), 413),
    ("GET", "/v1/chat/completions", None, 405),
    ("GET", "/v1/nothing", None, 404),
  ):
    response = httpx.request(method, url + path, content=body)
    assert response.status_code == status, (path, body and body[:20])
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"], path
    assert response.headers.get("allow") == ("POST" if status == 405 else None)  # RFC 9110 15.5.6
  chunked = httpx.post(url + "/v1/completions", content=iter([b" " * 2**20] * 5))
  assert chunked.status_code == 413
  out = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
  assert out.usage.completion_tokens == 2
  assert client.models.retrieve("tiny") == client.models.list().data[0]
  with pytest.raises(openai.NotFoundError, match="model: found 'o/ther'") as caught:
    client.models.retrieve("o/ther")
  assert caught.value.code == "model_not_found"
  assert httpx.get(url + "/health").json()["status"] == "ok"
  assert httpx.get(url + "/metrics").json()["requests_completed"] > 0


def test_the_openapi_document_says_what_the_routes_take_and_give(real_server):
  url, _ = real_server
  paths = httpx.get(url + "/openapi.json").json()["paths"]
  posts = ("/v1/chat/completions", "/v1/completions")
  gets = ("/v1/models", "/v1/models/{name}", "/health", "/metrics")
  assert sorted(paths) == sorted((*posts, *gets))  # JSON alone: not the chat page
  for path in posts:
    body = paths[path]["post"]["requestBody"]
    assert body["required"] and body["content"]["application/json"]["schema"] == {"type": "object"}
  for path, (operation,) in ((path, found.values()) for path, found in paths.items()):
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}, path  # never fastapi's 422


# --- A scripted engine ------------------------------------------------------------------------


def test_the_bytes_of_a_stream_are_server_sent_events(serve_scripted):
  url, _, _ = serve_scripted("né\n\ndata: x")
  body = {"messages": HELLO, "stream": True}
  response = httpx.post(url + "/v1/chat/completions", json=body)
  assert response.headers["content-type"].startswith("text/event-stream")
  events = response.content.split(b"\n\n")
  assert events[-1] == b"" and events[-2] == b"data: [DONE]"
  assert all(event.startswith(b"data: ") and b"\n" not in event for event in events[:-1])
  chunks = [json.loads(event[6:]) for event in events[:-2]]
  assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
  text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
  assert text == "né\n\ndata: x"
  assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_multi_byte_characters_stream_whole_to_the_openai_client(serve_scripted):
  text = "héllo 語🙂 ✓"
  url, _, _ = serve_scripted(text)
  chunks = client_of(url).chat.completions.create(model="m", messages=HELLO, stream=True)
  pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
  assert pieces == list(text)


def test_what_has_come_meanwhile_is_one_write_of_the_same_events(byte_tokenizer):
  """The answer is whole before the stream's first event is read."""
  engine = scripted.ScriptedEngine(lambda _: scripted.bytewise("abc"))
  tok = byte_tokenizer(chat_template=scripted.TEMPLATE)

  async def parts(chat):
    kinds = ("chat", {"messages": HELLO, "stream": True})
    live = await app._Live.open(chat, *kinds)
    first = await live.next()
    await asyncio.to_thread(chat.close)  # when the answer has ended
    return [part async for part in live.events(first)]

  with service.ChatService(engine, tok, name="tiny") as chat:
    expected = list(chat.stream("chat", {"messages": HELLO, "stream": True}))
    (part,) = asyncio.run(parts(chat))
  *events, done, end = part.split(b"\n\n")
  assert done == b"data: [DONE]" and end == b"" and len(events) == len(expected) == 5
  for event, chunk in zip(events, expected, strict=True):
    assert json.loads(event[6:])["choices"] == chunk["choices"]


def test_a_failure_in_the_middle_of_a_stream_reaches_the_client(serve_scripted):
  url, engine, _ = serve_scripted(lambda _: fail_later())

  def fail_later():
    yield [*b"abc"]
    engine.failure = RuntimeError("device lost")
    yield [*b"d"]

  with pytest.raises(openai.APIError, match="engine: device lost"):
    for _ in client_of(url).chat.completions.create(model="m", messages=HELLO, stream=True):
      pass


def endless(request):
  """Says "a" for ever to a prompt that ends in "!", else "ok"."""
  if b"!" not in bytes(request.prompt[1:]):
    yield from scripted.bytewise("ok")
    return
  while True:
    time.sleep(0.005)
    yield [ord("a")]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels_and_frees_the_row(serve_scripted, stream):
  url, engine, chat = serve_scripted(endless, max_batch=1)
  body = {"messages": [{"role": "user", "content": "!"}], "stream": stream, "max_tokens": 65536}
  data = json.dumps(body).encode()
  address = urllib.parse.urlparse(url)
  with socket.create_connection((address.hostname, address.port)) as raw:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    if stream:
      assert raw.recv(4096).startswith(b"HTTP/1.1 200")
    while not chat.num_running:
      time.sleep(0.01)
  out = client_of(url).chat.completions.create(model="m", messages=HELLO)
  assert out.choices[0].message.content == "ok"
  assert engine.cancelled == [1] and chat.report()["requests_cancelled"] == 1


def test_a_client_that_leaves_inside_its_body_is_no_failure(byte_tokenizer):
  pytest.importorskip("fastapi")
  engine = scripted.ScriptedEngine(lambda _: iter([[97]]))
  tok = byte_tokenizer(chat_template=scripted.TEMPLATE)
  messages = [
    {"type": "http.request", "body": b'{"messages": ', "more_body": True},
    {"type": "http.disconnect"},
  ]
  sent = []

  async def receive():
    return messages.pop(0)

  async def send(message):
    sent.append(message)

  scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST"}
  scope |= {"path": "/v1/chat/completions", "headers": [], "query_string": b"", "scheme": "http"}
  with service.ChatService(engine, tok, name="tiny") as chat:
    asyncio.run(app.make_app(chat)(scope, receive, send))  # raises nothing
  assert sent[0]["status"] == 499


def test_an_answer_that_cannot_even_begin_to_be_sent_is_cancelled(byte_tokenizer):
  pytest.importorskip("fastapi")
  engine = scripted.ScriptedEngine(lambda _: itertools.chain([[97]], itertools.repeat([])))
  tok = byte_tokenizer(chat_template=scripted.TEMPLATE)
  messages = [json.dumps({"messages": HELLO, "stream": True}).encode()]

  async def receive():
    while not messages:
      await asyncio.sleep(60)
    return {"type": "http.request", "body": messages.pop(), "more_body": False}

  async def send(_):
    raise OSError("the client has gone")

  scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST"}
  scope |= {"path": "/v1/chat/completions", "headers": [], "query_string": b"", "scheme": "http"}
  with service.ChatService(engine, tok, name="tiny") as chat:
    with pytest.raises(Exception):  # noqa: B017  starlette's ClientDisconnect, or the OSError
      asyncio.run(app.make_app(chat)(scope, receive, send))
    for _ in range(500):
      if chat.num_running:
        time.sleep(0.01)
    assert not chat.num_running
  assert engine.cancelled == [1] and chat.report()["requests_cancelled"] == 1


def test_a_full_queue_is_429_for_the_client_and_a_waiting_one_may_leave(serve_scripted):
  url, _, chat = serve_scripted(endless, max_batch=1, max_queue=1)
  client = client_of(url)
  loud = [{"role": "user", "content": "!"}]
  first = client.chat.completions.create(model="m", messages=loud, stream=True)
  next(iter(first))
  waiting = []

  def wait():
    waiting.append(client.chat.completions.create(model="m", messages=HELLO))

  thread = threading.Thread(target=wait)
  thread.start()
  while chat.num_waiting < 1:
    time.sleep(0.01)
  with pytest.raises(openai.RateLimitError) as caught:
    client.chat.completions.create(model="m", messages=HELLO)
  assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"]
  first.close()
  thread.join()
  assert waiting[0].choices[0].message.content == "ok"


def test_stopping_the_server_lets_a_stream_end(byte_tokenizer):
  pytest.importorskip("uvicorn")
  from minicpm_jax import config
  from minicpm_jax.infer.server import app, service

  go = threading.Event()

  def script(_):
    yield [*b"a"]
    while not go.wait(0.01):
      yield []
    yield [*b"b", 257]

  engine = scripted.ScriptedEngine(script)
  tok = byte_tokenizer(chat_template=scripted.TEMPLATE)
  cfg = config.ServerConfig(port=0, shutdown_seconds=20.0)
  server = app.make_server(service.ChatService(engine, tok, name="tiny", cfg=cfg))
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
  chunks = iter(client_of(url).chat.completions.create(model="m", messages=HELLO, stream=True))
  assert next(chunks).choices[0].delta.role == "assistant"
  server.should_exit = True
  go.set()
  assert "".join(c.choices[0].delta.content or "" for c in chunks) == "ab"
  thread.join()


def test_page_files_are_served_with_a_policy(serve_scripted):
  url, _, _ = serve_scripted("x")
  page = httpx.get(url + "/")
  assert page.headers["content-type"].startswith("text/html")
  assert "default-src 'self'" in page.headers["content-security-policy"]
  for name in ("static/chat.js", "static/chat.css"):
    assert name in page.text and httpx.get(f"{url}/{name}").status_code == 200
  assert httpx.get(url + "/static/../app.py").status_code == 404


def test_an_address_in_use_is_refused_before_a_model_is_loaded():
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already"):
      app.check("127.0.0.1", port)
  app.check("127.0.0.1", port)
  with pytest.raises(ValueError, match="cannot listen on 192.0.2.1:8000"):  # nobody's address
    app.check("192.0.2.1", 8000)


def test_addresses_of_a_family_that_the_machine_lacks_are_left_out(monkeypatch):
  """As asyncio does, which then listens: localhost's ::1 in a container without IPv6."""
  own = socket.socket

  def without_ipv6(family=-1, *args, **kwargs):
    if family == socket.AF_INET6:
      raise OSError(97, "Address family not supported by protocol")
    return own(family, *args, **kwargs)

  known = {"both": ("::1", "127.0.0.1"), "six": ("::1",)}

  def addresses(host, port, **kwargs):
    families = {"::1": socket.AF_INET6, "127.0.0.1": socket.AF_INET}
    return [(families[a], socket.SOCK_STREAM, 6, "", (a, port)) for a in known[host]]

  monkeypatch.setattr(socket, "socket", without_ipv6)
  monkeypatch.setattr(socket, "getaddrinfo", addresses)
  app.check("both", 0)
  with pytest.raises(ValueError, match="cannot listen on six:0: Address family not supported"):
    app.check("six", 0)
