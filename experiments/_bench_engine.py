"""Rows of `bench_engine`: the real 135M model on this device, decoders one after the other."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from minicpm_jax import ckpt, config
from minicpm_jax.core import fetch
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate
from minicpm_jax.infer.drafters import ngram

TEXTS = {
  "prose": "The history of the lighthouse on the northern cape begins with a storm in which",
  "structured": (
    "Copy this table as JSON lines.\n"
    + "".join(
      f'{{"id": {i}, "name": "item{i}", "price": {i * 3}, "in_stock": true}}\n'
      for i in range(1, 13)
    )
    + "Once more:\n"
    + '{"id": 1, "name": "item1", "price": 3, "in_stock": true}\n'
  ),
}


def load() -> tuple[Any, Any, Any]:
  path = fetch.cached()
  if path is None:
    raise SystemExit(f"the 135M model is not in {fetch.cache_dir()}: run `{fetch.COMMAND}`")
  model, params, tok = ckpt.load_gguf(path, scan_layers=False)
  return *generate.for_decoding(model, params), tok


def engine_runner(
  model: Any, params: Any, drafter: Any, rounds: int, capacity: int
) -> Callable[[list[int], int], dict[str, Any]]:
  """Runs a prompt; tokens, seconds of prefill and decode, mean accept length."""
  cfg = config.EngineConfig(capacity=capacity, rounds_per_dispatch=rounds, min_prefix=-1)
  engine = engine_lib.Engine(model, params, cfg, drafter=drafter)

  def run(prompt: list[int], num_new: int) -> dict[str, Any]:
    out = engine.generate([prompt], config.SamplingConfig(max_new_tokens=num_new))
    stats = out.stats[0]
    return {
      "tokens": out.tokens[0],
      "prefill": stats.prefill_seconds,
      "decode": stats.decode_seconds,
      "accept": stats.mean_accepted,
      "compile": stats.compile_seconds,
    }

  return run


def torch_runner(model: Any, params: Any, tok: Any, folder: str) -> Callable:
  """transformers on the same weights: greedy `generate` with its own cache."""
  import torch
  import transformers

  ckpt.save_hf(folder, model, params, tok)
  hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def run(prompt: list[int], num_new: int) -> dict[str, Any]:
    ids, more = torch.tensor([prompt]), dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
      begin = time.perf_counter()
      hf.generate(ids, max_new_tokens=1, min_new_tokens=1, **more)
      middle = time.perf_counter()
      out = hf.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, **more)
      end = time.perf_counter()
    first = middle - begin
    tokens = out[0, len(prompt) :].tolist()
    return {"tokens": tokens, "prefill": first, "decode": end - middle - first, "compile": 0.0}

  return run


def rows(
  runners: dict[str, Callable], tok: Any, num_new: int, repeats: int
) -> list[dict[str, Any]]:
  """Every decoder in turn, `repeats` times; medians. The first turn compiles and is left out."""
  found = []
  for text_name, text in TEXTS.items():
    prompt = tok.encode(text, add_bos=tok.add_bos)
    first = {name: run(prompt, num_new) for name, run in runners.items()}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    for _ in range(repeats):
      for name, run in runners.items():
        taken[name].append(run(prompt, num_new))
    expected = first["engine"]["tokens"]
    for name, runs in taken.items():
      decode = statistics.median(r["decode"] for r in runs)
      pairs = zip(runs[0]["tokens"], expected, strict=False)
      same = int(np.argmin([a == b for a, b in pairs] + [False]))
      found.append(
        {
          "decoder": name,
          "text": text_name,
          "prompt tokens": len(prompt),
          "prefill ms": 1e3 * statistics.median(r["prefill"] for r in runs),
          "decode tok/s": (num_new - 1) / decode,
          "accept": runs[0].get("accept", 1.0),
          "compile s": first[name]["compile"],
          "equal tokens": same,
        }
      )
      print(
        json.dumps(
          {k: v if isinstance(v, (str, int)) else round(v, 2) for k, v in found[-1].items()}
        ),
        flush=True,
      )
  return found


def drafters(num_levels: list[int]) -> dict[str, Any]:
  return {f"ngram {n}": ngram.NGramDrafter(num_levels=n) for n in num_levels}


def device() -> str:
  return f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)"
