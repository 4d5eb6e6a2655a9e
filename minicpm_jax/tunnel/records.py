"""Records of runs: what is kept in a run's file, and the checks that a plan must pass.

A file holds the spec beside the result, so that a workdir is never read for another run.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from minicpm_jax.core import trees
from minicpm_jax.optim import schedules
from minicpm_jax.tunnel import engine, plan


class PlanError(ValueError):
  """A plan that cannot run, or a workdir that holds other runs under its names."""


@dataclasses.dataclass
class Result:
  """What is known of a finished run; losses are nats per counted token, inf where it diverged."""

  name: str
  losses: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
  train: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # means of chunks
  diverged_at: int | None = None
  seconds: float = 0.0  # this run's share of the wall time, without compiling
  cpu_seconds: float = 0.0
  steps_run: int = 0  # without those of the trunk
  is_resumed: bool = False

  def loss(self, rows: str = "text", step: int | None = None) -> float:
    """Held-out loss at `step` (None: the last)."""
    if rows not in self.losses:
      raise KeyError(f"{self.name}: found no loss of {rows!r}, expected one of {list(self.losses)}")
    found = self.losses[rows]
    step = max(found) if step is None else step
    if step not in found:
      raise KeyError(f"{self.name}: found no loss at step {step}, expected one of {sorted(found)}")
    return found[step]


def spec_data(spec: plan.RunSpec) -> dict[str, Any]:
  """The spec as JSON data, for the file of a run and for telling runs apart."""
  return _json_data(spec)


def waves(specs: Sequence[plan.RunSpec]) -> list[list[plan.RunSpec]]:
  """Trunks before branches; PlanError for a missing trunk, a missing save, names used twice."""
  by_name = {spec.name: spec for spec in specs}
  if len(by_name) != len(specs):
    names = [spec.name for spec in specs]
    raise PlanError(f"plan: found {[n for n in by_name if names.count(n) > 1]} twice")
  for spec in specs:
    if spec.branch_from is None:
      continue
    trunk_name, step = spec.branch_from
    trunk = by_name.get(trunk_name)
    if trunk is None or step not in trunk.save_steps:
      found = "no such run" if trunk is None else f"save_steps {trunk.save_steps}"
      raise PlanError(
        f"{spec.name}.branch_from: found {trunk_name}@{step} with {found}, expected a run of the "
        "plan that saves this step"
      )
    check_past(trunk, spec)
  waves: list[list[plan.RunSpec]] = []
  done: set[str] = set()
  while len(done) < len(specs):
    ready = [
      s for s in specs if s.name not in done and (s.branch_from is None or s.branch_from[0] in done)
    ]
    if not ready:
      raise PlanError(f"plan: found branches in a circle among {sorted(by_name.keys() - done)}")
    waves.append(ready)
    done |= {s.name for s in ready}
  return waves


def check_past(trunk: plan.RunSpec, branch: plan.RunSpec) -> None:
  """The branch must be what a fresh run of it would be: same model, seeds, rows and past rates."""
  for name in ("model", "batch_size", "seq_len", "seed", "data_seed"):
    if getattr(trunk, name) != getattr(branch, name):
      raise PlanError(
        f"{branch.name}.{name}: found {getattr(branch, name)!r}, expected the "
        f"trunk's {getattr(trunk, name)!r}"
      )
  steps = np.arange(1, branch.first_step + 1, dtype=np.float32)
  rates = [
    np.asarray(jax.vmap(lambda s, a=arrays: schedules.learning_rate(s, a))(steps))
    for arrays in (
      schedules.schedule_arrays(s.optim.schedule, s.optim.peak_lr) for s in (trunk, branch)
    )
  ]
  if not np.array_equal(*rates):
    first = int(np.argmax(rates[0] != rates[1])) + 1
    raise PlanError(
      f"{branch.name}.optim.schedule: found another rate than the trunk's at step {first}, "
      f"expected equal ones up to the branch at {branch.first_step}"
    )
  for step in range(branch.first_step):
    if trunk.weights_at(step) != branch.weights_at(step):
      raise PlanError(
        f"{branch.name}.phases: found another mixture than the trunk's at step {step}"
      )


def check_same(path: pathlib.Path, found: Any, expected: Any) -> None:
  """PlanError where a file's data differ from `expected`; names the first field that does."""
  if found == expected:
    return
  name, there, here = _first_difference(found, expected)
  raise PlanError(
    f"{path}: is of a run with {name} {str(there)[:200]}, expected "
    f"{str(here)[:200]}; use another workdir or another run name"
  )


def check_spec(path: pathlib.Path, found: dict[str, Any], spec: plan.RunSpec) -> None:
  """`check_same` for a spec, whose file may be older than a field of its configs.

  A field that the file lacks counts as having its default, which is how the run was made if the
  field changes nothing at its default. Fields that the file has and the configs no longer have are
  differences.
  """
  check_same(path, _with_defaults(found, spec), spec_data(spec))


def _with_defaults(data: Any, like: Any) -> Any:
  """`data` with the defaults of the fields that it lacks, by the dataclasses inside `like`."""
  if dataclasses.is_dataclass(like) and isinstance(data, dict):
    filled = {name: _with_defaults(x, getattr(like, name, None)) for name, x in data.items()}
    for field in dataclasses.fields(like):
      default = field.default
      if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
      if field.name not in data and default is not dataclasses.MISSING:
        filled[field.name] = _json_data(default)
    return filled
  if isinstance(like, list | tuple) and isinstance(data, list) and len(data) == len(like):
    return [_with_defaults(x, y) for x, y in zip(data, like, strict=True)]
  return data


def _json_data(value: Any) -> Any:
  """`value` as it comes back from a JSON file."""
  return json.loads(json.dumps({"x": value}, default=dataclasses.asdict))["x"]


def _first_difference(found: Any, expected: Any, name: str = "") -> tuple[str, Any, Any]:
  """(dotted name, found, expected) of the first field that differs; "nothing" where one lacks."""
  if not (isinstance(found, dict) and isinstance(expected, dict)):
    return name, found, expected
  for key in dict.fromkeys([*expected, *found]):
    there, here = found.get(key, "nothing"), expected.get(key, "nothing")
    if there != here:
      return _first_difference(there, here, f"{name}.{key}".lstrip("."))
  raise AssertionError("no difference")  # callers have found one


def restore(path: pathlib.Path, like: engine.State, file: Any) -> engine.State:
  """Arrays of `file` in the structure of `like`; names what does not fit."""

  def leaf(name: str, shape: Any) -> Any:
    if name not in file or file[name].shape != shape.shape:
      found = file[name].shape if name in file else "nothing"
      raise PlanError(f"{path}: {name}: found {found}, expected {shape.shape}")
    return file[name]

  return engine.State(**trees.map_with_path(leaf, like._asdict()))


def result_of(data: dict[str, Any]) -> Result:
  """From JSON, which has no inf: it is null there."""
  losses = {
    name: {int(step): math.inf if x is None else x for step, x in found.items()}
    for name, found in data["losses"].items()
  }
  train = [(step, math.inf if x is None else x) for step, x in data["train"]]
  return Result(**{**data, "losses": losses, "train": train})


def read_result(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Result]:
  """(spec as JSON data, result) of a run's file."""
  try:
    data = json.loads(pathlib.Path(path).read_text())
    return data["spec"], result_of(data["result"])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise PlanError(f"{path}: found no record of a run ({error!r})") from None
