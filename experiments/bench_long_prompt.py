"""A long prompt here: time to the first token, decode speed and memory, sparse and dense.

  python -m experiments.bench_long_prompt                        32k tokens, the 135M model
  python -m experiments.bench_long_prompt --tokens=8192 --sides=sparse

The weights are those of --model (default: fetch_model's), read with InfLLM v2's sizes of MiniCPM4
(sparse) and without (dense); neither was trained for such lengths, so the text means nothing and
only cost counts. The prompt is prose repeated, chunked prefill as in the engine. Every side is a
process of its own (peak resident memory). Writes OUTPUT/bench_long_prompt.json
after every side; rows recorded there for the same model, chunk, machine and jax stay.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from absl import flags

from experiments import _command

SIDES = ("sparse", "dense")
VALUES = flags.FlagValues()
flags.DEFINE_list("sides", list(SIDES), "Of sparse, dense.", flag_values=VALUES)
flags.DEFINE_integer("tokens", 32768, "Of the prompt.", lower_bound=16, flag_values=VALUES)
flags.DEFINE_integer("new_tokens", 32, "Decoded after it.", lower_bound=2, flag_values=VALUES)
flags.DEFINE_integer("chunk", 2048, "Tokens of a prefill forward.", flag_values=VALUES)
flags.DEFINE_string("model", None, "Default: the 135M model of fetch_model.", flag_values=VALUES)
flags.DEFINE_string("output", None, "Folder; default: benchmarks/results.", flag_values=VALUES)
flags.DEFINE_string("side", None, "Internal: measure it here, print JSON.", flag_values=VALUES)


def _run() -> None:
  from experiments import _models, _results

  path = _models.path_of(VALUES.model)
  if wrong := sorted(set(VALUES.sides) - set(SIDES)):
    raise ValueError(f"--sides: found {wrong}, expected of {list(SIDES)}")
  if VALUES.side is not None:
    print(json.dumps(_measure(path)))
    return
  out = _results.folder(VALUES.output)
  out = out / "bench_long_prompt.json"
  key = {"model": path.name, "chunk": VALUES.chunk}
  setting = key | {name: _results.environment()[name] for name in ("cpu", "num_cpus", "jax")}
  rows = {(row["side"], row["prompt"]): row for row in _results.recorded(out, setting)}
  for side in VALUES.sides:
    command = [sys.executable, "-m", "experiments.bench_long_prompt", f"--side={side}"]
    command += [f"--{name}={VALUES[name].value}" for name in ("tokens", "new_tokens", "chunk")]
    done = subprocess.run([*command, f"--model={path}"], capture_output=True, text=True)
    if done.returncode:
      lines = done.stderr.splitlines() or [f"status {done.returncode}"]
      raise ValueError(f"side {side}: {lines[-1]}")
    row = json.loads(done.stdout.splitlines()[-1])
    rows[row["side"], row["prompt"]] = row
    _results.write(out, [rows[name] for name in sorted(rows, key=lambda n: n[::-1])], **key)


def _measure(path: pathlib.Path) -> dict:
  import resource

  import jax
  import numpy as np

  from experiments import _bench_decode
  from minicpm_jax import config
  from minicpm_jax.infer import engine as engine_lib

  weights = _bench_decode.load(path)
  sparse = config.SparseAttentionConfig() if VALUES.side == "sparse" else None
  capacity = VALUES.tokens + VALUES.new_tokens
  model = type(weights.model)(
    dataclasses.replace(weights.model.cfg, sparse=sparse, max_position=capacity)
  )
  cfg = config.EngineConfig(capacity=capacity, chunk_size=VALUES.chunk, min_prefix=-1)
  engine = engine_lib.Engine(model, weights.params, cfg)
  text = weights.tok.encode(_bench_decode.PROSE)
  prompt = np.resize(np.asarray(text, np.int32), VALUES.tokens).tolist()
  sampling = config.SamplingConfig(max_new_tokens=VALUES.new_tokens)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  stats = engine.generate([prompt], sampling).stats[0]
  return {
    "side": VALUES.side,
    "prompt": VALUES.tokens,
    "first token s": stats.prefill_seconds,
    "prefill tok/s": VALUES.tokens / stats.prefill_seconds,
    "decode tok/s": (VALUES.new_tokens - 1) / stats.decode_seconds,
    "compile s": stats.compile_seconds,
    "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "GiB before": before,
    "weights GiB": sum(x.nbytes for x in jax.tree.leaves(weights.params)) / 2**30,
    "load": os.getloadavg()[0],
  }


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  sys.exit(main())
