"""Perplexity of a real model under every method of post-training quantisation, and per format.

  python -m experiments.bench_quantize --text=CALIBRATION --heldout=TEXT --output=benchmarks/results

Full precision, RTN and the GGUF types once; GPTQ, P-GPTQ and S-P-GPTQ for every calibration seed;
METHOD:bound is P- with first positions bounded instead of left out (quantize.p_first), and
METHOD:bound:bound has them bounded in the smoothing search too (quantize.awq_first). The order to
expect (quantization.md 5.3): RTN > GPTQ >= P-GPTQ >= S-P-GPTQ in added perplexity.
--trained=NAME:RUN adds what quantisation-aware training of the model has come to: the codes of a
run folder. The JSON is written after every value, and what it has of the same setting is kept.
Default model: the 135M model of fetch_model, whose weights are Q4_1 at the source and floats here.
35 CPU-minutes.
"""

import pathlib
import sys
import time

from absl import flags

from experiments import _command, _models, _quantize, _results
from minicpm_jax.deploy import quantize
from minicpm_jax.quant import gptq

VALUES = flags.FlagValues()
_define = _command.definer(VALUES)
_MODEL = _define("string", "model", None, "HF folder or .gguf; default: the 135M model.")
_TEXT = _define("multi_string", "text", [], "Calibration text, .txt or .jsonl (.gz); repeatable.")
_HELDOUT = _define("string", "heldout", None, "Evaluation text.")
_OUTPUT = _define("string", "output", "benchmarks/results", "Folder of JSON and PNG.")
_SEEDS = _define("integer", "seeds", 3, "Calibration seeds 0, 1, ...")
_ROWS = _define("integer", "sequences", 16, "Calibration sequences.")
_LENGTH = _define("integer", "length", 512, "Tokens of a sequence.")
_EVAL = _define("integer", "eval_sequences", 24, "Evaluation sequences.")
_GROUP = _define("integer", "group_size", 64, "Inputs that share a scale.")
_KINDS = _define("list", "kinds", ["q8_0", "q4_1", "q4_0"], "GGUF types of the projections.")
_METHODS = _define("list", "methods", ["gptq", "p-gptq", "s-p-gptq"], "Calibrated methods.")
_TRAINED = _define("multi_string", "trained", [], "NAME:RUN[@STEP] of a QAT run; repeatable.")


def _run() -> None:
  trained = dict(_quantize.named_run(text) for text in _TRAINED.value)
  path = _models.path_of(_MODEL.value)
  model, params, tok = _models.load_floats(path)
  stream = _quantize.token_stream([pathlib.Path(p) for p in _TEXT.value], tok)
  heldout = _quantize.token_stream([pathlib.Path(_HELDOUT.value)], tok)
  rows = _quantize.windows(heldout, _EVAL.value, _LENGTH.value, None)
  setting = {
    "model": path.name,
    "group_size": _GROUP.value,
    "calibration": {
      "sequences": _ROWS.value,
      "length": _LENGTH.value,
      "text": [pathlib.Path(p).name for p in _TEXT.value],
    },
    "evaluation": {
      "sequences": len(rows),
      "length": _LENGTH.value,
      "text": pathlib.Path(_HELDOUT.value).name,
    },
  }
  result = _quantize.read_perplexity(pathlib.Path(_OUTPUT.value), setting)

  def has(name, seed=0):
    return len(result["perplexity"].get(name, ())) > seed

  def record(name, params, seconds=None, model=model):
    value = _quantize.perplexity(model, params, rows)
    result["perplexity"].setdefault(name, []).append(value)
    if seconds is not None:
      result["seconds"].setdefault(name, []).append(seconds)
    result["environment"] = _results.environment()
    print(f"{name:10s} perplexity {value:.4f}", flush=True)
    _quantize.write_perplexity(pathlib.Path(_OUTPUT.value), result)

  if not has("f32"):
    record("f32", params)
  solver = gptq.GPTQConfig(group_size=_GROUP.value, static_groups=True, scale_dtype="f16")
  nearest = quantize.QuantizeConfig(method="rtn", solver=solver)
  if not has("rtn"):
    record("rtn", quantize.quantize_model(model, params, [], nearest).params)
  for seed in range(_SEEDS.value):
    chosen = _quantize.windows(stream, _ROWS.value, _LENGTH.value, seed)
    for name in _METHODS.value:
      if has(name, seed):
        continue
      method, *rules = name.split(":")
      if len(rules) > 2:
        raise ValueError(f"--methods: found {name!r}, expected METHOD[:P_FIRST[:AWQ_FIRST]]")
      more = dict(zip(("p_first", "awq_first"), rules, strict=False))
      cfg = quantize.QuantizeConfig(method=method, solver=solver, awq_tokens=1024, **more)
      start = time.perf_counter()
      done = quantize.quantize_model(model, params, _quantize.batches(chosen, 4), cfg)
      record(name, done.params, {"total": time.perf_counter() - start, **done.seconds})
  for kind in _KINDS.value:
    if not has(kind):
      record(kind, _quantize.through_gguf(params, kind))
  for name, run in trained.items():
    if not has(name):
      own, codes = _quantize.trained_codes(run, model.cfg.vocab_size)
      record(name, codes, model=own)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("text", "heldout"))


if __name__ == "__main__":
  sys.exit(main())
