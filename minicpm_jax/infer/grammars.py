"""Grammar texts for `constrained`: whitespace of JSON, a SQL SELECT subset, Python tool calls.

All of them are written in llguidance's Lark dialect: upper-case names are terminals (regular
expressions), lower-case names are rules, `%json {...}` embeds a JSON schema.
"""

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minicpm_jax.text import tools as tools_lib

JSON_WHITESPACE = r"( |\n {0,32})?"  # what json.dumps writes, with and without indent; bounded
JSON_COMPACT = ""  # no whitespace between tokens
MAX_CALLS = 8  # of one answer

# Numbers, strings and containers of Python source, for call arguments.
_PYTHON_VALUES = r"""
value: STRING | NUMBER | "True" | "False" | "None" | list | dict
list: "[" "]" | "[" value (", " value)* "]"
dict: "{" "}" | "{" item (", " item)* "}"
item: STRING ": " value
integer: INTEGER
number: NUMBER
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?(e[-+]?[0-9]{1,2})?/
STRING: /"([^"\\\x00-\x1f\x7f]|\\["\\nrt])*"/
"""

# Keywords of JSON schemas that bound single values.
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_LIMITS = {"integer": _BOUNDS, "number": _BOUNDS, "string": ("minLength", "maxLength", "pattern")}

XML_VALUES = r"""
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/
TEXT: /[^<&\x00-\x1f\x7f]*/
"""

_SQL = r"""
start: select
select: "SELECT" WS ("DISTINCT" WS)? columns WS "FROM" WS source where? group? order? limit?
columns: "*" | column ("," WS? column)*
column: term (WS "AS" WS NAME)?
source: table (WS join)*
join: ("INNER" WS | "LEFT" WS)? "JOIN" WS table WS "ON" WS condition
where: WS "WHERE" WS condition
group: WS "GROUP BY" WS field ("," WS? field)* (WS "HAVING" WS condition)?
order: WS "ORDER BY" WS key ("," WS? key)*
key: term (WS ("ASC" | "DESC"))?
limit: WS "LIMIT" WS INTEGER (WS "OFFSET" WS INTEGER)?
condition: test (WS ("AND" | "OR") WS test)*
test: "(" condition ")" | "NOT" WS test | term WS? COMPARE WS? term
  | term WS ("NOT" WS)? "IN" WS "(" literal ("," WS? literal)* ")"
  | term WS ("NOT" WS)? "BETWEEN" WS term WS "AND" WS term
  | term WS ("NOT" WS)? "LIKE" WS STRING | term WS "IS" WS ("NOT" WS)? "NULL"
term: factor (WS OPERATOR WS factor)*
factor: literal | field | call | "(" term ")"
call: "COUNT(*)" | FUNCTION "(" ("DISTINCT" WS)? term ")"
field: COLUMN | TABLE "." COLUMN
literal: NUMBER | STRING | "NULL"
FUNCTION: "COUNT" | "SUM" | "AVG" | "MIN" | "MAX" | "LOWER" | "UPPER" | "LENGTH" | "ABS" | "ROUND"
COMPARE: "=" | "<>" | "!=" | "<" | "<=" | ">" | ">="
OPERATOR: "+" | "-" | "*" | "/" | "||"
INTEGER: /0|[1-9][0-9]{0,17}/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/
STRING: /'([^'\x00-\x1f]|'')*'/
WS: /[ \n]{1,8}/
"""
_SQL_RESERVED = """all and as asc between by case cast check collate column count create cross
default delete desc distinct drop else end escape except exists foreign from full glob group having
in index inner insert intersect into is isnull join left like limit match natural not notnull null
offset on or order outer primary references regexp right select set table then to union unique
update using values when where with""".split()


