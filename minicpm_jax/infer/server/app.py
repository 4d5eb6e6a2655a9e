"""HTTP in front of the chat service: fastapi routes, SSE, disconnects, the chat page.

  POST /v1/chat/completions, /v1/completions    GET /v1/models, /v1/models/NAME, /health,
                                                /metrics, / (chat page)

Everything else is in `service`. A client that goes away cancels its answer: while it streams, and
while it waits for a whole one. Needs the extra `serve`.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import socket
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from minicpm_jax.core.extras import require_extra
from minicpm_jax.infer.server import answer as answer_lib
from minicpm_jax.infer.server import responses, schemas, service

STATIC = pathlib.Path(__file__).parent / "static"
_JSON = json.JSONEncoder(ensure_ascii=False)
_POLICY = "default-src 'self'; img-src 'self' data:"
_PAGE_HEADERS = {"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"}
# What /openapi.json says of bodies; `schemas` checks them.
_BODY = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
_ERRORS = {"4XX": {"description": "OpenAI's error body"}, "5XX": {"description": "the same"}}


class Gone(Exception):
  """The client has closed the connection."""


def sse(value: Any) -> bytes:
  """One server-sent event."""
  text = value if isinstance(value, str) else _JSON.encode(value)
  return f"data: {text}\n\n".encode()


def make_app(chat_service: service.ChatService) -> Any:
  """The fastapi application; it starts and closes the service with its own life."""
  fastapi = require_extra("fastapi", extra="serve")
  fastapi_responses = require_extra("fastapi.responses", extra="serve")
  static_files = require_extra("fastapi.staticfiles", extra="serve")
  starlette = require_extra("starlette.exceptions", extra="serve")

  @contextlib.asynccontextmanager
  async def lifespan(_):
    chat_service.start()
    yield
    await asyncio.to_thread(chat_service.close)

  app = fastapi.FastAPI(
    title="minicpm_jax", lifespan=lifespan, docs_url=None, redoc_url=None, responses=_ERRORS
  )

  class Stream(fastapi_responses.StreamingResponse):
    """Cancels its answer however it ends, also where nothing could be sent at all."""

    def __init__(self, live: _Live, first: responses.Delta):
      super().__init__(
        live.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
      )
      self.answer = live.answer

    async def __call__(self, *args: Any) -> None:
      try:
        await super().__call__(*args)
      finally:
        self.answer.cancel()

  def failure(error: schemas.ApiError, headers=None):
    if error.status in (429, 503):
      headers = {"Retry-After": "1"}
    return fastapi_responses.JSONResponse(error.body(), error.status, headers)

  async def generate(kind: schemas.Kind, request: fastapi.Request):
    try:
      body = schemas.read_json(await read_body(request, chat_service.cfg.max_body_bytes))
      gone = asyncio.ensure_future(wait_until_gone(request))
      try:
        live = await _unless(gone, _Live.open(chat_service, kind, body))
        if live.answer.options.stream:
          # The first delta decides between an HTTP error and a stream.
          first = await _unless(gone, live.next())
          if first.error is not None:
            raise first.error
          return Stream(live, first)
        return fastapi_responses.JSONResponse(await _unless(gone, live.whole()))
      finally:
        gone.cancel()
    except schemas.ApiError as error:
      return failure(error)
    except Gone:
      return fastapi_responses.Response(status_code=499)  # nobody reads it

  @app.post("/v1/chat/completions", openapi_extra={"requestBody": _BODY})
  async def chat_completions(request: fastapi.Request):
    return await generate("chat", request)

  @app.post("/v1/completions", openapi_extra={"requestBody": _BODY})
  async def completions(request: fastapi.Request):
    return await generate("completion", request)

  @app.get("/v1/models")
  async def models():
    return chat_service.models()

  @app.get("/v1/models/{name:path}")
  async def model(name: str):
    for entry in chat_service.models()["data"]:
      if entry["id"] == name:
        return entry
    message = f"model: found {name!r}, which is not served here (see /v1/models)"
    return failure(schemas.ApiError(message, status=404, param="model", code="model_not_found"))

  @app.get("/health")
  async def health():
    code = 200 if chat_service.is_healthy else 503
    return fastapi_responses.JSONResponse(chat_service.health(), code)

  @app.get("/metrics")
  async def metrics():
    return chat_service.report()

  @app.get("/", include_in_schema=False)
  async def page():
    return fastapi_responses.FileResponse(STATIC / "index.html", headers=_PAGE_HEADERS)

  app.mount("/static", static_files.StaticFiles(directory=STATIC))

  @app.exception_handler(starlette.HTTPException)
  async def http_error(_, error):
    message = f"{error.detail} (see / and /v1/models)" if error.status_code == 404 else error.detail
    # A 405 names the methods there are in a header.
    return failure(schemas.ApiError(str(message), status=error.status_code), error.headers)

  @app.exception_handler(Exception)
  async def crash(_, error):
    return failure(schemas.ApiError(f"{type(error).__name__}: {error}", status=500))

  return app


async def read_body(request: Any, limit: int) -> bytes:
  """The body, 413 as soon as it is longer than `limit` bytes; Gone if the client leaves in it."""
  starlette_requests = require_extra("starlette.requests", extra="serve")
  declared = request.headers.get("content-length", "0")
  size, parts = 0, []
  if not (declared.isdigit() and int(declared) > limit):
    try:
      async for part in request.stream():
        size += len(part)
        parts.append(part)
        if size > limit:
          break
    except starlette_requests.ClientDisconnect as error:
      raise Gone from error
  if size > limit or (declared.isdigit() and int(declared) > limit):
    raise schemas.ApiError(f"body: expected at most {limit} bytes", status=413)
  return b"".join(parts)


async def wait_until_gone(request: Any) -> None:
  """Returns when the client has closed the connection (the body must have been read)."""
  while (await request.receive())["type"] != "http.disconnect":
    pass


async def _unless(gone: "asyncio.Future[None]", work: Awaitable[Any]) -> Any:
  """The result of `work`; Gone, and `work` is cancelled, if the client goes away first."""
  task = asyncio.ensure_future(work)
  try:
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise Gone
    return task.result()
  finally:
    task.cancel()


class _Live:
  """An answer and the event that says that something has arrived."""

  def __init__(self, answer: answer_lib.Reply, arrived: asyncio.Event):
    self.answer, self._arrived = answer, arrived

  @staticmethod
  async def open(chat_service: service.ChatService, kind: schemas.Kind, body: Any) -> "_Live":
    """Submits on a worker thread: rendering, tokenising and compiling a grammar take time."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
      loop.call_soon_threadsafe(arrived.set)

    submit = loop.run_in_executor(None, chat_service.submit, kind, body, notify)
    try:
      return _Live(await asyncio.shield(submit), arrived)
    except asyncio.CancelledError:
      submit.add_done_callback(lambda f: None if f.exception() else f.result().cancel())
      raise

  async def next(self) -> responses.Delta:
    try:
      while (delta := self.answer.pop()) is None:
        await self._arrived.wait()
        self._arrived.clear()
      return delta
    except asyncio.CancelledError:
      self.answer.cancel()
      raise

  async def whole(self) -> dict[str, Any]:
    deltas = [await self.next()]
    while not deltas[-1].is_last:
      deltas.append(await self.next())
    return self.answer.formatter.whole(deltas)

  async def events(self, delta: responses.Delta) -> AsyncIterator[bytes]:
    """The SSE stream from its first delta on. What has come meanwhile goes out in one write."""
    formatter = self.answer.formatter
    parts = [sse(chunk) for chunk in formatter.opening()]
    while delta.error is None:
      parts += [sse(chunk) for chunk in formatter.chunks(delta)]
      if delta.is_last:
        break
      following = self.answer.pop()
      if following is None:
        yield b"".join(parts)
        parts, following = [], await self.next()
      delta = following
    if delta.error is not None:
      parts.append(sse(delta.error.body()))
    yield b"".join((*parts, sse("[DONE]")))


