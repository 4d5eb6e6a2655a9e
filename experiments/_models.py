"""`--model`: weights and tokenizer of whatever lies on disk, in the form that decodes fastest."""

import math
import pathlib
from typing import Any

import jax

from minicpm_jax import ckpt
from minicpm_jax.ckpt import run_config
from minicpm_jax.core import fetch, types
from minicpm_jax.infer import generate
from minicpm_jax.models import transformer
from minicpm_jax.quant import tree
from minicpm_jax.text import tokenizer

KINDS = (
  "an HF folder (config.json, *.safetensors), a run folder (config.py, checkpoints/) with or "
  "without @STEP, or a .gguf file"
)


def load(
  spec: str, num_rows: int = 1, quant_head: str = "none", *, flag: str = "--model"
) -> tuple[transformer.Transformer, types.Params, tokenizer.Tokenizer]:
  """(model, params, tokenizer) of an HF folder, `workdir[@step]` or a GGUF file; num_rows as in
  `generate.for_decoding`. quant_head: a scheme for the output head, or none. flag: in errors."""
  path = pathlib.Path(spec)
  is_cpu = jax.default_backend() == "cpu"
  if path.is_file() and path.suffix == ".gguf":
    model, params, tok = ckpt.load_gguf(path, scan_layers=generate.is_scanned())
  elif (path / "config.json").is_file():
    dtype = "f32" if is_cpu else None
    model, params, tok = ckpt.load_hf(path, dtype=dtype, scan_layers=generate.is_scanned())
  elif (run_config.split_step(spec)[0] / run_config.FILE_NAME).is_file():
    model, params, tok = ckpt.load_run(spec)
  else:
    raise ValueError(f"{flag}: {spec}: found {_what_is(path)}, expected {KINDS}")
  if tok is None:
    raise ValueError(f"{flag}: {spec}: found no tokenizer, expected one beside the weights")
  if quant_head != "none":
    params = with_low_head(model, params, quant_head)
  model, params = generate.for_decoding(model, params, num_rows, donate=True)
  return model, params, tok


def path_of(spec: str | None) -> pathlib.Path:
  """Where the model of `--model` lies; without one the 135M model of the cache folder."""
  path = spec or fetch.cached()
  if path is None:
    raise ValueError(f"--model: found no 135M model in the cache folder; run {fetch.COMMAND}")
  return pathlib.Path(path)


def load_floats(path: pathlib.Path, **options: Any):
  """(model, params, tokenizer or None) in float32 as training has them: an HF folder or a GGUF."""
  read = ckpt.load_gguf if path.suffix == ".gguf" else ckpt.load_hf
  return read(path, dtype="f32", **options)


def with_low_head(
  model: transformer.Transformer, params: types.Params, scheme: str
) -> types.Params:
  """The output head rounded: int8 with a scale a token, int4 in groups of 128 or what divides."""
  size = -1 if scheme == "int8" else math.gcd(128, model.cfg.model_dim)
  return tree.quantize_head(params, scheme, size)


def _what_is(path: pathlib.Path) -> str:
  if path.is_dir():
    names = sorted(entry.name for entry in path.iterdir())[:8]
    return f"a folder with {', '.join(names) or 'nothing in it'}"
  return "a file of another kind" if path.exists() else "no such file or folder"
