"""Tile sizes found on real devices: pallas_kernels/<op>/tuned.json, {device kind: {key: config}}.

A miss means the op's heuristic. Only `python -m pallas_kernels.<op>.bench --tune` writes the file.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax

Config = TypeVar("Config")


def _path(op: str) -> pathlib.Path:
  return pathlib.Path(__file__).parents[1] / op / "tuned.json"


@functools.cache
def _table(op: str) -> dict:
  path = _path(op)
  return json.loads(path.read_text()) if path.exists() else {}


def key(group: int, head_dim: int, dtype, implementation: str = "triton") -> str:
  """Entries of Triton have no prefix."""
  prefix = "" if implementation == "triton" else f"{implementation}_"
  return f"{prefix}G{group}_H{head_dim}_{dtype}"


def lookup(op: str, config_class: type[Config], name: str) -> Config | None:
  """The config tuned for the device in use under `name`, or None."""
  found = _table(op).get(jax.devices()[0].device_kind, {}).get(name)
  return None if found is None else config_class(**found)


def search(candidates: Iterable[Config], seconds: Callable[[Config], float]) -> Config:
  """The fastest of the candidates that the device can run; prints each."""
  best, best_time = None, float("inf")
  for config in candidates:
    try:
      time = seconds(config)
    except Exception as error:  # a tile that does not fit: say so and go on
      print(f"  {config}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
      continue
    print(f"  {config}: {1e6 * time:.0f} us")
    if time < best_time:
      best, best_time = config, time
  if best is None:
    raise RuntimeError("no candidate ran on this device")
  return best


def save(op: str, name: str, config) -> pathlib.Path:
  """Writes `config` under the device in use."""
  path = _path(op)
  table = json.loads(path.read_text()) if path.exists() else {}
  table.setdefault(jax.devices()[0].device_kind, {})[name] = dataclasses.asdict(config)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
  os.replace(temporary, path)
  _table.cache_clear()
  return path
