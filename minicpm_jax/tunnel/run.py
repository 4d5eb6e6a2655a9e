"""Executes plans: shared programs, branches from checkpoints, one JSON a run, resumable.

`Runner.run(specs)` finishes what is missing of a plan: a run whose JSON is there is read back, one
that was cut off goes on from its newest saved state, trunks come before their branches. Runs with
one program go through it together (`engine`), spread over the devices. Runs too large or of a kind
that a program cannot share are `TrainConfig`s for `queue`, which calls `train.loop` one by one.

Files of a workdir: runs/NAME.json, states/NAME@STEP.npz.
"""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import files, trees, types
from minicpm_jax.optim import schedules
from minicpm_jax.train import loop
from minicpm_jax.tunnel import corpus as corpus_lib
from minicpm_jax.tunnel import engine, plan, records
from minicpm_jax.tunnel import knobs as knobs_lib


class Runner:
  """Runs plans in `workdir` on `corpus`, evaluating `rows` (name -> rows) of every run."""

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    workdir: str | os.PathLike[str],
    rows: Mapping[str, corpus_lib.Rows],
    *,
    batching: engine.Batching = "auto",
    chunk_steps: int = 50,
    max_batch: int = 32,
    devices: Sequence[Any] | None = None,
    log: Callable[[str], None] | None = None,
  ):
    if chunk_steps < 1 or max_batch < 1:
      raise ValueError(f"chunk_steps, max_batch: found {chunk_steps}, {max_batch}, expected >= 1")
    self.corpus, self.workdir, self.rows = corpus, pathlib.Path(workdir), dict(rows)
    self.batching = engine.batching_of(batching)
    self.chunk_steps = chunk_steps
    self.lane_size = 1 if self.batching == "loop" else max_batch
    self.log = log or (lambda line: None)
    self.compile_seconds = 0.0
    self._devices = list(devices or jax.local_devices())
    self._programs: dict[engine.Key, engine.Program] = {}
    self._tokens = {d: jax.device_put(jnp.asarray(corpus.tokens), d) for d in self._devices}

  # --- Files -------------------------------------------------------------------------------------

  def _result_path(self, name: str) -> pathlib.Path:
    return self.workdir / "runs" / f"{name}.json"

  def _state_path(self, name: str, step: int) -> pathlib.Path:
    return self.workdir / "states" / f"{name}@{step}.npz"

  def result(self, spec: plan.RunSpec) -> records.Result | None:
    """The finished run from its file; records.PlanError where the file is of another spec."""
    path = self._result_path(spec.name)
    if not path.exists():
      return None
    data = json.loads(path.read_text())
    records.check_spec(path, data["spec"], spec)
    return records.result_of(data["result"])

  def save_state(self, spec: plan.RunSpec, state: engine.State, result: records.Result) -> None:
    """The whole state at its step, with what is known of the run so far."""
    path = self._state_path(spec.name, int(state.step))
    leaves = {k: np.asarray(x) for k, x in trees.flatten_paths(state._asdict()).items()}
    about = {"spec": records.spec_data(spec), "result": dataclasses.asdict(result)}
    with files.replacing(path) as partial:
      np.savez(partial, __about__=np.array(files.as_json(about)), **leaves)

  def load_state(self, spec: plan.RunSpec, name: str, step: int) -> engine.State:
    """The state `name` saved at `step`, for a run of the shapes of `spec`."""
    path = self._state_path(name, step)
    if not path.exists():
      raise records.PlanError(
        f"{path}: found no such state, expected one: add {step} to its save_steps"
      )
    with np.load(path) as file:
      return records.restore(path, self.program(spec).state_shapes, file)

  def params(
    self, spec: plan.RunSpec, step: int | None = None
  ) -> tuple[config.ModelConfig, types.Params]:
    """(config, parameters) of a saved step (None: the last), as `models` and `ckpt` take them."""
    state = self.load_state(spec, spec.name, spec.num_steps if step is None else step)
    return knobs_lib.trained_form(spec.model, state.params)

  # --- Programs ----------------------------------------------------------------------------------

  def program(self, spec: plan.RunSpec) -> engine.Program:
    key = engine.key_of(spec)
    if key not in self._programs:
      self._programs[key] = engine.Program(key, self.batching)
    return self._programs[key]

  def score(
    self, specs: Sequence[plan.RunSpec], rows: corpus_lib.Rows, *, step: int | None = None
  ) -> np.ndarray:
    """Nats of every row under the saved states (None: the last step) of runs, [R, E]."""
    found = []
    for spec in specs:
      state = self.load_state(spec, spec.name, spec.num_steps if step is None else step)
      knobs = engine.stack([knobs_lib.knobs_of(spec.model, spec.optim)])
      params = engine.stack([state.params])
      found.append(np.asarray(self.program(spec).row_nats(params, knobs, rows.ids, rows.mask))[0])
    return np.stack(found)

  # --- Plans -------------------------------------------------------------------------------------

  def run(self, specs: Iterable[plan.RunSpec]) -> dict[str, records.Result]:
    """Results of all runs by name; runs what has no result yet."""
    specs = list(specs)
    waves, results = records.waves(specs), {}
    for wave in waves:
      missing: list[plan.RunSpec] = []
      for spec in wave:
        result = self.result(spec)
        states = [self._state_path(spec.name, step) for step in spec.save_steps]
        if result is None or not all(path.exists() for path in states):
          missing.append(spec)
        else:
          results[spec.name] = result
      for lanes in self._groups(missing):
        results |= self._run_lanes(lanes)
    return {spec.name: results[spec.name] for spec in specs}

  def _groups(self, specs: list[plan.RunSpec]) -> list[list[list[plan.RunSpec]]]:
    """Lists of lanes; the lanes of a list share a program."""
    by_key: dict[Any, list[plan.RunSpec]] = {}
    for spec in specs:
      key = engine.key_of(spec)
      span = (spec.first_step, spec.num_steps) if self.batching == "vmap" else None
      by_key.setdefault((key, span), []).append(spec)
    size = self.lane_size
    return [[group[i : i + size] for i in range(0, len(group), size)] for group in by_key.values()]

  def _run_lanes(self, lanes: list[list[plan.RunSpec]]) -> dict[str, records.Result]:
    """As many lanes at a time as there are devices, a chunk each in turn."""
    waiting, results = list(lanes), {}
    active: dict[Any, _Lane] = {}
    while waiting or active:
      for device in self._devices:
        if device not in active and waiting:
          active[device] = _Lane(self, waiting.pop(0), device)
      wall, cpu = time.perf_counter(), time.process_time()
      begun = [lane for lane in active.values() if not lane.is_done]  # done: only its JSON lacks
      for lane in begun:
        lane.dispatch()
      for lane in begun:
        lane.settle()
      spent = (time.perf_counter() - wall, time.process_time() - cpu)
      share = sum(len(lane.specs) for lane in active.values())
      for device, lane in list(active.items()):
        for result in lane.results:
          result.seconds += spent[0] / share
          result.cpu_seconds += spent[1] / share
        if lane.is_done:
          results |= lane.finish()
          del active[device]
    return results


