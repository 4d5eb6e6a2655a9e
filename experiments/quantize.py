"""Any HF folder or GGUF file -> int4 (GPTQ folder, Marlin, GGUF) by post-training quantisation.

  python -m experiments.quantize --model=DIR --output=OUT --method=s-p-gptq --text=calibration.txt
  python -m experiments.quantize --model=model.gguf --output=out.gguf --kind=q4_0

Methods: rtn, gptq, p-gptq, s-gptq, s-p-gptq (MiniCPM4 4.1.2), ternary (untrained: a start for
QAT); --rotate applies QuaRot's rotations first (the model gets untied). P- of the report leaves the
first positions out (--p_first=drop); bounding them, the default, keeps attention sinks, and S-P-
bounds them in its search. Calibration text is .txt or .jsonl (.gz). JSON beside the output: errors
of the projections, seconds, the cost at 8B. GGUF: blocks of --kind (q4_0 keeps the codes).
"""

import pathlib
import sys
import time

from absl import flags

from experiments import _command, _models, _quantize
from minicpm_jax import ckpt
from minicpm_jax.core import files, logging
from minicpm_jax.deploy import prefix, quantize
from minicpm_jax.models import transformer
from minicpm_jax.quant import gptq, rotate
from minicpm_jax.quant import prefix as prefix_lib

VALUES = flags.FlagValues()

_define = _command.definer(VALUES)
_MODEL = _define("string", "model", None, "HF folder or .gguf file.")
_OUTPUT = _define("string", "output", None, "Folder (GPTQ, Marlin), or a name ending in .gguf.")
_METHOD = _define("enum", "method", "s-p-gptq", "Method.", list(quantize.METHODS))
_FORMAT = _define("enum", "format", "gptq", "Of a folder.", ["gptq", "gptq_v2", "marlin"])
_KIND = _define("string", "kind", "q4_0", "Block type of a .gguf output.")
_TEXT = _define("multi_string", "text", [], "Calibration text; repeatable.")
_ROWS = _define("integer", "sequences", 64, "Calibration sequences.")
_LENGTH = _define("integer", "length", 512, "Tokens of a sequence.")
_SEED = _define("integer", "seed", 0, "Of the choice of text and of the rotation.")
_GROUP = _define("integer", "group_size", 128, "Inputs that share a scale; -1 = all.")
_SYM = _define("bool", "symmetric", True, "Zero points fixed at 8.")
_ACT = _define("bool", "act_order", False, "Inputs by falling activation.")
_SKIP = _define("integer", "skip", 4, "First positions that P- is about.")
_LAYERS = _define("enum", "p_layers", "all", "Projections that P- is for.", ["all", "down"])
_FIRST = _define("enum", "p_first", "bound", "What P- does to them.", ["bound", "drop"])
_PREFIX = _define("bool", "prefix", False, "Behind prefix tokens, written beside the output.")
_ROTATE = _define("bool", "rotate", False, "QuaRot rotations R1 and R2 first.")


def _save(path, model, params, tok):
  if path.endswith(".gguf"):
    ckpt.save_gguf(path, model, params, tok, kind=_KIND.value)
  elif _FORMAT.value == "marlin":
    ckpt.save_marlin(path, model, params, tok, dtype="f16")
  else:
    ckpt.save_gptq(path, model, params, tok, version=_FORMAT.value, dtype="f16")


def _run() -> None:
  solver = gptq.GPTQConfig(
    group_size=_GROUP.value,
    symmetric=_SYM.value,
    act_order=_ACT.value,
    static_groups=True,
    scale_dtype="f16",
  )
  check = (_OUTPUT.value, _METHOD.value, solver)
  _quantize.check_output(*check, format=_FORMAT.value, kind=_KIND.value)
  model, params, tok = _models.load_floats(pathlib.Path(_MODEL.value))
  _quantize.check_model(model.cfg, _OUTPUT.value, solver.group_size, format=_FORMAT.value)
  if _ROTATE.value:
    cfg, params = rotate.rotate(model.cfg, params, seed=_SEED.value)
    model = transformer.Transformer(cfg)
  more = {"p_layers": _LAYERS.value} | dict.fromkeys(("p_first", "awq_first"), _FIRST.value)
  cfg = quantize.QuantizeConfig(method=_METHOD.value, solver=solver, skip=_SKIP.value, **more)
  batches, tokens, before, start = [], 0, None, time.perf_counter()
  if cfg.is_calibrated or _PREFIX.value:
    if not _TEXT.value or tok is None:
      raise ValueError(f"--text: {cfg.method} needs calibration text, and the model a tokenizer")
    stream = _quantize.token_stream([pathlib.Path(p) for p in _TEXT.value], tok)
    rows = _quantize.windows(stream, _ROWS.value, _LENGTH.value, _SEED.value)
    batches, tokens = _quantize.batches(rows, 4), rows.size
  if _PREFIX.value and (ids := prefix.find(model, params, batches)):
    before = prefix.key_values(model, params, ids)
  with logging.progress(model.cfg.num_layers) as bar:
    args = (model, params, batches, cfg)
    done = quantize.quantize_model(*args, before=before, progress=bar.update)
  report = {
    "model": _MODEL.value,
    "method": cfg.method,
    "group_size": solver.group_size,
    "is_rotated": _ROTATE.value,
    "prefixed_tokens": [] if before is None else list(before.tokens),
    "calibration": {"tokens": tokens, "length": _LENGTH.value, "seed": _SEED.value},
    "seconds": {"total": time.perf_counter() - start, **done.seconds},
    "projections": done.report,
  }
  if cfg.is_calibrated and model.cfg.moe is None and model.cfg.mla is None:
    hours = _quantize.cost_of(done, model.cfg, tokens, "minicpm4_8b", 1024 * 2048)
    report["hours_for_minicpm4_8b"] = hours
    what = f"reckoned from a width of {model.cfg.model_dim}"
    print(f"MiniCPM4-8B with 1024 x 2048 tokens here, {what}: {sum(hours.values()):.1f} h")
  _save(_OUTPUT.value, model, done.params, tok)
  beside = pathlib.Path(_OUTPUT.value.rstrip("/") + ".report.json")
  if before is not None:
    prefix_lib.save(beside.with_suffix("").with_suffix(".prefix"), before)
  files.write_json(beside, report)
  print(f"{_OUTPUT.value}: {report['seconds']['total']:.0f} s; {beside}")


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("model", "output"))


if __name__ == "__main__":
  sys.exit(main())
