"""Flags that every training script shares, and the config they describe.

  --config=minicpm4_0p5b[:arg]     a file of configs/, or a path: workdir/config.py[:arg]
  --workdir=runs/a                 checkpoints, metrics, config.py
  --set model.num_layers=4         one field; repeatable, applied after the config is built
  --data=NAME:PATH[:WEIGHT]        one prepared source; repeatable, replaces all sources
  --coordinator=HOST:PORT --num_processes=N --process_id=I     more than one machine by hand
  --distributed                    the same, found from Slurm, Open MPI, GKE or the TPU pod

WEIGHT of --data is the share of rows: one number for every phase (default 1), one number a phase
("0.9/0.4" in the order of the config's phases), or "eval" for a source that is only evaluated.
"""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from minicpm_jax import config
from minicpm_jax.core import mesh

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def define(values: flags.FlagValues) -> None:
  """The flags above in the registry of one script."""
  own = {"flag_values": values}
  flags.DEFINE_string("config", None, "NAME[:arg] of configs/, or PATH.py[:arg].", **own)
  flags.DEFINE_string("workdir", None, "Folder of the run.", **own)
  flags.DEFINE_multi_string("set", [], "FIELD=VALUE override of the config; repeatable.", **own)
  flags.DEFINE_multi_string("data", [], "NAME:PATH[:WEIGHT] of a source; repeatable.", **own)
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.", **own)
  flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.", **own)
  flags.DEFINE_integer("process_id", None, "Index of this process, with --coordinator.", **own)
  flags.DEFINE_bool("distributed", False, "Join the job of Slurm, Open MPI, GKE or TPU.", **own)


def start_distributed(values: flags.FlagValues) -> None:
  """Joins the other processes if the flags ask for it; call before any other use of jax."""
  if values.coordinator is not None or values.num_processes is not None or values.distributed:
    mesh.initialize_distributed(values.coordinator, values.num_processes, values.process_id)


def get_config(values: flags.FlagValues) -> Any:
  """The config of --config with --data and --set applied, in this order."""
  if values.config is None:
    raise ValueError(f"--config: found none, expected one of {', '.join(names())} or a path.py")
  cfg = load(values.config)
  if not isinstance(cfg, config.TrainConfig):
    found = f"{values.config}, a {type(cfg).__name__}"
    raise ValueError(f"--config: found {found}, expected a TrainConfig")
  if values.data:
    cfg = with_sources(cfg, values.data)
  return config.overrides(cfg, values["set"].value)


def get_workdir(values: flags.FlagValues) -> pathlib.Path:
  if values.workdir is None:
    raise ValueError("--workdir: found none, expected a folder for the run")
  return pathlib.Path(values.workdir)


def names() -> list[str]:
  """Recipes in configs/."""
  return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def load(text: str) -> Any:
  """`get_config(arg)` of "NAME[:arg]" or "PATH.py[:arg]"."""
  name, _, arg = text.partition(":")
  if name.endswith(".py") or "/" in name:
    if not name.endswith(".py"):
      raise ValueError(f"--config: found {name}, expected a path.py or one of {', '.join(names())}")
    module = _load_file(pathlib.Path(name))
  elif name in names():
    if str(CONFIGS.parent) not in sys.path:
      sys.path.insert(0, str(CONFIGS.parent))
    module = importlib.import_module(f"configs.{name}")
  else:
    raise ValueError(f"--config: found {name!r}, expected one of {', '.join(names())} or a path.py")
  return module.get_config(arg)


def _load_file(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ValueError(f"--config: found no file {path}, expected Python with get_config(arg)")
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config: found {path} without get_config, expected get_config(arg)")
  return module


def with_sources(cfg: config.TrainConfig, texts: Sequence[str]) -> config.TrainConfig:
  """`cfg` on the sources of repeated --data flags; its phases keep their names and steps."""
  phases = cfg.data.phases or (config.PhaseConfig(weights=(("any", 1.0),)),)
  sources: list[config.SourceConfig] = []
  weights: list[tuple[str, tuple[float, ...]]] = []
  held_out: list[str] = []
  for text in texts:
    name, sep, rest = text.partition(":")
    if not name or not sep or not rest:
      raise ValueError(f"--data: found {text!r}, expected NAME:PATH[:WEIGHT]")
    path, _, weight = rest.partition(":")
    sources.append(config.SourceConfig(name=name, path=path))
    if weight == "eval":
      held_out.append(name)
    else:
      weights.append((name, _weights(text, weight or "1", len(phases))))
  if not weights:
    raise ValueError(f"--data: found only evaluation sources {held_out}, expected one to train on")
  data = dataclasses.replace(
    cfg.data,
    sources=tuple(sources),
    phases=tuple(
      dataclasses.replace(phase, weights=tuple((name, w[i]) for name, w in weights if w[i] > 0))
      for i, phase in enumerate(phases)
    ),
  )
  return dataclasses.replace(cfg, data=data, eval_sources=tuple(held_out))


def _weights(text: str, weight: str, num_phases: int) -> tuple[float, ...]:
  try:
    values = tuple(float(part) for part in weight.split("/"))
  except ValueError:
    raise ValueError(
      f"--data: found weight {weight!r} in {text!r}, expected numbers or 'eval'"
    ) from None
  if not all(0 <= value < math.inf for value in values):
    raise ValueError(f"--data: found weight {weight!r} in {text!r}, expected numbers >= 0")
  if len(values) == 1:
    values *= num_phases
  if len(values) != num_phases:
    raise ValueError(
      f"--data: found {len(values)} weights in {text!r}, expected 1 or one for each of the "
      f"{num_phases} phases of the config"
    )
  return values