def sql_select(tables: Mapping[str, Sequence[str]] | None = None) -> str:
  """Lark grammar of one SELECT statement: joins, WHERE, GROUP BY, HAVING, ORDER BY, LIMIT.

  `tables` (name -> column names) allows only these identifiers (and free names after AS of a
  column); without it any, and aliases of tables too. That a column belongs to a table of the
  statement is not checked. Keywords are in capitals.
  """
  reserved = "|".join(f"(?i:{word})" for word in _SQL_RESERVED)
  free = rf"/[a-zA-Z_][a-zA-Z0-9_]{{0,62}}/ & ~/({reserved})/"
  name = f"NAME: {free}"
  if tables is None:
    return f'{_SQL}table: TABLE (WS "AS" WS NAME)?\n{name}\nTABLE: {free}\nCOLUMN: {free}\n'
  is_dict = isinstance(tables, Mapping) and tables and all(tables.values())
  if not is_dict or any(isinstance(names, str) for names in tables.values()):
    raise ValueError(
      f"tables: found {tables!r:.80}, expected lists of column names, at least one a table"
    )
  columns = sorted({column for names in tables.values() for column in names})
  for identifier in (*tables, *columns):
    is_name = isinstance(identifier, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", identifier)
    if not is_name or identifier.lower() in _SQL_RESERVED:
      raise ValueError(
        f"tables: found the name {identifier!r}, expected letters, digits and _, no word of SQL"
      )
  return f"{_SQL}table: TABLE\n{name}\nTABLE: {_any_of(tables)}\nCOLUMN: {_any_of(columns)}\n"


def python_calls(tools: Sequence[Mapping[str, Any]]) -> str:
  """Lark rules of `calls`: one call a line, keyword arguments only, as the tools' schemas say.

  `tools` are {"name", "parameters": JSON schema} or the same under "function". Arguments come in
  the order of the schema's properties; those not in "required" may be missing. Enumerations and
  the types string (minLength, maxLength, pattern), integer, number (bounds, multipleOf), boolean,
  null, array (items, minItems, maxItems) and object are kept; an unknown type takes any literal.
  Names must be Python identifiers.
  """
  rules: list[str] = []
  names = []
  for index, (name, schema) in enumerate(_functions_of(tools)):
    _check_identifier("tools", name)
    properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
    arguments = []
    for number, (key, field) in enumerate(properties.items()):
      _check_identifier(f"tools: {name}", key)
      rules.append(f"t{index}a{number}: {quote(key + '=')} {_python_type(field, rules)}")
      arguments.append((f"t{index}a{number}", key in required))
    rules += _argument_rules(f"t{index}", arguments)
    names.append(f"{quote(name + '(')} t{index}f0 {quote(')')}")
  one_of = "call: " + " | ".join(names)
  more = f'calls: call ("\\n" call){{0,{MAX_CALLS - 1}}}'
  return "\n".join([more, one_of, *rules]) + _PYTHON_VALUES


def json_calls(tools: Sequence[Mapping[str, Any]]) -> str:
  """Lark grammar of <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one after another."""
  options = []
  for name, schema in _functions_of(tools):
    properties = {"name": {"const": name}, "arguments": dict(schema) | {"type": "object"}}
    options.append(
      {"type": "object", "properties": properties, "required": ["name", "arguments"]}
      | {"additionalProperties": False}
    )
  schema = {"anyOf": options, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
  return (
    f'start: call ("\\n" call){{0,{MAX_CALLS - 1}}}\n'
    f'call: "<tool_call>\\n" body "\\n</tool_call>"\nbody: %json {json.dumps(schema)}'
  )


def xml_calls(tools: Sequence[Mapping[str, Any]]) -> str:
  """Lark grammar of MiniCPM5's <function name="N"><param name="P">V</param></function>.

  Texts are without <, & and line ends; lists and objects are JSON.
  """
  rules, names = [], []
  simple = {"integer": "INTEGER", "number": "NUMBER", "boolean": '("True" | "False")'}
  simple |= {"null": '"None"'}
  for index, (function, schema) in enumerate(_functions_of(tools)):
    required = set(schema.get("required") or ())
    arguments = []
    for number, (key, field) in enumerate((schema.get("properties") or {}).items()):
      field = field if isinstance(field, Mapping) else {}  # true: anything
      kind = field.get("type")
      value = simple.get(kind, "TEXT") if isinstance(kind, str) else "TEXT"
      if kind in ("integer", "number"):
        value = _limits(field) or value
      only = field.get("enum", [field["const"]] if "const" in field else None)
      if only is not None and (kind not in ("array", "object") or "enum" in field):
        texts = [v if isinstance(v, str) else str(v) for v in only]
        value = "(" + _any_of(texts) + ")"
      elif kind in ("array", "object"):
        value = f"t{index}v{number}"
        rules.append(f"{value}: %json {json.dumps({'x-guidance': {}, **field})}")
      name = f"t{index}a{number}"
      opening = '<param name="' + key + '">'
      rules.append(f'{name}: {quote(opening)} {value} "</param>"')
      arguments.append(name if key in required else f"{name}?")
    opening = '<function name="' + function + '">'
    names.append(" ".join([quote(opening), *arguments, '"</function>"']))
  text = [f'start: call ("\\n" call){{0,{MAX_CALLS - 1}}}', "call: " + " | ".join(names), *rules]
  return "\n".join(text) + XML_VALUES


def _functions_of(tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
  """(name, JSON schema of the parameters) of every tool, checked."""
  if not isinstance(tools, list | tuple) or not tools:
    found = tools if tools else "none"
    raise ValueError(f"tools: found {found!s:.80}, expected a list of at least one")
  found = []
  for tool in tools:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
      raise ValueError(f"tools: found {tool!r:.80}, expected an object with a name")
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping):
      raise ValueError(f"tools: {name}: found parameters {schema!r:.80}, expected a JSON schema")
    tools_lib.check_schema(f"tools: {name}", schema)
    found.append((name, schema))
  return found


def _argument_rules(prefix: str, arguments: Sequence[tuple[str, bool]]) -> list[str]:
  """Rules `{prefix}f{i}` (arguments i.. as the first) and `{prefix}n{i}` (after others)."""
  rules = []
  for i in range(len(arguments), -1, -1):
    for kind, comma in (("f", ""), ("n", '", " ')):
      if i == len(arguments):
        rules.append(f'{prefix}{kind}{i}: ""')
        continue
      name, is_required = arguments[i]
      choices = [f"{comma}{name} {prefix}n{i + 1}"]
      if not is_required:
        choices.append(f"{prefix}{kind}{i + 1}")
      rules.append(f"{prefix}{kind}{i}: " + " | ".join(choices))
  return rules


def _python_type(field: Mapping[str, Any] | bool, rules: list[str]) -> str:
  """A Lark expression for one value of the JSON schema `field`, in Python's spelling.

  The items of lists, which stand in it more than once, become rules of their own: written out,
  lists of lists would double the text at every level.
  """
  if not isinstance(field, Mapping):
    return "value"  # true: anything
  if "enum" in field:
    return "(" + " | ".join(quote(_literal(value)) for value in field["enum"]) + ")"
  if "const" in field:
    return quote(_literal(field["const"]))
  kind = field.get("type")
  if isinstance(kind, list):
    return (
      "(" + " | ".join(_python_type({**field, "type": k}, rules) for k in dict.fromkeys(kind)) + ")"
    )
  if limits := _limits(field):
    return limits  # numbers and strings of JSON are Python's too
  if kind == "array" and isinstance(field.get("items"), Mapping):
    items = _python_type(field["items"], rules)
    name = f"items{len(rules)}"
    rules.append(f"{name}: {items}")
    return _python_list(name, field)
  simple = {
    "string": "STRING",
    "integer": "integer",
    "number": "number",
    "boolean": '("True" | "False")',
    "null": '"None"',
    "array": "list",
    "object": "dict",
  }
  return simple.get(kind, "value")


def _python_list(item: str, field: Mapping[str, Any]) -> str:
  """A Lark expression for a list of minItems to maxItems of `item`."""
  least, most = field.get("minItems", 0), field.get("maxItems")
  bounds = (least,) if most is None else (least, most)
  if any(type(n) is not int or n < 0 for n in bounds) or least > bounds[-1]:
    raise ValueError(f"tools: found {least} minItems, {most} maxItems, expected 0 <= least <= most")
  if most == 0:
    return '("[" "]")'
  times = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
  more = "" if most == 1 else f'(", " {item}){times}'
  filled = f'"[" {item} {more} "]"'
  return f"({filled})" if least else f'("[" "]" | {filled})'


def _limits(field: Mapping[str, Any]) -> str:
  """A Lark expression for numbers and strings with limits of their own; "" for others."""
  kind = field.get("type")
  names = _LIMITS.get(kind, ()) if isinstance(kind, str) else ()
  found = {name: field[name] for name in names if name in field}
  return f"%json {json.dumps({'type': kind, **found})}" if found else ""


def _literal(value: Any) -> str:
  """A JSON value as Python source with double quotes."""
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  return repr(value)


def _any_of(words: Sequence[str] | Mapping[str, Any]) -> str:
  return " | ".join(quote(word) for word in words)


def quote(text: str) -> str:
  """A terminal that is this text; the lexer of grammars wants DEL escaped, which JSON does not."""
  return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_identifier(where: str, name: Any) -> None:
  if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
    raise ValueError(f"{where}: found the name {name!r}, expected a Python identifier")
