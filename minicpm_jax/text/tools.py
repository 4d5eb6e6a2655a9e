"""Tools: their schemas, how calls stand in a model's text, and back to calls.

Three styles (models.md 8):
  python  MiniCPM3/4: <|tool_call_start|>, a Python fence with one call a line, <|tool_call_end|>
  xml     MiniCPM5: <function name="N"><param name="P">V</param></function>
  json    <tool_call>{"name": ..., "arguments": {...}}</tool_call> (Hermes, Qwen)
A call that cannot be read, or that names no offered tool, stays text and is reported in `errors`.
"""

import ast
import contextlib
import dataclasses
import io
import itertools
import json
import keyword
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from minicpm_jax.text import tool_schema

Style = Literal["python", "xml", "json"]
OPENING = {"python": "<|tool_call_start|>", "xml": "<function name=", "json": "<tool_call>"}
BEFORE = {"python": "<|tool_call_start|>\n```python\n", "xml": "", "json": "<tool_call>\n"}
AFTER = {"python": "\n```\n<|tool_call_end|>", "xml": "", "json": "\n</tool_call>"}
MARKERS = ("<|tool_call_start|>", "<|tool_call_end|>", "<tool_call>", "</tool_call>")
MARKERS += ("<function", "</function>", "<param", "</param>")
_RENAMED = "_reserved_"  # in front of a keyword argument that is a reserved word of Python

ToolError = tool_schema.ToolError
check_schema = tool_schema.check


@dataclasses.dataclass(frozen=True)
class Tool:
  """One function; `wire_name` is the Python identifier that the model sees."""

  name: str
  description: str
  parameters: Mapping[str, Any]  # JSON schema of an object
  wire_name: str

  @property
  def properties(self) -> Mapping[str, Any]:
    return self.parameters.get("properties") or {}


@dataclasses.dataclass(frozen=True)
class Call:
  name: str
  arguments: dict[str, Any]

  def __post_init__(self):
    try:
      json.dumps(self.arguments, allow_nan=False)
    except ValueError as error:  # NaN and 1e999 come through Python's readers
      raise ToolError(f"{self.name}: found {self.arguments!r:.60}, expected JSON") from error


@dataclasses.dataclass(frozen=True)
class Parsed:
  """An answer taken apart: the text around the calls, the calls, why others were not taken."""

  content: str
  calls: tuple[Call, ...]
  errors: tuple[str, ...]


def read_tools(tools: Any) -> tuple[Tool, ...]:
  """OpenAI's tool list ({"type": "function", "function": {...}} or flat entries), checked."""
  if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
    raise ToolError(f"tools: found {tools!r:.60}, expected a list")
  out: list[Tool] = []
  for index, entry in enumerate(tools):
    where = f"tools[{index}]"
    if not isinstance(entry, Mapping) or entry.get("type", "function") != "function":
      raise ToolError(f'{where}: found {entry!r:.60}, expected {{"type": "function", ...}}')
    function = entry.get("function", entry)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
      raise ToolError(f"{where}.function.name: found {name!r}, expected 1-64 of a-z A-Z 0-9 _ - .")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    kind = parameters.get("type", "object") if isinstance(parameters, Mapping) else None
    if kind not in tool_schema.OBJECT:
      raise ToolError(f"{where}.function.parameters: expected the JSON schema of an object")
    tool_schema.check(f"{where}.function.parameters", parameters)
    parameters = tool_schema.plain(parameters)
    wire = re.sub(r"\W", "_", name)
    wire = f"_{wire}" if wire[0].isdigit() else wire
    wire = f"{wire}_" if keyword.iskeyword(wire) else wire
    if name in [tool.name for tool in out]:
      raise ToolError(f"{where}.function.name: found {name!r} twice")
    while wire in [word for tool in out for word in (tool.name, tool.wire_name)]:
      wire += "_"  # a-b beside a_b
    out.append(Tool(name, str(function.get("description") or ""), parameters, wire))
  return tuple(out)


def style_of(template: str) -> Style:
  """How a chat template writes calls; "python" where it does not tell."""
  if "<function name=" in template:
    return "xml"
  return "json" if "<tool_call>" in template else "python"


def handles_tools(template: str) -> bool:
  """Whether a chat template shows the tools to the model itself."""
  return re.search(r"\btools\b", template) is not None


# --- Into the prompt --------------------------------------------------------------------------


