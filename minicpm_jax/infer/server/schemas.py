"""Requests of the OpenAI API as checked dataclasses, and its error bodies.

Fields: OpenAI's, CPM.cu's (the same names) and top_k, min_p, repetition_penalty, grammar,
enable_thinking, chat_template_kwargs. Fields that ask for what is not built (logit_bias, best_of,
...) are refused unless they hold their neutral value; unknown fields are refused.
"""

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from minicpm_jax import config
from minicpm_jax.text import tools as tools_lib

MAX_STOPS = 16  # stop strings of a request
MAX_DEPTH = 100  # levels of a body: objects and lists in each other
MAX_CHOICES = 16  # answers to one request
MAX_TOP = {"chat": 20, "completion": 5}  # most likely tokens beside each of the answer's (OpenAI's)
Kind = Literal["chat", "completion"]

# Accepted and without effect here: they describe the caller, not the answer.
_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_UNUSED_PARTS = ("image_url", "input_audio", "file")  # of a message's content
# Not built: only these values are accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "best_of": (1,),
  "presence_penalty": (0, 0.0),
  "frequency_penalty": (0, 0.0),
  "logit_bias": ({},),
  "suffix": ("",),
  "echo": (False,),
  "parallel_tool_calls": (True,),
  "modalities": (["text"],),
}
# Of a chat template, not to be said in chat_template_kwargs.
_OWN_ARGUMENTS = {"messages", "tools", "tok", "template", "tokenizer_or_template"}
_OWN_ARGUMENTS |= {"bos_token", "eos_token", "pad_token"}


class ApiError(Exception):
  """An answer with an HTTP status and OpenAI's error body."""

  def __init__(
    self,
    message: str,
    *,
    status: int = 400,
    param: str | None = None,
    code: str | None = None,
  ):
    super().__init__(message)
    self.message, self.status, self.param, self.code = message, status, param, code

  def body(self) -> dict[str, Any]:
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    kind = "rate_limit_error" if self.status == 429 else kind
    error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
    return {"error": error}


