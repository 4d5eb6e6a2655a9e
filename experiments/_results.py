"""Result files of the benchmarks: where they lie, what they were measured on, their tables."""

import importlib.util
import json
import os
import pathlib
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from minicpm_jax.core import files

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def environment() -> dict[str, Any]:
  """Device, versions and load, for every result file."""
  device = jax.devices()[0]
  cpu = platform.processor() or platform.machine()
  if pathlib.Path("/proc/cpuinfo").exists():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
  return {
    "device": f"{device.platform}: {device.device_kind}",
    "cpu": cpu,
    "num_cpus": os.cpu_count(),
    "jax": jax.__version__,
    **{p: metadata.version(p) for p in ("torch", "transformers") if _is_installed(p)},
    "python": platform.python_version(),
    "load_average": os.getloadavg(),
    "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
  }


def _is_installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def folder(output: str | None) -> pathlib.Path:
  """Of --output, by default the results that are committed."""
  return pathlib.Path(output) if output else RESULTS


def table(rows: list[dict[str, Any]]) -> str:
  """A markdown table of the columns of all rows."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
  for row in rows:
    found = (row.get(name, "") for name in names)
    cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in found)
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def write(path: pathlib.Path, rows: list[dict[str, Any]], **more: Any) -> pathlib.Path:
  """The rows as JSON, and as a table on the screen."""
  save(path, rows, **more)
  print(table(rows), f"\n\n{path}", flush=True)
  return path


def save(path: pathlib.Path, rows: list[dict[str, Any]], **more: Any) -> None:
  """The rows as JSON, with the environment."""
  files.write_json(path, {"environment": environment(), **more, "rows": rows})


def with_nan(value: Any) -> Any:
  """What JSON holds of measured numbers, with NaN where it has null (`files.as_json`)."""
  if isinstance(value, dict):
    return {key: with_nan(x) for key, x in value.items()}
  if isinstance(value, list):
    return [with_nan(x) for x in value]
  return float("nan") if value is None else value


def recorded(path: pathlib.Path, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Rows of an earlier run with the same setting, of which the environment may be a part."""
  if not path.is_file():
    return []
  old = json.loads(path.read_text())
  found = old | old.get("environment", {})
  return old["rows"] if all(found.get(key) == value for key, value in setting.items()) else []
