"""Speed of decoding one sequence with the real 135M model, against transformers and llama.cpp.

  python -m experiments.bench_decode --suite=plain            (fetch the model first: fetch_model)
  python -m experiments.bench_decode --suite=speculative      (prompt lookup; table and free text)
  python -m experiments.bench_decode --suite=lowbit           (int8, int4, ternary against float32)
  python -m experiments.bench_decode --shape=minicpm4_0p5b    (random weights in that shape)
  python -m experiments.bench_decode --suite=gpu              (ours alone, the 8B shape, one GPU)

All sides decode the same prompt greedily, in turn; medians. prefill tok/s and first token: the
prompt up to the first new token. decode tok/s: the tokens after it. Compilation is apart. "equal
tokens" counts the new tokens up to the first one that differs from the first side's: float32 sides
agree, llama.cpp at 4 bits rounds activations to 8 bits. Results: OUTPUT/bench_decode_SUITE.json.
"""

import os
import sys

from absl import flags

from experiments import _command

VALUES = flags.FlagValues()
_SUITE = flags.DEFINE_string(
  "suite", "plain", "A name of _bench_decode.SUITES, or gpu.", flag_values=VALUES
)
_MODEL = flags.DEFINE_string(
  "model", None, "A GGUF; default: the 135M model of fetch_model.", flag_values=VALUES
)
_SHAPE = flags.DEFINE_string(
  "shape", None, "A member of the zoo: random weights instead of --model.", flag_values=VALUES
)
_PROMPT = flags.DEFINE_integer(
  "prompt_tokens", 128, "Tokens of prose.", lower_bound=1, flag_values=VALUES
)
_NEW = flags.DEFINE_integer(
  "new_tokens", 64, "Tokens to decode.", lower_bound=2, flag_values=VALUES
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed rounds.", lower_bound=1, flag_values=VALUES)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder; default: benchmarks/results.", flag_values=VALUES
)
_PARTS = flags.DEFINE_list(
  "parts", None, "Of --suite=gpu; default: all but prefill.", flag_values=VALUES
)
_WEIGHTS = flags.DEFINE_list(
  "weights",
  None,
  "Of --suite=gpu: bf16, int4 (both by default), int4_head, ternary.",
  flag_values=VALUES,
)
_COMPILERS = flags.DEFINE_integer(
  "compilers", 4, "Programs of --suite=gpu compiled together.", lower_bound=1, flag_values=VALUES
)
_NODES = flags.DEFINE_list(
  "nodes", None, "Tree sizes of --parts=verify; default: the kind's.", flag_values=VALUES
)
_CONTEXTS = flags.DEFINE_list(
  "contexts", None, "Tokens of --parts=long,chunk; default: 32768,131072.", flag_values=VALUES
)
_COMPILE_ONLY = flags.DEFINE_bool(
  "compile_only", False, "With --suite=gpu: fill jax's compilation cache.", flag_values=VALUES
)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


def _run() -> int | None:
  from experiments import _bench_decode as bench
  from experiments import _models, _results
  from minicpm_jax.models import zoo

  if _SUITE.value not in (known := sorted((*bench.SUITES, bench.GPU))):
    raise ValueError(f"--suite: found {_SUITE.value!r}, expected one of {known}")
  _command.refuse_unread(VALUES, bench.unread(_SUITE.value), f"--suite={_SUITE.value}")
  if _SUITE.value == bench.GPU:
    return _run_gpu()
  if _MODEL.present and _SHAPE.present:
    raise ValueError("--model, --shape: found both, expected at most one of them")
  shape = _SHAPE.value
  if shape is not None and shape not in zoo.ZOO:
    raise ValueError(f"--shape: found {shape!r}, expected one of {sorted(zoo.ZOO)}")
  path = _models.path_of(_MODEL.value) if shape is None else None
  names, missing = bench.available(bench.SUITES[_SUITE.value], is_random=shape is not None)
  for name, why in missing.items():
    print(f"left out: {name} ({why})", flush=True)
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  settings = bench.Settings(num_prompt=_PROMPT.value, num_new=_NEW.value, threads=threads)
  weights = bench.random(shape) if path is None else bench.load(path)
  rows = []
  for one in bench.on_texts(_SUITE.value, settings):
    rows += bench.measure(weights, names, one, _REPEATS.value)
  folder = _results.folder(_OUTPUT.value)
  model = shape if path is None else path.name
  more = dict(model=model, threads=threads, repeats=_REPEATS.value)
  suffix = f"_{shape}" if shape else ""
  name = f"bench_decode_{_SUITE.value}{suffix}.json"
  _results.write(folder / name, rows, left_out=missing, **more)


def _run_gpu() -> int:
  from experiments import _bench_gpu_suite as suites

  options = dict(asked=_WEIGHTS.value, parts=_PARTS.value, num_threads=_COMPILERS.value)
  bad = [n for n in _NODES.value or () if not n.isdigit() or not 1 <= int(n) <= 64]
  if bad:
    raise ValueError(f"--nodes: found {bad}, expected sizes of trees, 1..64")
  nodes = [int(n) for n in _NODES.value or ()]
  if bad := [n for n in _CONTEXTS.value or () if not n.isdigit()]:
    raise ValueError(f"--contexts: found {bad}, expected numbers of tokens")
  contexts = [int(n) for n in _CONTEXTS.value or ()]
  options |= dict(nodes=nodes, contexts=contexts, is_only_compiled=_COMPILE_ONLY.value)
  return suites.run(_SHAPE.value or "minicpm4_8b", _OUTPUT.value, **options)


if __name__ == "__main__":
  sys.exit(main())
