"""`general.sampling.*` of a GGUF file: what llama.cpp samples by where its user says nothing.

Its converter fills them from generation_config.json (gguf `metadata.py`), without do_sample: a
file with any of temp, top_k, top_p, min_p samples, unless temp is 0.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from minicpm_jax import config

_NAMES = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_PENALTY = "penalty_repeat"


def read(fields: Mapping[str, Any]) -> str | None:
  """The text of a generation_config.json (`SamplingConfig.from_hf`); None: the file has no key.

  Raises ValueError that names the key where its value is no finite number.
  """
  found = {}
  for ours, theirs in {**_NAMES, "repetition_penalty": _PENALTY}.items():
    key = f"general.sampling.{theirs}"
    if key in fields:
      value = fields[key]
      if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}: found {value!r}, expected a finite number")
      # float32 of the file -> the shortest decimal that gives it
      found[ours] = float(f"{value:.7g}") if isinstance(value, float) else value
  if found.keys() & _NAMES.keys():
    found["do_sample"] = found.get("temperature") != 0
  return json.dumps(found, sort_keys=True) if found else None


def write(writer: Any, generation: str | None) -> None:
  """Writes what `SamplingConfig.from_hf` makes of the text; greedy is not written.

  llama.cpp penalises the last 64 tokens unless told; transformers and we all of them (-1).
  """
  if generation is None:
    return
  sampling = config.SamplingConfig.from_hf(generation)
  if sampling.temperature > 0:
    writer.add_sampling_temp(sampling.temperature)
    writer.add_sampling_top_k(sampling.top_k)
    writer.add_sampling_top_p(sampling.top_p)
    writer.add_sampling_min_p(sampling.min_p)
  if not math.isclose(sampling.repetition_penalty, 1.0):
    writer.add_sampling_penalty_repeat(sampling.repetition_penalty)
    writer.add_sampling_penalty_last_n(-1)
