"""The chat service: requests to answers, without sockets (inference.md section 18).

One thread owns the engine. `submit` checks a request, renders and tokenises it and puts it into a
bounded queue (429 beyond the bound); the thread hands waiting requests to free rows, and every
answer gets its deltas on a queue of its own. A client that goes away cancels its answer and frees
the row. `app` puts HTTP in front.
"""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from minicpm_jax import config
from minicpm_jax.infer import constrained, grammars
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.infer.server import answer, metrics, responses, schemas
from minicpm_jax.text import chat as chat_text
from minicpm_jax.text import tokenizer
from minicpm_jax.text import tools as tools_lib

MAX_FAILURES = 3  # engine steps that raise in a row, then the service is unhealthy


class ChatService:
  """`start`, then `chat`/`completion` (or `submit`), then `close`. Also a context manager.

  `template` is the chat template (default: the tokenizer's); `stop_ids` end an answer.
  """

  def __init__(
    self,
    engine: Any,  # engine_lib.Engine, or what has its add, step, cancel, num_free_slots
    tok: tokenizer.Tokenizer,
    *,
    name: str,
    cfg: config.ServerConfig | None = None,
    template: str | None = None,
    stop_ids: Sequence[int] = (),
  ):
    self.cfg = config.ServerConfig() if cfg is None else cfg
    self.name, self.tok, self.template = name, tok, template
    self.stop_ids = tuple(dict.fromkeys((*engine.stop_ids, *stop_ids)))
    self.metrics = metrics.Metrics()
    self._engine = engine
    self._waiting: collections.deque[answer.Answer] = collections.deque()
    self._running: dict[int, answer.Answer] = {}
    self._changed = threading.Condition()
    self._is_closing = False
    self._num_failures = 0
    self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

  # --- Life ---------------------------------------------------------------------------------------

  def grammar_error(self) -> Exception | None:
    """Why no request can have a grammar: no extra, or tokenizer and model do not fit; else None."""
    try:
      _ = self._compiler
    except (ImportError, ValueError) as error:
      return error
    return None

  def warm_up(self, num_tokens: int | None = None, *, is_constrained: bool = False) -> int:
    """`Engine.warm_up`, and where `is_constrained` what the first grammar would make: the table of
    all tokens' bytes. Before `start`. ImportError without the extra `constrained`."""
    if is_constrained:
      self._compiler.json_object()
    return self._engine.warm_up(num_tokens, is_constrained=is_constrained)

  def start(self) -> "ChatService":
    self._thread.start()
    return self

  def close(self, seconds: float | None = None) -> None:
    """Refuses new requests, lets answers under way end for `seconds` (default: the config's)."""
    with self._changed:
      self._is_closing = True
      waiting, self._waiting = list(self._waiting), collections.deque()
      self._changed.notify_all()
    for item in waiting:
      self._fail(item, _shutting_down())
    if not self._thread.is_alive():
      return
    self._thread.join(self.cfg.shutdown_seconds if seconds is None else seconds)
    if self._thread.is_alive():
      with self._changed:
        running = list(self._running.values())
      for item in running:
        item.is_cancelled = True
        item.fail(_shutting_down())
      self._thread.join()

  def __enter__(self) -> "ChatService":
    return self.start()

  def __exit__(self, *_: Any) -> None:
    self.close()

  # --- Requests -----------------------------------------------------------------------------------

  def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of /v1/chat/completions in one object; ApiError on failure."""
    return self.submit("chat", body).whole()

  def completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of /v1/completions in one object."""
    return self.submit("completion", body).whole()

  def stream(self, kind: schemas.Kind, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of an answer; closing the iterator cancels it."""
    return self.submit(kind, body).chunks()

  def submit(
    self, kind: schemas.Kind, body: Mapping[str, Any], notify: Callable[[], None] = lambda: None
  ) -> answer.Reply:
    """Checks and queues a request; `notify` is called (on another thread) for every delta.

    ApiError: 400 what the request asks for cannot be had, 429 the queue is full, 503 shutting down.
    """
    try:
      self._check_room()
      reply = self._prepare(kind, body, notify)
      with self._changed:
        self._check_room(len(reply.answers))
        reply.on_cancel = self._wake
        self._waiting += reply.answers
        self.metrics.add("requests_accepted", len(reply.answers))
        self._changed.notify_all()
    except schemas.ApiError as error:
      self.metrics.add("requests_rejected_full" if error.status == 429 else "requests_rejected")
      raise
    return reply

  def _check_room(self, num: int = 1) -> None:
    if self._is_closing:
      raise _shutting_down()
    if not self.is_healthy:
      raise schemas.ApiError("the engine has failed, see the server's log", status=503)
    waiting = len(self._waiting)
    if waiting + num > self.cfg.max_queue:
      message = (
        f"{waiting} requests wait already, at most {self.cfg.max_queue} may: try again later"
      )
      raise schemas.ApiError(message, status=429, code="queue_full")

  def _prepare(
    self, kind: schemas.Kind, body: Mapping[str, Any], notify: Callable[[], None]
  ) -> answer.Reply:
    if kind == "chat":
      chat = schemas.parse_chat(body, self.cfg)
      options, tools = chat.options, chat.tools
      prompt = self._render(chat)
    else:
      completion = schemas.parse_completion(body, self.cfg)
      options, tools = completion.options, ()
      prompt = self._encode(completion.prompt)
    self._check_prompt(prompt)
    style = tools_lib.style_of(self._template_text()) if tools else "python"
    answers, seed = [], options.sampling.seed
    for i in range(options.num_choices):  # each with noise of its own
      request = engine_lib.Request(
        prompt,
        dataclasses.replace(options.sampling, seed=(seed + i) % 2**31),
        self.stop_ids,
        None if options.format is None else self._constraint(options.format, style),
        options.want_logprobs,
        num_top_logprobs=options.num_top,
      )
      more = {"stop_ids": self.stop_ids, "tools": tools, "style": style}
      answers.append(answer.Answer(request, options, self.tok, **more))
    return answer.Reply(answers, responses.Formatter(kind, self.name, options), notify)

  def _template_text(self) -> str:
    return chat_text.template_text(self.tok if self.template is None else self.template)

  def _render(self, chat: schemas.ChatBody) -> list[int]:
    try:
      template = self._template_text()
      messages: Sequence[Mapping[str, Any]] = chat.messages
      arguments = dict(chat.template_arguments)
      if chat.tools and tools_lib.handles_tools(template):
        arguments["tools"] = list(chat.tool_entries)
      elif chat.tools or any("tool_calls" in message for message in messages):
        if not tools_lib.handles_tools(template):
          messages = tools_lib.with_instructions(messages, chat.tools)
      return chat_text.encode_chat(messages, self.tok, template=template, **arguments)
    except (chat_text.ChatTemplateError, tools_lib.ToolError, TypeError) as error:
      raise schemas.ApiError(str(error), param="messages") from error

  def _encode(self, prompt: str | tuple[int, ...]) -> list[int]:
    if not isinstance(prompt, str):
      return list(prompt)
    return self.tok.encode(prompt, add_bos=self.tok.add_bos)

  def _check_prompt(self, prompt: list[int]) -> None:
    vocab_size = self._engine.model.cfg.vocab_size
    if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
      found = f"ids outside 0..{vocab_size - 1}" if prompt else "no token"
      raise schemas.ApiError(f"prompt: found {found}, expected at least one id", param="prompt")
    room = self._engine.cfg.capacity - base.num_rows(self._engine.drafter)
    if len(prompt) > room:
      message = f"prompt: found {len(prompt)} tokens, expected at most {room}"
      raise schemas.ApiError(message, param="prompt", code="context_length_exceeded")

  @functools.cached_property
  def _compiler(self) -> constrained.GrammarCompiler:
    vocab_size = self._engine.model.cfg.vocab_size
    stops = self.stop_ids or self.tok.stop_ids  # a grammar ends somewhere, also with --ignore_eos
    return constrained.GrammarCompiler(self.tok, vocab_size, stop_ids=stops)

  def _constraint(self, format_: schemas.Format, style: str) -> constrained.Constraint:
    try:
      compiler = self._compiler
      if format_.kind == "tools":
        return self._calls(format_.value, style)
      makers = {
        "json_object": lambda _: compiler.json_object(),
        "json_schema": compiler.json_schema,
        "lark": compiler.lark,
        "regex": compiler.regex,
        "choice": compiler.choice,
        "sql": compiler.sql_select,
      }
      return makers[format_.kind](format_.value)
    except ImportError as error:
      raise schemas.ApiError(str(error), status=501) from error
    except ValueError as error:
      param = "response_format" if format_.kind.startswith("json") else "grammar"
      raise schemas.ApiError(str(error), param=param, code="invalid_grammar") from error

  def _calls(self, tools: Sequence[tools_lib.Tool], style: str) -> constrained.Constraint:
    """A constraint that lets the model write calls of these tools and nothing else."""
    if style == "python":
      items = [{"name": t.wire_name, "parameters": t.parameters} for t in tools]
      before, after = tools_lib.BEFORE["python"], tools_lib.AFTER["python"]
      return self._compiler.python_calls(items, before=before, after=after)
    items = [{"name": t.name, "parameters": t.parameters} for t in tools]
    return self._compiler.lark(
      grammars.json_calls(items) if style == "json" else grammars.xml_calls(items)
    )

  # --- State --------------------------------------------------------------------------------------

  @property
  def is_healthy(self) -> bool:
    return self._num_failures < MAX_FAILURES

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    return len(self._running)

  def models(self) -> dict[str, Any]:
    """The body of GET /v1/models."""
    length = self._engine.cfg.capacity
    model = {"id": self.name, "object": "model", "created": int(self.metrics.started)}
    return {"object": "list", "data": [model | {"owned_by": "local", "max_model_len": length}]}

  def health(self) -> dict[str, Any]:
    """The body of GET /health: status, model_loaded, memory_usage (bytes)."""
    status = "ok" if self.is_healthy else "failed"
    status = "shutting down" if self._is_closing else status
    return {"status": status, "model_loaded": True, "memory_usage": metrics.memory_usage()}

  def report(self) -> dict[str, Any]:
    """The body of GET /metrics."""
    return self.metrics.report() | {
      "requests_waiting": self.num_waiting,
      "requests_running": self.num_running,
      "queue_limit": self.cfg.max_queue,
      "rows": self._engine.cfg.max_batch,
      "memory_usage": metrics.memory_usage(),
    }

  # --- Engine's thread ----------------------------------------------------------------------------

  def _wake(self) -> None:
    with self._changed:
      self._changed.notify_all()

  def _serve(self) -> None:
    try:
      self._loop()
    except BaseException as error:  # a bug here must not leave anybody waiting
      self._num_failures = MAX_FAILURES
      with self._changed:
        left = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting.clear()
      for item in left:
        self._fail(item, schemas.ApiError(f"server: {error!r}", status=500))
      raise

  def _loop(self) -> None:
    while True:
      with self._changed:
        while not (self._waiting or self._running or self._is_closing):
          self._changed.wait()
        if self._is_closing and not self._running:
          return
      self._drop_cancelled()
      self._admit()
      if self._running:
        self._step()

  def _drop_cancelled(self) -> None:
    with self._changed:
      kept = [item for item in self._waiting if not item.is_cancelled]
      num_gone = len(self._waiting) - len(kept)
      self._waiting = collections.deque(kept)
    self.metrics.add("requests_cancelled", num_gone)
    for uid, item in list(self._running.items()):
      if item.is_cancelled:
        self._engine.cancel(uid)
        self._remove(uid)
        self.metrics.add("requests_cancelled")

  def _admit(self) -> None:
    while self._engine.num_free_slots > 0:
      with self._changed:
        if not self._waiting:
          return
        item = self._waiting.popleft()
      try:
        item.uid = self._engine.add(item.request)
      except ValueError as error:
        self._fail(item, schemas.ApiError(str(error)))
        continue
      self._running[item.uid] = item

  def _step(self) -> None:
    begin, compiled = time.perf_counter(), self._compile_seconds
    try:
      events = self._engine.step()
      self._num_failures = 0
    except engine_lib.RequestError as error:  # one request; the others go on
      item = self._running.get(error.id)
      if item is not None:
        self._remove(error.id)
        self._fail(item, schemas.ApiError(str(error), status=500))
      return
    except Exception as error:  # whatever it was, the other requests must get an answer
      logging.exception("engine step failed")
      self._num_failures += 1
      self.metrics.add("engine_failures")
      for uid, item in list(self._running.items()):
        self._engine.cancel(uid)
        self._remove(uid)
        self._fail(item, schemas.ApiError(f"engine: {error}", status=500))
      return
    self.metrics.add("engine_seconds", time.perf_counter() - begin)
    # Once, whatever the number of requests that waited for it (each one's stats have it whole).
    self.metrics.add("compile_seconds", self._compile_seconds - compiled)
    for event in events:
      item = self._running.get(event.id)
      if item is None:
        continue
      self.metrics.add("tokens_generated", len(event.tokens))
      is_over = item.take(event.tokens, event.logprobs, event.top_logprobs)
      if event.finish_reason is None and not is_over:
        continue
      stats = event.stats
      if event.finish_reason is None:  # a stop string: the engine does not know
        last = self._engine.cancel(event.id)
        stats = None if last is None else last.stats
      self._remove(event.id)
      self._finish(item, event.finish_reason or "stop", stats)

  @property
  def _compile_seconds(self) -> float:
    return getattr(self._engine, "compile_seconds", 0.0)

  def _finish(self, item: answer.Answer, reason: str, stats: Any) -> None:
    broken = getattr(item.request.constraint, "error", "")
    if broken:
      self._fail(item, schemas.ApiError(f"grammar: {broken}", code="grammar_limit"))
      return
    usage = item.end(reason, stats)
    self.metrics.finished(usage, stats)

  def _fail(self, item: answer.Answer, error: schemas.ApiError) -> None:
    self.metrics.add("requests_failed")
    item.fail(error)

  def _remove(self, uid: int) -> None:
    with self._changed:
      self._running.pop(uid, None)


def _shutting_down() -> schemas.ApiError:
  return schemas.ApiError("the server is shutting down", status=503, code="shutting_down")
