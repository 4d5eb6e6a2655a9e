"""Random schemas and random answers under a constraint, for the constrained-decoding tests."""

import numpy as np

ENDERS = b'"]})0 '  # bytes that bring an answer to its end


def random_answer(compiler, constraint, tok, rng, *, max_tokens=4000):
  """Text of random logits under the masks; after 150 tokens the enders get likelier.

  Every sampled token must be consumable. Returns None where the limit came first.
  """
  bias_V = np.zeros(compiler.vocab_size)
  bias_V[list(ENDERS)] = 6.0
  bias_V[list(compiler.stop_ids)] = 12.0
  ids = []
  for step in range(max_tokens):
    logits_V = rng.normal(size=compiler.vocab_size) * 2 + (bias_V if step > 150 else 0.0)
    logits_V[~constraint.allowed()] = -np.inf
    token = int(np.argmax(logits_V + rng.gumbel(size=logits_V.shape)))
    assert constraint.consume(token)
    if token in compiler.stop_ids:
      assert constraint.is_accepting() and constraint.is_stopped()
      return tok.decode(ids)
    ids.append(token)
  return None


def random_schema(rng, depth=0):
  """A JSON schema of the keywords that real ones use."""
  kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
  kinds += ["object", "object", "array", "anyOf"] if depth < 2 else []
  kind = "object" if depth == 0 and rng.random() < 0.5 else str(rng.choice(kinds))
  if kind == "string":
    choices = [{}, {"minLength": 2, "maxLength": 9}, {"pattern": "^[a-z]{2,5}-[0-9]+$"}]
    choices += [{"format": f} for f in ("date", "date-time", "uuid", "ipv4", "email")]
    return {"type": "string"} | choices[rng.integers(len(choices))]
  if kind == "integer":
    low = int(rng.integers(-50, 50))
    choices = [{}, {"minimum": low}, {"minimum": low, "maximum": low + int(rng.integers(0, 60))}]
    choices += [{"exclusiveMaximum": low}, {"multipleOf": 4}]
    return {"type": "integer"} | choices[rng.integers(len(choices))]
  if kind == "number":
    choices = [{}, {"minimum": 0.5, "maximum": 7.25}, {"exclusiveMinimum": -1}]
    return {"type": "number"} | choices[rng.integers(len(choices))]
  if kind == "enum":
    values = ["a", "né", 3, None, True, {"k": [1, "x"]}, "", 'quo"te']
    picked = rng.choice(len(values), size=rng.integers(1, 5), replace=False)
    return {"enum": [values[i] for i in picked]}
  if kind == "const":
    return {"const": [1, {"a": None}]}
  if kind == "array":
    low = int(rng.integers(0, 3))
    schema = {"type": "array", "items": random_schema(rng, depth + 1)}
    if rng.random() < 0.3:
      schema["prefixItems"] = [random_schema(rng, depth + 1)]
    return schema | {"minItems": low, "maxItems": low + int(rng.integers(0, 3))}
  if kind == "anyOf":
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.integers(1, 4))]}
  if kind == "object":
    names = [str(n) for n in rng.choice(["id", "näme", "a b", "tags", "x-y"], 3, replace=False)]
    properties = {name: random_schema(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    schema = {"type": "object", "properties": properties, "required": required}
    if rng.random() < 0.7:
      schema["additionalProperties"] = False
    elif rng.random() < 0.5:
      schema["additionalProperties"] = {"type": "integer"}
    return schema
  return {"type": kind}
