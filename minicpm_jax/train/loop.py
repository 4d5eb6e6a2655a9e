"""The training loop: one device, many devices, many processes.

It prints what it is about to do, in the order of the banners below. Step n is dispatched before
the metrics of step n - 1 are fetched, so the accelerator does not wait for the log; where a
checkpoint or an evaluation is due the metrics of n itself are fetched first, so that nothing of a
non-finite step is ever saved. Other methods write another loss function or fork the entry script.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax

from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.core import compilation_cache, trees
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.quant import tree
from minicpm_jax.train import evaluate, start, stop, window
from minicpm_jax.train import step as step_lib


@dataclasses.dataclass
class TrainResult:
  """What `train` leaves behind: the state on the devices and the last logged values."""

  state: step_lib.TrainState
  step: int
  values: dict[str, float]
  is_stopped: bool  # SIGTERM came, maybe behind the last step; the state is saved


def train(
  cfg: config.TrainConfig, workdir: str | os.PathLike[str], *, tok: Any = None
) -> TrainResult:
  """Trains `cfg` in `workdir` to `cfg.num_steps`, or goes on from where the workdir stands.

  The tokenizer `tok` (default: that of the run or folder it starts from) goes to
  `workdir/tokenizer`, where `load_run` finds it. Starting again is how a run is resumed, extended
  (larger num_steps) or moved to another mesh.
  Raises window.NonFiniteError with a diagnosis when a loss or gradient is not finite, and
  stop.Stopped (a KeyboardInterrupt) when Ctrl-C has stopped it; the state is saved.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(compilation_cache.use(cfg.compilation_cache))
    run = _Run(cfg, pathlib.Path(workdir), tok, stack)
    return run.train()


def train_to_end(
  cfg: config.TrainConfig, workdir: str | os.PathLike[str], *, tok: Any = None
) -> TrainResult:
  """`train` for callers that go on with its result: stop.Stopped where SIGTERM came before."""
  result = train(cfg, workdir, tok=tok)
  if result.is_stopped:
    raise stop.Stopped(
      f"{workdir}: stopped at step {result.step} of {cfg.num_steps}; starting again goes on"
    )
  return result