@dataclasses.dataclass(frozen=True)
class Format:
  """What constrains the answer: kind of grammar and its argument."""

  kind: Literal["json_object", "json_schema", "lark", "regex", "choice", "sql", "tools"]
  value: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What chat and text completions have in common."""

  sampling: config.SamplingConfig  # max_new_tokens as asked for
  stop: tuple[str, ...] = ()
  stream: bool = False
  include_usage: bool = False
  want_logprobs: bool = False
  num_top: int = 0  # most likely tokens wanted beside each token of the answer
  num_choices: int = 1
  format: Format | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody:
  messages: tuple[dict[str, Any], ...]
  tools: tuple[tools_lib.Tool, ...] = ()
  tool_entries: tuple[dict[str, Any], ...] = ()  # as they came, for the template
  template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  options: Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionBody:
  prompt: str | tuple[int, ...]
  options: Options


def read_json(data: bytes) -> dict[str, Any]:
  """The object of a request body; 400 where it is none."""
  try:
    body = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ApiError(f"body: not valid JSON: {error}") from error
  if not isinstance(body, dict):
    raise ApiError(f"body: found a {type(body).__name__}, expected a JSON object")
  return body


def parse_chat(body: Mapping[str, Any], limits: config.ServerConfig) -> ChatBody:
  """A request of /v1/chat/completions."""
  _check_body(body)
  fields = _Fields(body)
  messages = _messages(fields)
  entries = fields.take("tools", list, [])
  try:
    tools = tools_lib.read_tools(entries)
  except tools_lib.ToolError as error:
    raise ApiError(str(error), param="tools") from error
  forced = _tool_choice(fields, tools)
  if forced == ():  # "none": the model does not see them
    tools, entries = (), []
  arguments = dict(fields.take("chat_template_kwargs", dict, {}))
  for name in _OWN_ARGUMENTS & set(arguments):
    message = f"chat_template_kwargs: found {name!r}, which the server gives the template itself"
    raise ApiError(message, param="chat_template_kwargs")
  thinking = fields.take("enable_thinking", bool, None)
  if thinking is not None:
    arguments["enable_thinking"] = thinking
  wants_logprobs = fields.take("logprobs", bool, False)
  num_top = fields.take("top_logprobs", int, 0, 0, MAX_TOP["chat"])
  if num_top and not wants_logprobs:
    raise ApiError(
      "top_logprobs: found without logprobs, expected logprobs: true", param="logprobs"
    )
  limit = fields.take("max_completion_tokens", int, None, 1, limits.max_tokens)
  options = _options(fields, limits, limit, wants_logprobs, num_top, forced or ())
  return ChatBody(
    messages=messages,
    tools=tools,
    tool_entries=tuple(entries),
    template_arguments=arguments,
    options=options,
  )


def parse_completion(body: Mapping[str, Any], limits: config.ServerConfig) -> CompletionBody:
  """A request of /v1/completions: one prompt, as text or as token ids."""
  _check_body(body)
  fields = _Fields(body)
  prompt = fields.take("prompt", (str, list), None)
  if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
    prompt = prompt[0]
  if isinstance(prompt, list):
    if not prompt or not all(type(token) is int for token in prompt):
      raise ApiError("prompt: found a list, expected one text or one list of ids", param="prompt")
    prompt = tuple(prompt)
  elif not isinstance(prompt, str):
    raise ApiError(f"prompt: found {prompt!r}, expected a text or a list of ids", param="prompt")
  num_top = fields.take("logprobs", int, None, 0, MAX_TOP["completion"])
  options = _options(fields, limits, None, num_top is not None, num_top or 0, ())
  return CompletionBody(prompt=prompt, options=options)


# --- Parts ------------------------------------------------------------------------------------


def _check_body(body: Mapping[str, Any]) -> None:
  """Bounds the nesting, before something recurses into it, and refuses half surrogate pairs.

  JSON may escape half of such a pair; no tokenizer and no answer can hold it.
  """
  level, depth = [body], 0
  while level := [y for x in level for y in _children(x)]:
    depth += 1
    if depth > MAX_DEPTH:
      raise ApiError(f"body: found more than {MAX_DEPTH} levels of nesting, expected at most that")
  try:
    json.dumps(body, ensure_ascii=False, default=str).encode()
  except UnicodeEncodeError as error:
    found = error.object[error.start]
    raise ApiError(f"body: found half a surrogate pair, {found!r}, expected text") from error


def _children(value: Any) -> Any:
  return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


class _Fields:
  """Takes fields out of a body one by one; what is left at the end is unknown."""

  def __init__(self, body: Mapping[str, Any]):
    self._left = dict(body)

  def take(self, name: str, kind: Any, default: Any, low: Any = None, high: Any = None) -> Any:
    """The field, checked: type `kind`, low <= value <= high; null and absent give the default."""
    value = self._left.pop(name, None)
    if value is None:
      return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if float in kinds and type(value) is int:
      value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) not in kinds:
      names = " or ".join(k.__name__ for k in kinds)
      raise ApiError(f"{name}: found {value!r:.80}, expected {names}", param=name)
    if isinstance(value, float) and not math.isfinite(value):
      raise ApiError(f"{name}: found {value!r}, expected a finite number", param=name)
    if (low is not None and value < low) or (high is not None and value > high):
      raise ApiError(f"{name}: found {value!r}, expected {low}..{high}", param=name)
    return value

  def close(self) -> None:
    """Refuses what is left, but for fields without effect and neutral values."""
    for name, value in self._left.items():
      if name in _NO_EFFECT or value is None:
        continue
      if name not in _NEUTRAL:
        raise ApiError(f"{name}: unknown field", param=name, code="unknown_parameter")
      if value not in _NEUTRAL[name]:
        expected = _NEUTRAL[name][0]
        raise ApiError(
          f"{name}: found {value!r:.80}, but only {expected!r} is supported",
          param=name,
          code="unsupported_value",
        )


def _options(
  fields: _Fields,
  limits: config.ServerConfig,
  max_tokens: int | None,
  wants_logprobs: bool,
  num_top: int,
  forced: tuple[tools_lib.Tool, ...],
) -> Options:
  fields.take("model", str, None)  # one model is served, under any name
  asked = fields.take("max_tokens", int, None, 1, limits.max_tokens)
  seed = fields.take("seed", int, None, -(2**63), 2**63 - 1)
  default = limits.sampling
  penalty = fields.take("repetition_penalty", float, default.repetition_penalty, 0.0, 10.0)
  top_k = fields.take("top_k", int, default.top_k, -1, 2**31 - 1)
  sampling = dict(
    temperature=fields.take("temperature", float, default.temperature, 0.0, 2.0),
    top_k=max(0, top_k),  # -1 is vLLM's "off"
    top_p=fields.take("top_p", float, default.top_p, 0.0, 1.0),
    min_p=fields.take("min_p", float, default.min_p, 0.0, 1.0),
    repetition_penalty=penalty,
    max_new_tokens=max_tokens or asked or limits.default_max_tokens,
    seed=secrets.randbits(31) if seed is None else seed % 2**31,
  )
  try:
    checked = config.SamplingConfig(**sampling)
  except ValueError as error:
    message = str(error).removeprefix("sampling.")
    raise ApiError(message, param=message.partition(":")[0]) from error
  stream = fields.take("stream", bool, False)
  stream_options = _Fields(fields.take("stream_options", dict, {}))
  include_usage = stream_options.take("include_usage", bool, False)
  stream_options.close()
  options = Options(
    sampling=checked,
    stop=_stop(fields),
    stream=stream,
    include_usage=include_usage,
    want_logprobs=wants_logprobs,
    num_top=num_top,
    num_choices=_num_choices(fields, limits.max_queue),
    format=_format(fields, forced),
  )
  fields.close()
  return options


def _num_choices(fields: _Fields, max_queue: int) -> int:
  """Each choice waits in the queue: more than it holds could never be served (429 says "later")."""
  num = fields.take("n", int, 1, 1, MAX_CHOICES)
  if num > max_queue:
    message = f"n: found {num}, expected at most {max_queue}, as many as the queue holds"
    raise ApiError(message, param="n")
  return num


def _stop(fields: _Fields) -> tuple[str, ...]:
  stop = fields.take("stop", (str, list), [])
  stop = [stop] if isinstance(stop, str) else stop
  if len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
    message = f"stop: found {stop!r:.80}, expected at most {MAX_STOPS} texts that are not empty"
    raise ApiError(message, param="stop")
  return tuple(stop)


def _format(fields: _Fields, forced: tuple[tools_lib.Tool, ...]) -> Format | None:
  """The one constraint of response_format, grammar and tool_choice."""
  response = fields.take("response_format", dict, None)
  grammar = fields.take("grammar", (str, dict), None)
  found = []
  if response is not None and response.get("type") != "text":
    found.append(_response_format(response))
  if grammar is not None:
    found.append(_grammar(grammar))
  if forced:
    found.append(Format("tools", forced))
  if len(found) > 1:
    raise ApiError("response_format, grammar, tool_choice: found several, expected one of them")
  return found[0] if found else None


def _response_format(response: dict[str, Any]) -> Format:
  kind = response.get("type")
  if kind == "json_object":
    return Format("json_object")
  if kind == "json_schema":
    inner = response.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
      message = f"response_format.json_schema.schema: found {schema!r:.60}, expected an object"
      raise ApiError(message, param="response_format")
    return Format("json_schema", schema)
  message = f"response_format.type: found {kind!r:.60}, expected text, json_object or json_schema"
  raise ApiError(message, param="response_format")


def _grammar(grammar: str | dict[str, Any]) -> Format:
  """Lark text, or one of {"regex": text}, {"choice": [text]}, {"sql": {table: [column]} | true}."""
  if isinstance(grammar, str):
    return Format("lark", grammar)
  checks = {
    "lark": lambda v: isinstance(v, str),
    "regex": lambda v: isinstance(v, str),
    "choice": lambda v: isinstance(v, list) and all(isinstance(o, str) for o in v),
    "sql": lambda v: (
      v is True
      or isinstance(v, dict)
      and all(isinstance(c, list) and all(isinstance(n, str) for n in c) for c in v.values())
    ),
  }
  kind, value = next(iter(grammar.items()), (None, None))
  if len(grammar) != 1 or kind not in checks or not checks[kind](value):
    message = f"grammar: found {grammar!r:.80}, expected a text or one of {', '.join(checks)}"
    raise ApiError(message, param="grammar")
  return Format(kind, None if value is True else value)


def _tool_choice(
  fields: _Fields, tools: tuple[tools_lib.Tool, ...]
) -> tuple[tools_lib.Tool, ...] | None:
  """None = the model chooses, () = no tools, else the tools of which one must be called."""
  choice = fields.take("tool_choice", (str, dict), "auto")
  if choice in ("auto", "none"):
    return None if choice == "auto" else ()
  if not tools:
    raise ApiError("tool_choice: found without tools, expected tools", param="tool_choice")
  if choice == "required":
    return tools
  function = choice.get("function") if isinstance(choice, dict) else None
  name = function.get("name") if isinstance(function, dict) else choice
  chosen = tuple(tool for tool in tools if tool.name == name)
  if not chosen:
    names = ", ".join(tool.name for tool in tools)
    message = f"tool_choice: found {name!r:.60}, expected auto, none, required or one of {names}"
    raise ApiError(message, param="tool_choice")
  return chosen


def _messages(fields: _Fields) -> tuple[dict[str, Any], ...]:
  messages = fields.take("messages", list, None)
  if not messages:
    raise ApiError("messages: found none, expected at least one", param="messages")
  return tuple(_message(index, message) for index, message in enumerate(messages))


def _text_of_parts(where: str, parts: list[Any]) -> str:
  """The text parts of a content (CPM.cu's rule): images and the like beside them are not used."""
  texts = []
  for i, part in enumerate(parts):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _UNUSED_PARTS:
      continue
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
      expected = 'a part of text, {"type": "text", "text": ...}'
      raise ApiError(f"{where}[{i}]: found {part!r:.60}, expected {expected}", param="messages")
    texts.append(text)
  if parts and not texts:
    raise ApiError(f"{where}: found {parts!r:.60}, expected a part of text", param="messages")
  return "".join(texts)


def _message(index: int, message: Any) -> dict[str, Any]:
  where = f"messages[{index}]"
  roles = ("system", "developer", "user", "assistant", "tool")
  role = message.get("role") if isinstance(message, dict) else None
  if role not in roles:
    expected = ", ".join(roles)
    raise ApiError(
      f"{where}.role: found {role!r:.60}, expected one of {expected}", param="messages"
    )
  content = message.get("content")
  if isinstance(content, list):
    content = _text_of_parts(f"{where}.content", content)
  calls = message.get("tool_calls") or []
  if content is None and role == "assistant":
    content = ""
  if not isinstance(content, str):
    message_text = f"{where}.content: found {content!r:.60}, expected a text or a list of parts"
    raise ApiError(message_text, param="messages")
  out = {"role": "system" if role == "developer" else role, "content": content}
  out |= {key: message[key] for key in ("name", "tool_call_id") if key in message}
  if isinstance(message.get("reasoning_content"), str):
    out["reasoning_content"] = message["reasoning_content"]
  if calls:
    if not isinstance(calls, list):
      raise ApiError(f"{where}.tool_calls: found {calls!r:.60}, expected a list", param="messages")
    try:  # templates want arguments as objects
      read = [tools_lib.call_of(call) for call in calls]
    except (tools_lib.ToolError, TypeError) as error:
      raise ApiError(f"{where}.{error}", param="messages") from error
    out["tool_calls"] = [
      {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
      for call in read
    ]
  return out