class _Lane:
  """Runs that advance together on one device."""

  def __init__(self, runner: Runner, specs: list[plan.RunSpec], device: Any):
    self.runner, self.specs, self.device = runner, specs, device
    self.program = runner.program(specs[0])
    began = [self._begin(spec) for spec in specs]
    if len({int(state.step) for state, _ in began}) > 1:  # cut off at different places
      began = [self._begin(spec, is_fresh=True) for spec in specs]
    self.results = [result for _, result in began]
    self.step = int(began[0][0].step)
    self.num_steps = specs[0].num_steps
    self.knobs = engine.stack([knobs_lib.knobs_of(s.model, s.optim) for s in specs])
    self.schedules = engine.stack(
      [schedules.schedule_arrays(s.optim.schedule, s.optim.peak_lr) for s in specs]
    )
    self.state = jax.device_put(engine.stack([state for state, _ in began]), device)
    self.pending: tuple[int, Any] | None = None
    self._compile()

  @property
  def is_done(self) -> bool:
    """At the end, or diverged with every state saved that a branch may ask for."""
    last = max(step for spec in self.specs for step in (0, *spec.save_steps))
    is_hopeless = all(r.diverged_at is not None for r in self.results) and self.step >= last
    return self.step >= self.num_steps or is_hopeless

  def _begin(
    self, spec: plan.RunSpec, *, is_fresh: bool = False
  ) -> tuple[engine.State, records.Result]:
    runner = self.runner
    for step in () if is_fresh else sorted(spec.save_steps, reverse=True):
      path = runner._state_path(spec.name, step)
      if path.exists() and runner._result_path(spec.name).exists() is False:
        with np.load(path) as file:
          about = json.loads(str(file["__about__"]))
        records.check_spec(path, about["spec"], spec)
        result = records.result_of(about["result"])
        result.is_resumed = True
        return runner.load_state(spec, spec.name, step), result
    if spec.branch_from is not None:
      return runner.load_state(spec, *spec.branch_from), records.Result(spec.name)
    return self.program.init(spec), records.Result(spec.name)

  def _compile(self) -> None:
    began = time.perf_counter()
    self._call(np.zeros((len(self.specs), self.runner.chunk_steps, self._rows), np.int32), 0)
    for rows in self.runner.rows.values():
      self.program.row_nats(self.state.params, self.knobs, rows.ids, rows.mask)
    self.runner.compile_seconds += time.perf_counter() - began

  @property
  def _rows(self) -> int:
    return self.specs[0].batch_size

  def _call(self, starts_RCB: np.ndarray, count: int) -> Any:
    tokens = self.runner._tokens[self.device]
    args = (starts_RCB, self.knobs, self.schedules, np.int32(count))
    self.state, losses_RC = self.program.advance(tokens, self.state, *args)
    return losses_RC

  def dispatch(self) -> None:
    """Starts the steps to the next event, at most a chunk."""
    events = {self.num_steps, *(e for s in self.specs for e in (*s.eval_steps, *s.save_steps))}
    next_event = min(e for e in events if e > self.step)
    count = min(self.runner.chunk_steps, next_event - self.step)
    starts = np.zeros((len(self.specs), self.runner.chunk_steps, self._rows), np.int32)
    for r, spec in enumerate(self.specs):
      for i in range(count):
        step = self.step + i
        starts[r, i] = self.runner.corpus.starts(
          spec.weights_at(step),
          seed=spec.data_seed,
          step=step,
          rows=self._rows,
          seq_len=spec.seq_len,
        )
    self.pending = (count, self._call(starts, count))

  def settle(self) -> None:
    """Fetches the losses, evaluates and saves where a run asks for it at this step."""
    assert self.pending is not None
    count, losses_RC = self.pending
    losses_RC = np.asarray(losses_RC)[:, :count]
    self.step += count
    for result, losses in zip(self.results, losses_RC, strict=True):
      result.steps_run += count
      result.train.append((self.step, float(np.mean(losses))))
      if result.diverged_at is None and not np.all(np.isfinite(losses)):
        result.diverged_at = self.step
    is_last = self.is_done
    for r, (spec, result) in enumerate(zip(self.specs, self.results, strict=True)):
      if is_last or self.step in spec.eval_steps:
        self._evaluate(r, spec, result)
      if self.step in spec.save_steps:
        state = jax.device_get(engine.unstack(self.state, r))
        self.runner.save_state(spec, state, result)

  def _evaluate(self, r: int, spec: plan.RunSpec, result: records.Result) -> None:
    params = jax.tree.map(lambda x: x[r : r + 1], self.state.params)
    knobs = jax.tree.map(lambda x: x[r : r + 1], self.knobs)
    for name, rows in self.runner.rows.items():
      nats = np.asarray(self.program.row_nats(params, knobs, rows.ids, rows.mask), np.float64)
      loss = float(nats.sum() / rows.mask.sum())
      is_bad = result.diverged_at is not None or not math.isfinite(loss)
      at = spec.num_steps if result.diverged_at is not None else self.step
      result.losses.setdefault(name, {})[at] = math.inf if is_bad else loss

  def finish(self) -> dict[str, records.Result]:
    for spec, result in zip(self.specs, self.results, strict=True):
      about = {
        "spec": records.spec_data(spec),
        "result": dataclasses.asdict(result),
        "tokens": spec.tokens,
        "non_embedding_params": plan.num_params(spec.model),
        "device": self.device.device_kind,
        "jax": jax.__version__,
      }
      files.write_json(self.runner._result_path(spec.name), about)
      losses = ", ".join(f"{name} {result.loss(name):.4f}" for name in result.losses)
      self.runner.log(f"{spec.name}: {losses} ({result.cpu_seconds:.1f} s CPU)")
    return {result.name: result for result in self.results}


def queue(
  configs: Sequence[config.TrainConfig], workdir: str | os.PathLike[str], *, tok: Any = None
) -> dict[str, dict[str, Any]]:
  """Runs `train.loop` on every config in WORKDIR/NAME; finished ones are read, cut ones resumed.

  For models that share no program or do not fit beside each other. One JSON a run, as `Runner`.
  """
  names = [cfg.name for cfg in configs]
  if len(set(names)) != len(names):
    raise records.PlanError(f"configs: found names {names}, expected each once")
  found = {}
  for cfg in configs:
    began = time.perf_counter()
    path = pathlib.Path(workdir) / "runs" / f"{cfg.name}.json"
    text = config.as_python(cfg)
    if path.exists():
      data = json.loads(path.read_text())
      records.check_same(path, {"config": data["config"]}, {"config": text})
    else:
      done = loop.train(cfg, pathlib.Path(workdir) / cfg.name, tok=tok)
      if done.is_stopped:
        raise records.PlanError(
          f"{cfg.name}: stopped at step {done.step} by SIGTERM; start again to go on"
        )
      seconds = time.perf_counter() - began
      data = {"config": text, "step": done.step, "values": done.values, "seconds": seconds}
      files.write_json(path, data)
    found[cfg.name] = data
  return found