def with_instructions(
  messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
  """Messages for a template that knows nothing of tools: they go into the system turn.

  Tools are shown as Python signatures, calls of earlier turns as the model wrote them (the form of
  MiniCPM's function-calling demo), results as turns of the role "tool".
  """
  text = (
    "You can call these functions:\n```python\n"
    + "\n\n".join(map(signature, tools))
    + "\n```\nTo call, write one call a line with keyword arguments, and nothing after it:\n"
    + BEFORE["python"]
    + "name(argument=value)"
    + AFTER["python"]
  )
  out = []
  for message in messages:
    message = dict(message)
    calls = message.pop("tool_calls", None) or []
    if calls:
      block = render_calls([call_of(c) for c in calls], "python", tools)
      message["content"] = (message.get("content") or "") + block
    out.append(message)
  if out and out[0]["role"] == "system":
    out[0]["content"] = f"{out[0]['content']}\n\n{text}"
    return out
  return [{"role": "system", "content": text}, *out]


def signature(tool: Tool) -> str:
  """A Python stub: def name(city: str, days: int = None), with the description below."""
  names = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}
  names |= {"array": "list", "object": "dict", "null": "None"}
  required = tool.parameters.get("required") or ()
  parts, notes = [], []
  for key, field in tool.properties.items():
    field = field if isinstance(field, Mapping) else {}
    kind = " | ".join(names.get(kind, "object") for kind in tool_schema.kinds_of(field) or ["any"])
    parts.append(f"{key}: {kind}" + ("" if key in required else " = None"))
    about = [str(field["description"])] if field.get("description") else []
    about += [f"one of {field['enum']!r}"] if field.get("enum") else []
    notes += [f"  {key}: {'; '.join(about)}"] if about else []
  body = "\n".join([f'  """{tool.description}', *notes]) + '"""'
  return f"def {tool.wire_name}({', '.join(parts)}):\n{body}"


def call_of(item: Mapping[str, Any]) -> Call:
  """A call of a message: OpenAI's form, whose arguments are JSON text, or with a dict."""
  function = item.get("function", item) if isinstance(item, Mapping) else None
  if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
    raise ToolError(f"tool_calls: found {item!r:.80}, expected a function with a name")
  arguments = function.get("arguments") or {}
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments)
    except json.JSONDecodeError as error:
      raise ToolError(f"tool_calls: arguments of {function['name']!r}: {error}") from error
  if not isinstance(arguments, Mapping):
    raise ToolError(f"tool_calls: arguments of {function['name']!r}: expected an object")
  return Call(function["name"], dict(arguments))


def render_calls(calls: Sequence[Call], style: Style, tools: Sequence[Tool] = ()) -> str:
  """Calls as a model of this style writes them."""
  wire = {tool.name: tool.wire_name for tool in tools}
  if style == "python":
    lines = []
    for call in calls:
      arguments = ", ".join(f"{k}={_source(v)}" for k, v in call.arguments.items())
      lines.append(f"{wire.get(call.name, call.name)}({arguments})")
    return BEFORE["python"] + "\n".join(lines) + AFTER["python"]
  if style == "json":
    bodies = [{"name": c.name, "arguments": c.arguments} for c in calls]
    texts = [json.dumps(body, ensure_ascii=False) for body in bodies]
    return "\n".join(BEFORE["json"] + text + AFTER["json"] for text in texts)
  return "\n".join(
    f'<function name="{c.name}">'
    + "".join(f'<param name="{k}">{_xml_value(v)}</param>' for k, v in c.arguments.items())
    + "</function>"
    for c in calls
  )


def _source(value: Any) -> str:
  """A JSON value as Python source, strings in double quotes."""
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  if isinstance(value, list | tuple):
    return "[" + ", ".join(map(_source, value)) + "]"
  if isinstance(value, Mapping):
    return "{" + ", ".join(f"{_source(k)}: {_source(v)}" for k, v in value.items()) + "}"
  return repr(value)


def _xml_value(value: Any) -> str:
  if not isinstance(value, str):
    return str(value)
  return f"<![CDATA[{value}]]>" if re.search(r"[<&\n]", value) else value


# --- Out of the answer ------------------------------------------------------------------------


def parse(text: str, tools: Sequence[Tool], style: Style) -> Parsed:
  """Calls in an answer. Broken and unknown calls stay in the content, with the reason."""
  pattern = {
    "python": r"<\|tool_call_start\|>(?P<body>.*?)(?:<\|tool_call_end\|>|\Z)",
    "json": r"<tool_call>(?P<body>.*?)(?:</tool_call>|\Z)",
    "xml": r'(?P<body><function name="[^"]*">(?:<!\[CDATA\[.*?\]\]>|.)*?</function>)',
  }[style]
  read = {"python": _read_python, "json": _read_json, "xml": _read_xml}[style]
  calls: list[Call] = []
  errors: list[str] = []
  kept, position = [], 0
  for match in re.finditer(pattern, text, re.DOTALL):
    if match.start() < position:
      continue  # inside a string of the call before
    try:
      found, end = _read_longer(read, match, text, tools, style)
    except _UNREADABLE as error:
      errors.append(f"{style} call at character {match.start()}: {error}")
      continue
    calls += found
    kept.append(text[position : match.start()])
    position = end
  content = "".join([*kept, text[position:]])
  return Parsed(content.strip() if calls else content, tuple(calls), tuple(errors))


_UNREADABLE = (ToolError, SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)


def _read_longer(
  read: Any, match: re.Match[str], text: str, tools: Sequence[Tool], style: Style
) -> tuple[list[Call], int]:
  """(calls, end) of a match; where it cannot be read its closing marker may stand in a string,
  and the next ones are tried. The error is the first one's."""
  try:
    return read(match["body"], tools), match.end()
  except _UNREADABLE:
    closing = AFTER[style].strip("`\n") or "</function>"
    start = match.start("body")
    for other in itertools.islice(re.finditer(re.escape(closing), text), 64):
      end = other.end() if style == "xml" else other.start()
      if end > match.end():
        with contextlib.suppress(*_UNREADABLE):
          return read(text[start:end], tools), other.end()
    raise