def check(host: str, port: int) -> None:
  """What `make_server` and its run need, before a model is loaded for them.

  ImportError names a missing extra, ValueError an address that cannot be listened on.
  """
  for package in ("fastapi", "uvicorn"):
    require_extra(package, extra="serve")
  try:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    failed = []
    for family, kind, protocol, _, address in found:
      try:
        listener = socket.socket(family, kind, protocol)
      except OSError as error:  # localhost may have an IPv6 address on a machine without IPv6
        failed.append(error)
        continue
      with listener:
        if os.name == "posix":  # as the server does; elsewhere it would share the port
          listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
          listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    if len(failed) == len(found):
      raise failed[0]
  except (OSError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or error
    raise ValueError(f"host, port: cannot listen on {host}:{port}: {reason}") from error


def make_server(chat_service: service.ChatService) -> Any:
  """The uvicorn server on the address of the service's config; `.run()` blocks until a signal.

  SIGINT and SIGTERM stop it gracefully: no new connections, answers under way end first.
  """
  uvicorn = require_extra("uvicorn", extra="serve")
  cfg = chat_service.cfg
  settings = uvicorn.Config(
    make_app(chat_service),
    host=cfg.host,
    port=cfg.port,
    log_level="warning",
    timeout_graceful_shutdown=max(1, round(cfg.shutdown_seconds)),
  )
  return uvicorn.Server(settings)
