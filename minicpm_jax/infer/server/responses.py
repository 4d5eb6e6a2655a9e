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
  """What an answer grew by. The last one has a finish_reason and usage, or an error."""

  text: str = ""
  logprobs: tuple[TokenLogprob, ...] = ()
  calls: tuple[tools_lib.Call, ...] = ()
  finish_reason: str | None = None
  usage: Usage | None = None
  error: schemas.ApiError | None = None

  @property
  def is_last(self) -> bool:
    return self.finish_reason is not None or self.error is not None


class Formatter:
  """Deltas of one answer to JSON objects."""

  def __init__(self, kind: schemas.Kind, model: str, options: schemas.Options):
    self.kind, self.options = kind, options
    prefix = "chatcmpl" if kind == "chat" else "cmpl"
    self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
    self._model = model
    self._offset = 0  # characters so far
    self._num_calls = 0

  def opening(self) -> list[dict[str, Any]]:
    """Chunks in front of the first delta."""
    if self.kind == "completion":
      return []
    return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

  def chunks(self, delta: Delta) -> list[dict[str, Any]]:
    """Stream chunks of one delta."""
    out = []
    if delta.text or delta.logprobs:
      logprobs = self._logprobs(delta.logprobs)
      if self.kind == "chat":
        out.append(self._chunk({"delta": {"content": delta.text}, "logprobs": logprobs}))
      else:
        out.append(self._chunk({"text": delta.text, "logprobs": logprobs}))
      self._offset += len(delta.text)
    if delta.calls:
      out.append(self._chunk({"delta": {"tool_calls": self._calls(delta.calls, index=True)}}))
    if delta.finish_reason is not None:
      last = {"delta": {}} if self.kind == "chat" else {"text": "", "logprobs": None}
      out.append(self._chunk(last | {"finish_reason": delta.finish_reason}))
      if self.options.include_usage and delta.usage is not None:
        usage = self._chunk({})
        out.append(usage | {"choices": [], "usage": delta.usage.body()})
    return out

  def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The answer in one object; raises the ApiError of a failed one."""
    last = deltas[-1]
    if last.error is not None:
      raise last.error
    text = "".join(delta.text for delta in deltas)
    calls = [call for delta in deltas for call in delta.calls]
    logprobs = self._logprobs([token for delta in deltas for token in delta.logprobs])
    if not self.options.want_logprobs:
      logprobs = None
    choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": last.finish_reason}
    if self.kind == "completion":
      choice["text"] = text
    else:
      message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
      if calls:
        message["content"] = text.strip() or None
        message["tool_calls"] = self._calls(calls)
      choice["message"] = message
    name = "chat.completion" if self.kind == "chat" else "text_completion"
    usage = last.usage.body() if last.usage is not None else None
    return self._head | {
      "object": name,
      "model": self._model,
      "choices": [choice],
      "usage": usage,
    }

  def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
    name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
    choice = {"index": 0, "finish_reason": None} | choice
    chunk = self._head | {"object": name, "model": self._model, "choices": [choice]}
    return chunk | ({"usage": None} if self.options.include_usage else {})

  def _calls(self, calls: Sequence[tools_lib.Call], *, index: bool = False) -> list[dict[str, Any]]:
    out = []
    for call in calls:
      arguments = json.dumps(call.arguments, ensure_ascii=False)
      item = {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
      }
      out.append({"index": self._num_calls} | item if index else item)
      self._num_calls += 1
    return out

  def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not self.options.want_logprobs:
      return None
    if self.kind == "chat":
      content = [
        {"token": t.text, "logprob": t.logprob, "bytes": list(t.data), "top_logprobs": []}
        for t in tokens
      ]
      return {"content": content, "refusal": None}
    offsets, offset = [], self._offset
    for token in tokens:
      offsets.append(offset)
      offset += len(token.text)
    return {
      "tokens": [t.text for t in tokens],
      "token_logprobs": [t.logprob for t in tokens],
      "top_logprobs": None,
      "text_offset": offsets,
    }
