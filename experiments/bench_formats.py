"""Size on disk and perplexity of one model per format; speed is `bench_decode --suite=lowbit`.

  python -m experiments.bench_formats --heldout=TEXT

Weights are rounded to nearest (calibrated methods: `bench_quantize`), projections only; embedding
and head stay 16 bit or more, except in q8_0 and where the name says so (int4+int8: its head and
embedding are one int8 table). float32, bf16 and q8_0 are GGUF files, int4 is a GPTQ
folder (groups of 64); of int8 and ternary codes with a scale a channel, and beside a rounded table,
the arrays are counted, with the other weights in bf16. Result: OUTPUT/bench_formats.json. Default
model: the 135M model.
"""

import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

from experiments import _command

VALUES = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", None, "A GGUF; default: the 135M model.", flag_values=VALUES)
_HELDOUT = flags.DEFINE_string("heldout", None, "Evaluation text.", flag_values=VALUES)
_ROWS = flags.DEFINE_integer("eval_sequences", 32, "Rows of text.", 1, flag_values=VALUES)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a row.", 2, flag_values=VALUES)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder; default: benchmarks/results.", flag_values=VALUES
)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("heldout",))


def _run() -> None:
  from experiments import _models, _quantize, _results
  from minicpm_jax import ckpt

  path = _models.path_of(_MODEL.value)
  model, params, tok = ckpt.load_gguf(path, dtype="f32")
  stream = _quantize.token_stream([pathlib.Path(_HELDOUT.value)], tok)
  text = _quantize.windows(stream, _ROWS.value, _LENGTH.value, None)
  rows = []
  names = ("float32", "bf16", "q8_0", "int8", "int8+int8", "int4", "int4+int8", "int4+int4")
  for name in (*names, "ternary"):
    with tempfile.TemporaryDirectory() as folder:
      size, *back = _written(name, pathlib.Path(folder), model, params, tok)
    value = _quantize.perplexity(*back, text)
    rows.append({"format": name, "MB": size / 1e6, "perplexity": value})
    print(rows[-1], flush=True)
  folder = _results.folder(_OUTPUT.value)
  more = dict(model=path.name, heldout=pathlib.Path(_HELDOUT.value).name)
  _results.write(folder / "bench_formats.json", rows, **more, tokens=int(text.size))


def _written(name: str, folder: pathlib.Path, model: Any, params: Any, tok: Any) -> tuple:
  """(bytes on disk, model, params) of a format, read back from its file where it has one."""
  import jax
  import jax.numpy as jnp

  from minicpm_jax import ckpt, config
  from minicpm_jax.models import transformer
  from minicpm_jax.quant import qtensor, tree

  if name in ("float32", "bf16", "q8_0"):
    path = folder / "model.gguf"
    kind = {"float32": "f32"}.get(name, name)
    more = dict(embedding_kind="q8_0") if name == "q8_0" else {}
    ckpt.save_gguf(path, model, params, tok, kind=kind, **more)
    return path.stat().st_size, *ckpt.load_gguf(path, dtype="f32")[:2]
  form, (name, _, head) = name, name.partition("+")
  size = 64 if name == "int4" else -1
  scale = "f16" if name == "int4" else "f32"
  quant = config.QuantConfig(scheme=name, group_size=size, weights="packed", scale_dtype=scale)
  low = tree.quantize_params(quant, params)
  if head:
    low = tree.quantize_head(low, head, 64 if head == "int4" else -1, scale_dtype="f16")
  if form == "int4":
    ckpt.save_gptq(folder / "out", model, low, tok, dtype=jnp.bfloat16)
    files = sum(f.stat().st_size for f in (folder / "out").iterdir())
    back, params = ckpt.load_hf(folder / "out", dtype="f32")[:2]
    return files, back, params
  leaves = jax.tree.leaves(low, is_leaf=qtensor.is_qtensor)
  count = sum(x.nbytes if qtensor.is_qtensor(x) else 2 * x.size for x in leaves)
  return count, transformer.Transformer(dataclasses.replace(model.cfg, quant=quant)), low


if __name__ == "__main__":
  sys.exit(main())
