"""Answers in OpenAI's form: whole objects, stream chunks, token log-probabilities, usage."""

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from minicpm_jax.infer.server import schemas
from minicpm_jax.text import tools as tools_lib


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """One token of the answer, the bare model's log-probability of it."""

  text: str
  data: bytes
  logprob: float
  top: tuple["TokenLogprob", ...] = ()  # the most likely tokens of its place, best first


@dataclasses.dataclass(frozen=True)
class Usage:
  prompt_tokens: int
  completion_tokens: int  # generated, the ending token included
  cached_tokens: int = 0  # of the prompt, not computed again

  def body(self) -> dict[str, Any]:
    return {
      "prompt_tokens": self.prompt_tokens,
      "completion_tokens": self.completion_tokens,
      "total_tokens": self.prompt_tokens + self.completion_tokens,
      "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
    }


@dataclasses.dataclass(frozen=True)
class Delta:
  """What one choice of an answer grew by. Its last one has a finish_reason and usage, or an error.

  num_left, of the end of a choice: others that go on; the usage of the last is that of all.
  """

  text: str = ""
  logprobs: tuple[TokenLogprob, ...] = ()
  calls: tuple[tools_lib.Call, ...] = ()
  finish_reason: str | None = None
  usage: Usage | None = None
  error: schemas.ApiError | None = None
  index: int = 0
  num_left: int = 0

  @property
  def is_end(self) -> bool:
    """The choice has ended."""
    return self.finish_reason is not None or self.error is not None

  @property
  def is_last(self) -> bool:
    """The whole answer has ended; an error ends all choices."""
    return self.error is not None or (self.finish_reason is not None and not self.num_left)


class Formatter:
  """Deltas of one answer to JSON objects."""

  def __init__(self, kind: schemas.Kind, model: str, options: schemas.Options):
    self.kind, self.options = kind, options
    prefix = "chatcmpl" if kind == "chat" else "cmpl"
    self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
    self._model = model
    self._offsets = [0] * options.num_choices  # characters so far, by choice
    self._num_calls = [0] * options.num_choices

  def opening(self) -> list[dict[str, Any]]:
    """Chunks in front of the first delta."""
    if self.kind == "completion":
      return []
    role = {"delta": {"role": "assistant", "content": ""}}
    return [self._chunk({"index": i} | role) for i in range(self.options.num_choices)]

  def chunks(self, delta: Delta) -> list[dict[str, Any]]:
    """Stream chunks of one delta."""
    out, at = [], {"index": delta.index}
    if delta.text or delta.logprobs:
      more = {"logprobs": self._logprobs(delta.logprobs, delta.index)}
      more |= {"delta": {"content": delta.text}} if self.kind == "chat" else {"text": delta.text}
      out.append(self._chunk(at | more))
      self._offsets[delta.index] += len(delta.text)
    if delta.calls:
      calls = self._calls(delta.calls, delta.index, is_streamed=True)
      out.append(self._chunk(at | {"delta": {"tool_calls": calls}}))
    if delta.finish_reason is not None:
      last = {"delta": {}} if self.kind == "chat" else {"text": "", "logprobs": None}
      out.append(self._chunk(at | last | {"finish_reason": delta.finish_reason}))
      if self.options.include_usage and delta.usage is not None and delta.is_last:
        usage = self._chunk({})
        out.append(usage | {"choices": [], "usage": delta.usage.body()})
    return out

  def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The answer in one object; raises the ApiError of a failed one."""
    last = deltas[-1]
    if last.error is not None:
      raise last.error
    choices = [
      self._choice(i, [delta for delta in deltas if delta.index == i])
      for i in range(self.options.num_choices)
    ]
    name = "chat.completion" if self.kind == "chat" else "text_completion"
    usage = last.usage.body() if last.usage is not None else None
    return self._head | {
      "object": name,
      "model": self._model,
      "choices": choices,
      "usage": usage,
    }

  def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
    text = "".join(delta.text for delta in deltas)
    calls = [call for delta in deltas for call in delta.calls]
    logprobs = self._logprobs([token for delta in deltas for token in delta.logprobs], index)
    choice: dict[str, Any] = {"index": index, "logprobs": logprobs}
    choice["finish_reason"] = deltas[-1].finish_reason
    if self.kind == "completion":
      return choice | {"text": text}
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
      message["content"] = text.strip() or None
      message["tool_calls"] = self._calls(calls, index)
    return choice | {"message": message}

  def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
    name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
    choice = {"index": 0, "finish_reason": None} | choice
    chunk = self._head | {"object": name, "model": self._model, "choices": [choice]}
    return chunk | ({"usage": None} if self.options.include_usage else {})

  def _calls(
    self, calls: Sequence[tools_lib.Call], choice: int, *, is_streamed: bool = False
  ) -> list[dict[str, Any]]:
    out = []
    for call in calls:
      arguments = json.dumps(call.arguments, ensure_ascii=False)
      item = {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
      }
      out.append({"index": self._num_calls[choice]} | item if is_streamed else item)
      self._num_calls[choice] += 1
    return out

  def _logprobs(self, tokens: Sequence[TokenLogprob], choice: int) -> dict[str, Any] | None:
    if not self.options.want_logprobs:
      return None
    if self.kind == "chat":
      one = lambda t: {"token": t.text, "logprob": t.logprob, "bytes": list(t.data)}  # noqa: E731
      content = [one(t) | {"top_logprobs": [one(other) for other in t.top]} for t in tokens]
      return {"content": content, "refusal": None}
    offsets, offset = [], self._offsets[choice]
    for token in tokens:
      offsets.append(offset)
      offset += len(token.text)
    return {
      "tokens": [t.text for t in tokens],
      "token_logprobs": [t.logprob for t in tokens],
      "top_logprobs": [_best_by_text(t.top) for t in tokens] if self.options.num_top else None,
      "text_offset": offsets,
    }


def _best_by_text(tokens: Sequence[TokenLogprob]) -> dict[str, float]:
  """The form of completions: by text, so of tokens that are spelled alike the best one stays."""
  found: dict[str, float] = {}
  for token in tokens:
    found.setdefault(token.text, token.logprob)
  return found
