"""Answers on their way: tokens of the engine in, deltas out, cut at stop strings and tool calls.

A `Reply` is what the consumer reads and may cancel, on any thread; it has one `Answer` for each
choice, whose `take` and `end` run on the engine's thread.
"""

import collections
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minicpm_jax.infer import detokenize, engine
from minicpm_jax.infer.server import responses, schemas
from minicpm_jax.text import tokenizer
from minicpm_jax.text import tools as tools_lib


class Reply:
  """All choices of one request; iterate over `deltas`, or `pop` after each `notify`."""

  def __init__(
    self,
    answers: Sequence["Answer"],
    formatter: responses.Formatter,
    notify: Callable[[], None] = lambda: None,
  ):
    self.answers, self.formatter, self._notify = tuple(answers), formatter, notify
    self.options = formatter.options
    self.on_cancel: Callable[[], None] = lambda: None
    self._queue: queue.SimpleQueue[responses.Delta] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._num_left, self._usages = len(self.answers), []
    for index, answer in enumerate(self.answers):
      answer.send = functools.partial(self._receive, index)

  def deltas(self) -> Iterator[responses.Delta]:
    """Deltas as they come, the last one included; closing the iterator early cancels."""
    try:
      while True:
        delta = self._queue.get()
        yield delta
        if delta.is_last:
          return
    finally:
      self.cancel()

  def pop(self) -> responses.Delta | None:
    """The next delta if there is one."""
    try:
      return self._queue.get_nowait()
    except queue.Empty:
      return None

  def cancel(self) -> None:
    """Nobody waits any more. No effect on choices that have ended."""
    for answer in self.answers:
      answer.is_cancelled = True
    self.on_cancel()

  def chunks(self) -> Iterator[dict[str, Any]]:
    """Stream chunks; a failure raises its ApiError."""
    yield from self.formatter.opening()
    for delta in self.deltas():
      if delta.error is not None:
        raise delta.error
      yield from self.formatter.chunks(delta)

  def whole(self) -> dict[str, Any]:
    """Waits for the end; the answer in one object."""
    return self.formatter.whole(list(self.deltas()))

  def _receive(self, index: int, delta: responses.Delta) -> None:
    """A delta of a choice; the usage of the last one that ends is that of all."""
    with self._lock:
      if delta.is_end:
        self._num_left -= 1
      if delta.usage is not None:
        self._usages.append(delta.usage)
        tokens = sum(usage.completion_tokens for usage in self._usages)
        usage = dataclasses.replace(self._usages[0], completion_tokens=tokens)
        delta = dataclasses.replace(delta, usage=usage)
      if index or delta.is_end:  # most are neither
        delta = dataclasses.replace(delta, index=index, num_left=self._num_left)
      self._queue.put(delta)
    if delta.error is not None:
      self.cancel()  # the other choices
    try:
      self._notify()
    except RuntimeError:  # the consumer's event loop is gone
      self.cancel()


class Answer:
  """One choice, made by the service and told to a `Reply`."""

  def __init__(
    self,
    request: engine.Request,
    options: schemas.Options,
    tok: tokenizer.Tokenizer,
    *,
    stop_ids: Sequence[int],
    tools: Sequence[tools_lib.Tool] = (),
    style: tools_lib.Style = "python",
  ):
    self.request, self.options = request, options
    self.uid: int | None = None  # the engine's, once a row was free
    self.is_cancelled = False
    self.send: Callable[[responses.Delta], None] = lambda _: None
    self._tok, self._stop_ids = tok, frozenset(stop_ids)
    self._tools, self._style = tuple(tools), style
    markers = {tok.special_tokens.get(name) for name in tools_lib.MARKERS} if tools else set()
    self._text = detokenize.TextStream(
      tok, stop_ids=stop_ids, stop=options.stop, kept_special=markers - {None}
    )
    self._before_call = detokenize.StopStrings([tools_lib.OPENING[style]] if tools else [])
    self._logprobs: collections.deque[tuple[responses.TokenLogprob, int]] = collections.deque()
    self._num_said = self._num_seen = 0  # bytes

  @property
  def num_tokens(self) -> int:
    return self._text.num_tokens

  def take(
    self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[engine.Top] = ()
  ) -> bool:
    """Tokens of the engine; whether the answer has ended by what is in them."""
    num_before = self._text.num_tokens
    text = self._before_call.push(self._text.push(tokens))
    if self.options.want_logprobs:
      num_taken = self._text.num_tokens - num_before
      tops = list(tops) or [()] * len(tokens)
      self._note(tokens[:num_taken], logprobs[:num_taken], tops[:num_taken])
    if text:
      self._put(text)
    return self._text.finish_reason is not None

  def end(self, reason: str, stats: Any = None) -> responses.Usage:
    """Says what was held back, the calls, the finish reason and the usage."""
    text = self._before_call.push(self._text.finish("length" if reason == "length" else "stop"))
    calls: tuple[tools_lib.Call, ...] = ()
    if self._before_call.found is not None:
      body = self._before_call.found + self._before_call.rest
      parsed = tools_lib.parse(body, self._tools, self._style)
      text, calls = text + parsed.content, parsed.calls
    else:
      text += self._before_call.finish()
    finish = self._text.finish_reason or "stop"
    finish = "tool_calls" if calls and finish == "stop" else finish
    usage = responses.Usage(
      prompt_tokens=len(self.request.prompt),
      completion_tokens=self._text.num_tokens,
      cached_tokens=getattr(stats, "cached_tokens", 0),
    )
    self._put(text, calls=calls, finish_reason=finish, usage=usage)
    return usage

  def fail(self, error: schemas.ApiError) -> None:
    self.send(responses.Delta(error=error))

  def _note(self, tokens, logprobs, tops) -> None:
    for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
      if token in self._stop_ids:
        continue
      named = self._named(token, logprob)
      others = tuple(self._named(*pair) for pair in top[: self.options.num_top])
      self._logprobs.append((dataclasses.replace(named, top=others), self._num_seen))
      self._num_seen += len(named.data)

  def _named(self, token: int, logprob: float) -> responses.TokenLogprob:
    data = self._tok.decode_bytes([token], skip_special=False)
    return responses.TokenLogprob(data.decode("utf-8", errors="replace"), data, logprob)

  def _put(self, text: str, **fields: Any) -> None:
    """Sends text with the log-probabilities of the tokens that begin in it."""
    self._num_said += len(text.encode())
    said = []
    is_last = fields.get("finish_reason") is not None
    cut = self._num_said if not (is_last and self._text.stop_string is None) else self._num_seen + 1
    while self._logprobs and self._logprobs[0][1] < cut:
      said.append(self._logprobs.popleft()[0])
    self.send(responses.Delta(text=text, logprobs=tuple(said), **fields))
