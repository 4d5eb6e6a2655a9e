"""Tool calls in three styles: there and back, what is refused, what the templates render."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.text import chat, templates, tools

WEATHER = {
  "type": "function",
  "function": {
    "name": "get-weather",
    "description": "Weather of a city.",
    "parameters": {
      "type": "object",
      "properties": {
        "city": {"type": "string", "description": "Its name"},
        "days": {"type": "integer"},
        "from": {"enum": ["a", "b"]},
        "extra": {},
      },
      "required": ["city"],
    },
  },
}
TOOLS = tools.read_tools([WEATHER, {"name": "now"}])
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=12),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20), st.integers(), VALUES, st.sampled_from(["python", "json", "xml"]))
def test_a_call_rendered_and_parsed_is_the_call(city, days, extra, style):
  if style == "xml" and ("]]>" in city or isinstance(extra, str)):
    return  # a string without a type in the schema is read as JSON first; CDATA cannot hold ]]>
  if style == "json" and "</tool_call>" in city:
    return
  arguments = {"city": city, "days": days, "from": "a", "extra": extra}
  call = tools.Call("get-weather", arguments)
  text = tools.render_calls([call, tools.Call("now", {})], style, TOOLS)
  parsed = tools.parse(f"Let me see. {text}", TOOLS, style)
  assert parsed.errors == ()
  assert parsed.calls == (call, tools.Call("now", {}))
  assert parsed.content == "Let me see."


def test_python_calls_as_models_write_them():
  def calls(body):
    parsed = tools.parse(f"<|tool_call_start|>\n{body}\n<|tool_call_end|>", TOOLS, "python")
    return [c.arguments for c in parsed.calls] if parsed.calls else parsed.errors[0]

  assert calls("```python\nget_weather('Bonn', -3)\n```") == [{"city": "Bonn", "days": -3}]
  assert calls('get_weather(city="a=b", extra=[true, null, (1, 2.5e3)])') == [
    {"city": "a=b", "extra": [True, None, [1, 2500.0]]}
  ]
  assert calls('get_weather(city="class = 1", from = "b")') == [{"city": "class = 1", "from": "b"}]
  assert calls('{"name": "get-weather", "arguments": {"city": "x"}}') == [{"city": "x"}]
  for body, reason in {
    "get_weather(city=open('x'))": "malformed",
    "get_weather(city='a', city='b')": "found the argument 'city' twice",
    "get_weather('a', city='b')": "found the argument 'city' twice",
    "get_weather(**{})": "found **",
    "get_weather('a', 1, 'a', 2, 3)": "found 5 positional arguments of 4",
    "get_weather(city=b'x')": "expected a JSON value",
    "rm_rf(path='/')": "found the name 'rm_rf', expected one of get-weather, now",
    "x = 1": "expected a call",
    "": "found no call",
    "get_weather(city='a": "",
  }.items():
    assert reason in calls(body), body


def test_what_cannot_be_read_stays_text():
  text = 'a <tool_call>{"name": "nope"}</tool_call> b <tool_call>{"name": "now"}</tool_call> c'
  parsed = tools.parse(text, TOOLS, "json")
  assert parsed.calls == (tools.Call("now", {}),)
  assert parsed.content == 'a <tool_call>{"name": "nope"}</tool_call> b  c'
  assert "found the name 'nope'" in parsed.errors[0]
  unfinished = 'x <function name="now"><param name='
  assert tools.parse(unfinished, TOOLS, "xml") == tools.Parsed(unfinished, (), ())
  for body in ('{"name": "now", "arguments": {"x": [NaN]}}', "now(x=1e999)"):
    found = tools.parse(f"<|tool_call_start|>\n{body}\n<|tool_call_end|>", TOOLS, "python")
    assert found.calls == () and "expected JSON" in found.errors[0]
  plain = " no call \n"
  assert tools.parse(plain, TOOLS, "python").content == plain


def test_minicpm5_parameters_take_their_type_from_the_schema():
  text = (
    '<function name="get-weather"><param name="city">12</param><param name="days">3</param>'
    "<param name=\"extra\">{'a': None, 'b': True}</param></function>"
  )
  (call,) = tools.parse(text, TOOLS, "xml").calls
  assert call.arguments == {"city": "12", "days": 3, "extra": {"a": None, "b": True}}


def test_style_and_support_are_read_from_the_template():
  assert tools.style_of(templates.MINICPM5) == "xml" and tools.handles_tools(templates.MINICPM5)
  assert tools.style_of(templates.CHATML) == "python"
  assert not tools.handles_tools(templates.CHATML)
  assert tools.style_of("{{ '<tool_call>' }}") == "json"


def test_instructions_go_into_the_system_turn_and_old_calls_into_their_turns():
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Bonn?"},
    {
      "role": "assistant",
      "content": None,
      "tool_calls": [
        {"id": "1", "function": {"name": "get-weather", "arguments": '{"city": "Bonn"}'}}
      ],
    },
    {"role": "tool", "content": "rain"},
  ]
  out = tools.with_instructions(messages, TOOLS)
  assert messages[2]["content"] is None  # the input is left alone
  text = chat.render(out, templates.CHATML)
  assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:")
  stub = text.split("```python\n")[1].split("\n```")[0]
  functions = ast.parse(stub.replace("from:", "from_:")).body
  assert [f.name for f in functions] == ["get_weather", "now"]
  assert "Its name" in ast.get_docstring(functions[0])
  assert 'get_weather(city="Bonn")\n```\n<|tool_call_end|><|im_end|>' in text
  assert "<|im_start|>tool\nrain<|im_end|>" in text
  without = tools.with_instructions(messages[1:], TOOLS)
  assert without[0]["role"] == "system" and len(without) == 4


def of_a(schema):
  return [{"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}]


def test_arguments_of_several_types_and_of_any():
  (tool,) = tools.read_tools(of_a({"type": ["string", "null"]}))
  assert "def f(a: str | None = None):" in tools.signature(tool)
  for written, value in (("None", None), ("5", "5"), ("x", "x")):
    text = f'<function name="f"><param name="a">{written}</param></function>'
    (call,) = tools.parse(text, [tool], "xml").calls
    assert call.arguments == {"a": value}
  (tool,) = tools.read_tools(of_a(True))  # true is a schema: anything
  assert "def f(a: object = None):" in tools.signature(tool)


@pytest.mark.parametrize(
  "bad, message",
  [
    ("x", "tools: found 'x', expected a list"),
    ([{"type": "retrieval"}], r"tools\[0\]: found"),
    ([{"function": {}}], r"tools\[0\].function.name: found None"),
    ([{"function": {"name": "a b"}}], "found 'a b', expected 1-64"),
    ([{"name": "f", "parameters": {"type": "array"}}], "expected the JSON schema of an object"),
    ([{"name": "a-b"}, {"name": "a-b"}], "found 'a-b' twice"),
    (of_a(3), r"parameters.a: found 3, expected a JSON schema"),
    (of_a({"enum": 5}), "parameters.a.enum: found 5, expected a list"),
    (of_a({"type": {}}), "parameters.a.type: found {}, expected a name or a list of names"),
    (of_a({"items": {"properties": 1}}), "a.items.properties: found 1, expected an object"),
    (of_a({"required": ["x", 1]}), r"a.required: found \['x', 1\], expected a list of names"),
  ],
)
def test_bad_tools_are_refused(bad, message):
  with pytest.raises(tools.ToolError, match=message):
    tools.read_tools(bad)


def test_bad_calls_of_a_message_are_refused():
  for item in ({}, {"function": {"name": "f", "arguments": "{"}}, {"name": "f", "arguments": [1]}):
    with pytest.raises(tools.ToolError, match="tool_calls: "):
      tools.call_of(item)
  with pytest.raises(tools.ToolError, match="f: found {'a': inf}, expected JSON"):
    tools.call_of({"name": "f", "arguments": '{"a": 1e999}'})
  assert tools.call_of({"name": "f", "arguments": json.dumps({"a": 1})}).arguments == {"a": 1}


def test_python_names_of_types_are_read():
  """BFCL and glaive write "dict", "float", "tuple", "any" (data.md 7.3)."""
  parameters = {
    "type": "dict",
    "properties": {
      "x": {"type": "float"},
      "p": {"type": "tuple", "items": {"type": "any", "description": "d"}},
      "o": {"type": "dict", "properties": {"k": {"type": ["list", "null"]}}},
      "u": {"anyOf": [{"type": "float"}, {"type": "string"}]},
      "m": {"type": "dict", "patternProperties": {"^x": {"type": "float"}}},
    },
    "required": ["x"],
  }
  (tool,) = tools.read_tools([{"name": "f", "parameters": parameters}])
  assert tool.parameters == {
    "type": "object",
    "properties": {
      "x": {"type": "number"},
      "p": {"type": "array", "items": {"description": "d"}},
      "o": {"type": "object", "properties": {"k": {"type": ["array", "null"]}}},
      "u": {"anyOf": [{"type": "number"}, {"type": "string"}]},
      "m": {"type": "object", "patternProperties": {"^x": {"type": "number"}}},
    },
    "required": ["x"],
  }
  assert tools.signature(tool).startswith("def f(x: float, p: list = None, o: dict = None")


def test_names_that_become_one_identifier_stay_apart():
  found = tools.read_tools([{"name": "a_b"}, {"name": "a-b"}, {"name": "a.b"}, {"name": "class"}])
  assert [tool.wire_name for tool in found] == ["a_b", "a_b_", "a_b__", "class_"]
  for tool in found:
    call = tools.Call(tool.name, {})
    assert tools.parse(tools.render_calls([call], "python", found), found, "python").calls == (
      call,
    )


@pytest.mark.parametrize("style", ["python", "json", "xml"])
@pytest.mark.parametrize(
  "inside", ["<|tool_call_end|>", "```", "</tool_call>", "a\n```\n</function>"]
)
def test_closing_markers_inside_strings_are_text(style, inside):
  calls = (tools.Call("get-weather", {"city": inside, "days": 1}), tools.Call("now", {}))
  text = tools.render_calls(calls, style, TOOLS) + " bye <|tool_call_end|>"
  parsed = tools.parse(text, TOOLS, style)
  assert parsed.calls == calls and parsed.errors == ()
  assert parsed.content == "bye <|tool_call_end|>"
