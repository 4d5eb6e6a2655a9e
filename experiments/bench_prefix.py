"""Perplexity with 8-bit activations, with and without prefix tokens in full precision.

  python -m experiments.bench_prefix --text=CALIBRATION --heldout=TEXT --output=benchmarks/results

Weights float and 4-bit (round to nearest); inputs of projections as they are, 8 bits with a scale a
token, 8 bits with one static scale a projection (largest value of the calibration text). The prefix
is the one that is found on the calibration text (quantization.md 5.2), its keys and values from the
float model. Fake quantisation: what is measured is accuracy. Default model: the 135M model.
"""

import functools
import pathlib
import sys

import jax.numpy as jnp
from absl import flags

from experiments import _command, _models, _quantize, _results
from minicpm_jax.core import files
from minicpm_jax.deploy import prefix, quantize
from minicpm_jax.quant import gptq, tree

VALUES = flags.FlagValues()
_define = _command.definer(VALUES)
_MODEL = _define("string", "model", None, "HF folder or .gguf; default: the 135M model.")
_TEXT = _define("multi_string", "text", [], "Calibration text, .txt or .jsonl (.gz); repeatable.")
_HELDOUT = _define("string", "heldout", None, "Evaluation text.")
_OUTPUT = _define("string", "output", "benchmarks/results", "Folder of the JSON.")
_ROWS = _define("integer", "sequences", 8, "Calibration sequences.")
_LENGTH = _define("integer", "length", 256, "Tokens of a sequence.")
_EVAL = _define("integer", "eval_sequences", 32, "Evaluation sequences.")
_GROUP = _define("integer", "group_size", 64, "Inputs that share a weight's scale.")


def _run():
  path = _models.path_of(_MODEL.value)
  model, params, tok = _models.load_floats(path)
  stream = _quantize.token_stream([pathlib.Path(p) for p in _TEXT.value], tok)
  heldout = _quantize.token_stream([pathlib.Path(_HELDOUT.value)], tok)
  rows = _quantize.windows(heldout, _EVAL.value, _LENGTH.value, None)
  batches = _quantize.batches(_quantize.windows(stream, _ROWS.value, _LENGTH.value, 0), 4)
  tokens = prefix.find(model, params, batches)
  names, heldout_name = (
    [pathlib.Path(p).name for p in _TEXT.value],
    pathlib.Path(_HELDOUT.value).name,
  )
  result = {
    "model": path.name,
    "group_size": _GROUP.value,
    "prefixed_tokens": list(tokens),
    "calibration": {"sequences": _ROWS.value, "length": _LENGTH.value, "text": names},
    "evaluation": {"sequences": len(rows), "length": _LENGTH.value, "text": heldout_name},
    "environment": _results.environment(),
    "perplexity": {},
  }
  print(f"prefix tokens {tokens}: {[tok.decode([t]) for t in tokens]}", flush=True)
  prefixes = {"no prefix": None}
  if tokens:
    prefixes["prefix"] = prefix.key_values(model, params, tokens)
  solver = gptq.GPTQConfig(group_size=_GROUP.value, static_groups=True, scale_dtype="f16")
  nearest = quantize.QuantizeConfig(method="rtn", solver=solver)
  int4 = tree.dequantize_params(
    quantize.quantize_model(model, params, [], nearest).params, jnp.float32
  )
  for weights, chosen in (("f32", params), ("int4", int4)):
    for where, before in prefixes.items():
      static = prefix.activation_scales(model, chosen, batches, before)
      for act, scales in (("f32", "off"), ("8 bits a token", "token"), ("8 bits static", static)):
        forward = functools.partial(prefix.forward, model, chosen, before=before, act=scales)
        value = _quantize.perplexity_of(forward, rows)
        result["perplexity"][f"weights {weights}, inputs {act}, {where}"] = value
        print(f"weights {weights:5s} inputs {act:15s} {where:10s} {value:.3f}", flush=True)
  files.write_json(pathlib.Path(_OUTPUT.value) / "prefix_ppl.json", result)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("text", "heldout"))


if __name__ == "__main__":
  sys.exit(main())