class _Run:
  """The pieces of one run and the state that steps replace."""

  def __init__(
    self, cfg: config.TrainConfig, workdir: pathlib.Path, tok: Any, stack: contextlib.ExitStack
  ):
    self.cfg, self.workdir = cfg, workdir

    # --- Mesh ------------------------------------------------------------------------------------
    self.mesh = mesh_lib.make_mesh(cfg.mesh)
    mesh_lib.check_batch(
      self.mesh,
      batch_size=cfg.data.batch_size,
      seq_len=cfg.data.seq_len,
      grad_accum=cfg.grad_accum,
    )
    stack.enter_context(jax.set_mesh(self.mesh))

    # --- Model, optimiser, compiled steps --------------------------------------------------------
    model = transformer.Transformer(cfg.model)
    optimizer = build.make_optimizer(cfg.optim, cfg.model, transformer.abstract_params(model)[0])
    self.abstract = step_lib.abstract_state(model, optimizer, self.mesh)
    train_step = step_lib.make_train_step(
      step_lib.make_loss_fn(
        model,
        z_loss=cfg.z_loss,
        sources=[s.name for s in cfg.data.sources] if cfg.source_losses else (),
      ),
      step_lib.make_totals_fn(model),
      optimizer,
      grad_accum=cfg.grad_accum,
      weights=step_lib.quantized_weights(cfg.model),
    )
    self.train_step = step_lib.jit_train_step(train_step, self.abstract, self.mesh)
    eval_step = step_lib.make_eval_step(model)
    self.eval_step = step_lib.jit_eval_step(eval_step, self.abstract, self.mesh)
    self.schedule = schedules.schedule_arrays(cfg.optim.schedule, cfg.optim.peak_lr)

    # --- Workdir, input, start -------------------------------------------------------------------
    changes = start.check_workdir(workdir, cfg)
    start.check_tokenizer(tok, cfg)
    self.batches = start.open_data(cfg, self.mesh)
    stack.callback(self.batches.close)
    start.check_tokenizer(tok, cfg, self.batches.sources)
    self.store = stack.enter_context(orbax_io.CheckpointStore(workdir, cfg.checkpoint))
    begun = start.begin(cfg, model, optimizer, self.abstract, self.mesh, self.store)
    self.state, self.step, self.tokens = begun.state, begun.step, begun.tokens
    data_line = start.seek_data(self.batches, begun)
    start.write_workdir(workdir, cfg, self.mesh, tok or begun.tokenizer)

    # --- Logging ---------------------------------------------------------------------------------
    self.writer = stack.enter_context(
      logging_lib.MetricWriter(workdir, resume_step=self.step if self.step else -1)
    )
    self.bar = stack.enter_context(logging_lib.progress(cfg.num_steps, start=self.step))
    self.stop = stack.enter_context(stop.StopOnSignal(self.store))
    device_kind = self.mesh.devices.flat[0].device_kind
    self.window = window.Window(cfg, num_devices=self.mesh.size, device_kind=device_kind)
    self.pending: tuple[int, Any, Any] | None = None
    self.last_loss: float | None = None
    self.values: dict[str, float] = {}
    self.revision = start.git_revision()
    self.compiled = False
    self.is_tracing = False
    for line in self._plan(begun, data_line, changes):
      self.bar.message(line)

  # --- The loop ----------------------------------------------------------------------------------

  def train(self) -> TrainResult:
    cfg, first, is_stopped = self.cfg, self.step, False
    phase = None
    while self.step < cfg.num_steps and not is_stopped:
      self._profile(self.step)
      batch = mesh_lib.shard_batch(self.mesh, next(self.batches))
      if self.batches.phase_name != phase:
        phase = self.batches.phase_name
        self.bar.message(f"data phase {phase!r} from step {self.step + 1}")
      self.state, metrics, leaf_norms = self.train_step(self.state, batch, self.schedule)
      self.step += 1
      self._settle()
      self.pending = (self.step, metrics, leaf_norms)
      is_stopped = self.stop.is_requested(self.step)
      is_last = is_stopped or self.step == cfg.num_steps
      if is_last or self.store.is_due(self.step):
        self._save()
      is_eval_due = cfg.eval_every > 0 and self.step % cfg.eval_every == 0
      if cfg.eval_sources and not is_stopped and (is_last or is_eval_due):
        self._evaluate()
    self._profile(None)
    if self.step == first:
      self._nothing_to_do()
    self.store.wait()
    is_stopped = is_stopped or self.stop.has_come  # while the last step was saved or evaluated
    if is_stopped:
      saved = f"{self.stop.reason}: saved step {self.step} in {self.store.directory}, leaving"
      self.bar.message(saved)
      if self.stop.is_interrupted:
        raise stop.Stopped(f"stopped at step {self.step}; starting again goes on from there")
    return TrainResult(self.state, self.step, self.values, is_stopped)

  def _nothing_to_do(self) -> None:
    """Takes the last values from the log; evaluates where an earlier start was cut off before."""
    self.bar.message(f"nothing to do: step {self.step} of {self.cfg.num_steps}")
    for row in logging_lib.read_metrics(self.workdir):
      if row["step"] == self.step:
        self.values |= {name: value for name, value in row.items() if name != "step"}
    if any(f"eval/{name}/loss" not in self.values for name in self.cfg.eval_sources):
      self._evaluate()

  def _settle(self) -> None:
    """Fetches the metrics of the last dispatched step, checks them, logs where a line is due."""
    if self.pending is None:
      return
    step, metrics, leaf_norms = self.pending
    self.pending = None
    metrics, leaf_norms = jax.device_get((metrics, leaf_norms))
    window.check_finite(
      step, metrics, leaf_norms, last_loss=self.last_loss, last_good=self._last_good
    )
    self.last_loss = float(metrics["loss"].sum) / max(float(metrics["loss"].weight), 1.0)
    self.tokens += int(metrics["tokens"].sum)
    self.window.add(metrics)
    if step % self.cfg.log_every == 0 or step == self.cfg.num_steps:
      values = self.window.flush() | {"tokens_seen": float(self.tokens)}
      self._log(step, values)
    else:
      self.bar.update(step)
    if not self.compiled:
      self.compiled = True
      self.window.restart_clock()

  def _last_good(self) -> str:
    step = self.store.latest_step()
    if step is None:
      return "there is no earlier checkpoint in this workdir"
    return f"the last good checkpoint is step {step} in {self.store.directory}"

  def _log(self, step: int, values: dict[str, float]) -> None:
    self.values |= values
    self.writer.write(step, values)
    shown = ("loss", "mtp_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
    self.bar.update(step, {name: values[name] for name in shown if name in values})

  # --- Checkpoints, evaluation, profile ----------------------------------------------------------

  def _save(self) -> None:
    self._settle()
    began = time.monotonic()
    self.store.save(
      self.step,
      params=self.state.params,
      opt_state=self.state.opt_state,
      data=self.batches.get_state(),
      meta={
        "tokens": self.tokens,
        "seed": self.cfg.seed,
        "config_hash": orbax_io.config_hash(self.cfg),
        "revision": self.revision,
        "jax": jax.__version__,
      },
    )
    self.window.exclude(time.monotonic() - began)

  def _evaluate(self) -> None:
    self._settle()
    began = time.monotonic()
    values = evaluate.evaluate(self.eval_step, self.state.params, self.cfg, self.mesh)
    self.values |= values
    self.writer.write(self.step, values)
    spelled = ", ".join(f"{name.removeprefix('eval/')} {v:.4f}" for name, v in values.items())
    self.bar.message(f"step {self.step}: held out: {spelled}")
    self.window.exclude(time.monotonic() - began)

  def _profile(self, step: int | None) -> None:
    """Starts and stops the trace of steps [first, last); None: the run is over."""
    if self.cfg.profile_steps is None:
      return
    first, last = self.cfg.profile_steps
    if step == first:
      self._settle()
      jax.profiler.start_trace(str(self.workdir / "profile"))
      self.is_tracing = True
    elif self.is_tracing and (step is None or step >= last):
      self._settle()
      jax.profiler.stop_trace()
      self.is_tracing = False
      self.bar.message(f"profile of steps {first}..{last - 1}: {self.workdir / 'profile'}")

  # --- What is about to happen -------------------------------------------------------------------

  def _plan(self, begun: start.Start, data_line: str, changes: list[str]) -> list[str]:
    cfg, mesh = self.cfg, self.mesh
    tokens = cfg.data.batch_size * cfg.data.seq_len
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    params = trees.num_params(self.abstract.params)
    tflops = metrics_lib.flops_per_token(cfg.model, cfg.data.seq_len) * tokens / 1e12
    kind = mesh.devices.flat[0].device_kind
    every = cfg.checkpoint.every_steps
    return [
      f"run {cfg.name!r} in {self.workdir}",
      f"mesh: {axes or 'one device'} ({kind}), {jax.process_count()} processes",
      f"model: {cfg.model.name}, {params:,} parameters, "
      f"{trees.nbytes((self.state.params, self.state.opt_state)) / 2**30:.3f} GiB of state",
      *self._quant_lines(),
      f"step: {cfg.data.batch_size} rows x {cfg.data.seq_len} tokens = {tokens:,} tokens in "
      f"{cfg.grad_accum} micro-batches, {tflops:.3g} TFLOP (6N + causal attention)",
      f"start: {begun.description}",
      data_line,
      *(f"changed since the last start: {change}" for change in changes),
      f"train to step {cfg.num_steps}, checkpoints "
      + (f"every {every} steps" if every else "at the end only"),
    ]

  def _quant_lines(self) -> list[str]:
    quant = self.cfg.model.quant
    if quant is None:
      return []
    paths = list(tree.selected(quant, self.abstract.params))
    return [
      f"quant: {quant.scheme}, group size {quant.group_size}, FP8 {quant.fp8 or 'off'}: "
      f"{tree.num_weights(quant, self.abstract.params):,} weights in {', '.join(paths)}"
    ]
