"""The parts of JSON schemas that tools need: their form, and Python's names of types."""

from collections.abc import Mapping
from typing import Any


class ToolError(ValueError):
  """A tool definition that cannot be used."""


# Python's names of JSON's types, as function-calling data has them (data.md 7.3); None: no check.
_DIALECT = {"dict": "object", "float": "number", "list": "array", "tuple": "array", "any": None}
OBJECT = ("object", "dict")
_INSIDE = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not")
_FIELDS = ("properties", "patternProperties", "$defs", "definitions")
_FORMS = {
  "type": "a name or a list of names",
  "enum": "a list",
  "properties": "an object",
  "required": "a list of names",
}


def plain(schema: Any) -> Any:
  """The schema with JSON's own names of types: "dict" is "object", "any" says nothing."""
  if isinstance(schema, list):
    return [plain(item) for item in schema]
  if not isinstance(schema, Mapping):
    return schema
  out = dict(schema)
  for key, value in schema.items():
    if key in _INSIDE:
      out[key] = plain(value)
    elif key in _FIELDS and isinstance(value, Mapping):
      out[key] = {name: plain(field) for name, field in value.items()}
  kinds = [_DIALECT.get(k, k) if isinstance(k, str) else k for k in kinds_of(schema) or ()]
  if kinds:
    out["type"] = kinds if isinstance(schema["type"], list) else kinds[0]
    if None in kinds:
      del out["type"]
  return out


def check(where: str, schema: Any) -> None:
  """ToolError where the parts of a JSON schema that are read here have another form."""
  if isinstance(schema, bool):
    return
  if not isinstance(schema, Mapping):
    raise ToolError(f"{where}: found {schema!r:.60}, expected a JSON schema")
  kinds = kinds_of(schema)
  checks = {
    "type": kinds is None or (len(kinds) > 0 and all(isinstance(kind, str) for kind in kinds)),
    "enum": isinstance(schema.get("enum", []), list),
    "properties": isinstance(schema.get("properties") or {}, Mapping),
    "required": all(isinstance(name, str) for name in _as_list(schema.get("required"), [None])),
  }
  for name, is_ok in checks.items():
    if not is_ok:
      raise ToolError(f"{where}.{name}: found {schema[name]!r:.60}, expected {_FORMS[name]}")
  fields = dict(schema.get("properties") or {})
  if isinstance(schema.get("items", []), list):  # absent, or one schema a place
    fields |= {f"items[{i}]": item for i, item in enumerate(schema.get("items", []))}
  else:
    fields["items"] = schema["items"]
  for name, field in fields.items():
    check(f"{where}.{name}", field)


def kinds_of(schema: Any) -> list[Any] | None:
  """The types that a JSON schema allows; None where it does not say."""
  kind = schema.get("type") if isinstance(schema, Mapping) else None
  return kind if kind is None or isinstance(kind, list) else [kind]


def _as_list(value: Any, otherwise: list[Any]) -> list[Any]:
  return [] if value is None else value if isinstance(value, list) else otherwise
