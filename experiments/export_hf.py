"""A run folder -> a Hugging Face folder (config.json, safetensors, tokenizer).

  python -m experiments.export_hf --workdir=runs/a --output=out/            # newest checkpoint
  python -m experiments.export_hf --workdir=runs/a@5000 --output=out/ --dtype=bf16
  python -m experiments.export_hf --workdir=runs/a --output=out-llama/ --llama

--llama folds the muP multipliers into the weights (models.md 9): transformers then loads the folder
as a plain Llama (Mixtral for experts) without remote code. The result is for inference; further
training needs the unfolded model. The MTP head has no place in HF layouts and is left out.
"""

import dataclasses
import sys

from absl import flags

from experiments import _command
from minicpm_jax import ckpt
from minicpm_jax.core import trees
from minicpm_jax.models import convert

VALUES = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, or FOLDER@STEP.", flag_values=VALUES)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", flag_values=VALUES)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["f32", "bf16", "f16"],
  "Of the stored tensors; default: that of the run.",
  flag_values=VALUES,
)
_LLAMA = flags.DEFINE_bool("llama", False, "Fold into plain Llama form.", flag_values=VALUES)
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Largest file, in 1e9 bytes.", flag_values=VALUES)


def _fold(model, params):
  """Llama form, folded in float32: cast last, or the factors round twice. Weights of QAT: fused."""
  cfg = dataclasses.replace(model.cfg, param_dtype="f32", mtp=None)
  params = {name: leaf for name, leaf in params.items() if name != "mtp"}
  params = trees.cast(params, "float32")
  if cfg.quant is not None and cfg.quant.scheme != "none":
    cfg, params = convert.fuse(cfg, params)
  cfg, params = convert.fold_to_llama(cfg, params)
  return type(model)(cfg), params


def _run() -> None:
  model, params, tok = ckpt.load_run(_WORKDIR.value)
  dtype = _DTYPE.value or model.cfg.param_dtype
  if _LLAMA.value:
    model, params = _fold(model, params)
  limit = _SHARD_GB.value * 1e9
  ckpt.save_hf(_OUTPUT.value, model, params, tok, max_shard_bytes=limit, dtype=dtype)
  params = {name: leaf for name, leaf in params.items() if name != "mtp"}
  kind = "a plain Llama" if _LLAMA.value else model.cfg.arch
  print(f"{_OUTPUT.value}: {trees.num_params(params):,} parameters in {dtype}, {kind}")


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("workdir", "output"))


if __name__ == "__main__":
  sys.exit(main())