def _find(name: str, tools: Sequence[Tool], *, is_wire: bool = False) -> Tool:
  by_name = {tool.name: tool for tool in tools}
  by_wire = {tool.wire_name: tool for tool in tools}
  found = (by_name | by_wire if is_wire else by_wire | by_name).get(name)
  if found is not None:
    return found
  offered = ", ".join(tool.name for tool in tools)
  raise ToolError(f"found the name {name!r}, expected one of {offered}")


def _read_python(body: str, tools: Sequence[Tool]) -> list[Call]:
  body = re.sub(r"\A\s*```(?:python|py)?[ \t]*\n|\n?```\s*\Z", "", body).strip()
  if body.startswith(("{", "[")):
    return _read_json(body, tools)
  statements = ast.parse(_rename_reserved(body)).body
  if not statements:
    raise ToolError("found no call")
  return [_python_call(statement, tools) for statement in statements]


def _python_call(statement: ast.stmt, tools: Sequence[Tool]) -> Call:
  node = statement.value if isinstance(statement, ast.Expr) else None
  if not isinstance(node, ast.Call):
    raise ToolError(f"found {ast.unparse(statement)[:60]!r}, expected a call")
  tool = _find(ast.unparse(node.func), tools, is_wire=True)
  names = list(tool.properties)
  if len(node.args) > len(names):
    raise ToolError(f"{tool.name}: found {len(node.args)} positional arguments of {len(names)}")
  arguments = {name: _literal(arg) for name, arg in zip(names, node.args, strict=False)}
  for argument in node.keywords:
    if argument.arg is None:
      raise ToolError(f"{tool.name}: found **, expected name=value")
    name = argument.arg.removeprefix(_RENAMED)
    if name in arguments:
      raise ToolError(f"{tool.name}: found the argument {name!r} twice")
    arguments[name] = _literal(argument.value)
  return Call(tool.name, arguments)


def _literal(node: ast.expr) -> Any:
  """The value of a literal; JSON's true, false and null count."""
  if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
    return {"true": True, "false": False, "null": None}[node.id]
  if isinstance(node, ast.List | ast.Tuple):
    return [_literal(item) for item in node.elts]
  if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
    keys = [_literal(key) for key in node.keys]
    if not all(isinstance(key, str) for key in keys):
      raise ToolError(f"found the keys {keys!r:.60}, expected strings")
    return dict(zip(keys, map(_literal, node.values), strict=True))
  value = ast.literal_eval(node)
  if not isinstance(value, str | int | float | bool | None):
    raise ToolError(f"found {ast.unparse(node)[:60]!r}, expected a JSON value")
  return value


def _rename_reserved(source: str) -> str:
  """`f(from="a")` is no Python: reserved words in front of `=` inside brackets get a prefix."""
  if not re.search(r"\b(" + "|".join(keyword.kwlist) + r")\s*=", source):
    return source
  tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  lines = source.split("\n")  # splitlines would also cut at U+0085
  depth, found = 0, []
  for token, following in zip(tokens, tokens[1:], strict=False):
    depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
    if depth == 1 and token.type == tokenize.NAME and keyword.iskeyword(token.string):
      found += [token.start] if following.string == "=" else []
  for row, column in reversed(found):
    line = lines[row - 1]
    lines[row - 1] = line[:column] + _RENAMED + line[column:]
  return "\n".join(lines)


def _read_json(body: str, tools: Sequence[Tool]) -> list[Call]:
  items = json.loads(body)
  calls = []
  for item in items if isinstance(items, list) else [items]:
    call = call_of(item)
    calls.append(Call(_find(call.name, tools).name, call.arguments))
  if not calls:
    raise ToolError("found no call")
  return calls


def _read_xml(body: str, tools: Sequence[Tool]) -> list[Call]:
  tool = _find(re.match(r'<function name="([^"]*)"', body)[1], tools)
  value = r"(?:<!\[CDATA\[(?P<cdata>.*?)\]\]>|(?P<plain>.*?))"
  pattern = rf'<param name="(?P<name>[^"]*)">{value}</param>'
  arguments = {}
  for match in re.finditer(pattern, body, re.DOTALL):
    field = tool.properties.get(match["name"])
    text = match["cdata"] if match["cdata"] is not None else match["plain"]
    kinds = set(tool_schema.kinds_of(field) or ())
    is_string = kinds == {"string"} or match["cdata"] is not None
    is_string |= kinds == {"string", "null"} and text not in ("None", "null")
    arguments[match["name"]] = text if is_string else _value_of(text)
  return [Call(tool.name, arguments)]


def _value_of(text: str) -> Any:
  """A value without a known type: JSON, else a Python literal, else the text."""
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    pass
  try:
    return _literal(ast.parse(text.strip(), mode="eval").body)
  except (ValueError, SyntaxError, RecursionError):
    return text
