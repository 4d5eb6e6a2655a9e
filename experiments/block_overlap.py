"""How many selected blocks do neighbouring queries share? On a model's own queries, over real text.

  python -m experiments.block_overlap --text=wikitext2_test.txt.gz        the 135M model

Kernels form tiles of neighbouring queries over the union of their lists (infllm_v2.md 19.3); what a
tile costs goes by that union. Counted are free blocks: those of a query's list that are neither
initial nor local, which every query has and which tiles need no list for. Queries are those of the
second half of every row, whose past holds more blocks than a list. The lists come from a model that
was trained densely (rule "joint", coarse normaliser): training-free selection. Beside it, the same
count on the lists that the bench of `pallas_kernels.sparse_attention` draws. Default model: the
135M model (3 query heads a key head, MiniCPM4-8B: 16). Writes OUTPUT/block_overlap.json.
"""

import json
import pathlib
import sys

from absl import flags

from experiments import _block_overlap as overlap
from experiments import _command, _models, _quantize, _results
from minicpm_jax import config
from minicpm_jax.core import files

VALUES = flags.FlagValues()
_CASES = ("minicpm4_8b_32k", "minicpm4_8b_128k")


_define = _command.definer(VALUES)
_MODEL = _define("string", "model", None, "HF folder or .gguf; default: the 135M model.")
_TEXT = _define("multi_string", "text", [], "Text, .txt or .jsonl (.gz); repeatable.")
_OUTPUT = _define("string", "output", "benchmarks/results", "Folder of the JSON.")
_LENGTH = _define("multi_integer", "length", [4096, 8192], "Tokens of a row; repeatable.")
_ROWS = _define("integer", "sequences", 2, "Rows of each length, one after the other in the text.")
_TOPK = _define("integer", "topk", 12, "Blocks of a list, the window's not counted (8B: 64).")
_WINDOW = _define("integer", "window_size", 256, "Tokens of the local window (8B: 2048).")
_CASE = _define("multi_string", "case", list(_CASES), "Of the bench's lists; repeatable; '': none.")


def _run() -> None:
  if _ROWS.value < 1:
    raise ValueError(f"--sequences: found {_ROWS.value}, expected 1 or more")
  path = _models.path_of(_MODEL.value)
  sparse = config.SparseAttentionConfig(
    topk=_TOPK.value, window_size=_WINDOW.value, dense_len=-1, lse="coarse"
  )
  model, params, tok = _models.load_floats(path, scan_layers=False)
  stream = _quantize.token_stream([pathlib.Path(p) for p in _TEXT.value], tok)
  result = {
    "model": path.name,
    "text": [pathlib.Path(p).name for p in _TEXT.value],
    "sparse": sparse.to_hf() | {"selection": sparse.selection, "lse": sparse.lse},
    "neighbours": list(overlap.NEIGHBOURS),
    "environment": _results.environment(),
    "bench_lists": [overlap.of_bench(name) for name in filter(None, _CASE.value)],
    "text_lists": [],
  }
  print(json.dumps(result["bench_lists"]), flush=True)
  if bad := [n for n in _LENGTH.value if not 2 <= n <= model.cfg.max_position]:
    raise ValueError(f"--length: found {bad}, expected 2 to {model.cfg.max_position}")
  for length in _LENGTH.value:
    rows = _quantize.windows(stream, _ROWS.value, length, None)
    result["text_lists"].append(overlap.measure(model.cfg, params, rows, sparse))
    found = {k: v for k, v in result["text_lists"][-1].items() if k != "by_layer"}
    print(json.dumps(found), flush=True)
  files.write_json(pathlib.Path(_OUTPUT.value) / "block_overlap.json", result, indent=None)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("text",))


if __name__ == "__main__":
  sys.exit(main())
