"""A Hugging Face folder or GGUF file -> a run folder (step 0) that training and decoding accept.

  python -m experiments.import_hf --model=MiniCPM4-0.5B --workdir=runs/base
  python -m experiments.import_hf --model=model.gguf --workdir=runs/base --dtype=bf16

`pretrain --set init_from=MODEL` reads such folders and files directly; a run folder is for
branching several runs off the same weights and for restoring them onto any mesh.
"""

import dataclasses
import pathlib
import sys

import jax
from absl import flags

from experiments import _command
from minicpm_jax import ckpt
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.core import trees

VALUES = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", None, "HF folder or .gguf file.", flag_values=VALUES)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder to create.", flag_values=VALUES)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["f32", "bf16", "f16"],
  "Of the stored parameters; default: as in the file, f32 if it mixes them (and for GGUF).",
  flag_values=VALUES,
)


def _load(path: str, dtype: str | None):
  if path.endswith(".gguf"):
    return ckpt.load_gguf(path, dtype=dtype or "f32")
  model, params, tok = ckpt.load_hf(path, dtype=dtype)
  if len({leaf.dtype for leaf in jax.tree.leaves(params)}) > 1:  # a run has one parameter dtype
    cfg = dataclasses.replace(model.cfg, dtype="f32", param_dtype="f32")
    return type(model)(cfg), trees.cast(params, "float32"), tok
  return model, params, tok


def _run() -> None:
  model, params, tok = _load(_MODEL.value, _DTYPE.value)
  name = pathlib.Path(_MODEL.value).resolve().stem
  cfg = dataclasses.replace(model.cfg, name=name)
  orbax_io.import_params(_WORKDIR.value, cfg, params, tok)
  print(
    f"{_WORKDIR.value}: step 0 with {trees.num_params(params):,} parameters in "
    f"{cfg.param_dtype}, {'with' if tok is not None else 'without'} tokenizer"
  )


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("model", "workdir"))


if __name__ == "__main__":
  sys.exit(main())
