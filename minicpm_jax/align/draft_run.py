"""One run that trains a draft for a frozen target: resumable, sharded, with acceptance curves.

A workdir holds config.py, checkpoints/ (the draft and its optimiser; the target is read anew),
metrics.jsonl, vocab_ids.npy (the reduced vocabulary of EAGLE-3's head or of the loss),
feature_exponent.json (`align.draft_scale`), features/ (`align.draft_features`, with stored_rows),
and what `align.draft_export` writes at the end. Starting it again goes on from the newest
checkpoint.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import ckpt, config
from minicpm_jax.align import bita as bita_loss
from minicpm_jax.align import draft as draft_loss
from minicpm_jax.align import draft_export, draft_features, draft_scale
from minicpm_jax.ckpt import bita_io, draft_io, orbax_io, run_config
from minicpm_jax.core import files, rng, types
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.data import iterator, packing, sources
from minicpm_jax.infer import frspec
from minicpm_jax.models import bita as bita_lib
from minicpm_jax.models import convert, transformer
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import start, stop, window
from minicpm_jax.train import step as step_lib

Target = tuple[transformer.Transformer, types.Params, Any]
MAY_CHANGE = ("name", "num_steps", "log_every", "eval_", "checkpoint", "mesh", "grad_accum")
VOCAB_DOCUMENTS = 20_000  # of every source, counted for a reduced vocabulary


def load_target(path: str) -> Target:
  """(model, params, tokenizer) of an HF folder, a run folder[@step] or a GGUF file."""
  folder, _ = run_config.split_step(path)
  if path.endswith(".gguf"):
    return ckpt.load_gguf(path)
  if (folder / run_config.FILE_NAME).is_file():
    return ckpt.load_run(path)
  if (pathlib.Path(path) / "config.json").is_file():
    dtype = "f32" if jax.default_backend() == "cpu" else None
    return ckpt.load_hf(path, dtype=dtype)
  raise ValueError(
    f"target: found {path!r}, expected a run folder (config.py), a Hugging Face folder "
    "(config.json) or a .gguf file"
  )


def train(
  cfg: config.DistillConfig, workdir: str | os.PathLike[str], *, target: Target | None = None
) -> draft_lib.Draft | bita_lib.Bita:
  """Trains to `cfg.num_steps` or goes on from where the workdir stands; returns the draft.

  target: what `cfg.target` names, where the caller has it in memory already.
  """
  with contextlib.ExitStack() as stack:
    return _Run(cfg, pathlib.Path(workdir), target, stack).train()


def draft_vocab(cfg: config.DistillConfig) -> np.ndarray | None:
  """Sorted ids of the most frequent trained tokens, or None where head and loss have all."""
  size = _vocab_size(cfg)
  if size is None:
    return None
  counts_V = np.zeros(cfg.draft.layer.vocab_size, np.int64)
  for entry in cfg.data.sources:
    if entry.name not in cfg.eval_sources:
      source = sources.open_source(entry.name, entry.path)
      read = (packing.split_mask(source[i]) for i in range(min(len(source), VOCAB_DOCUMENTS)))
      documents = (ids[is_trained] for ids, is_trained in read)
      counts_V += frspec.count_tokens(documents, counts_V.size)
  return np.sort(frspec.build_index(counts_V, size, cfg.draft.layer.stop_ids))


def _vocab_size(cfg: config.DistillConfig) -> int | None:
  return None if cfg.draft.kind == "bita" else cfg.draft.draft_vocab_size or cfg.loss_vocab_size


class _Run:
  """The pieces of one run and the state that steps replace."""

  def __init__(
    self,
    cfg: config.DistillConfig,
    workdir: pathlib.Path,
    target: Target | None,
    stack: contextlib.ExitStack,
  ):
    self.cfg, self.workdir = cfg, workdir
    _check_workdir(cfg, workdir)
    self.is_bita = cfg.draft.kind == "bita"
    draft_model, objective = (bita_lib, bita_loss) if self.is_bita else (draft_lib, draft_loss)

    # --- Mesh and target -------------------------------------------------------------------------
    self.mesh = mesh_lib.make_mesh(cfg.mesh)
    rows = dict(batch_size=cfg.data.batch_size, seq_len=cfg.data.seq_len)
    mesh_lib.check_batch(self.mesh, **rows, grad_accum=cfg.grad_accum)
    stack.enter_context(jax.set_mesh(self.mesh))
    self.model, params, _ = load_target(cfg.target) if target is None else target
    draft_model.check_fits(cfg.draft, self.model.cfg)
    self.ids = self._vocab_ids()
    self.batches = stack.enter_context(contextlib.closing(_open_data(cfg, self.mesh)))
    self.stored: dict[str, draft_features.Rows] = {}
    if cfg.stored_rows:
      self._store_features(params)

    # --- State -----------------------------------------------------------------------------------
    shapes, specs = draft_model.abstract_params(cfg.draft)
    target_shapes, target_specs = transformer.abstract_params(self.model)
    if cfg.stored_rows:
      target_shapes, target_specs = map(draft_features.head_params, (target_shapes, target_specs))
    both = {"draft": shapes, "target": target_shapes}
    places = mesh_lib.tree_shardings(self.mesh, {"draft": specs, "target": target_specs}, both)
    optimizer = objective.make_optimizer(cfg, both)
    self.abstract = _abstract_state(optimizer, both, places, self.mesh)
    self.store = stack.enter_context(orbax_io.CheckpointStore(workdir, cfg.checkpoint))
    self.trained = self._trained_config(params)
    self.state, self.step, self.tokens = self._begin(optimizer, params)

    # --- Step functions --------------------------------------------------------------------------
    loss_fn = objective.make_loss_fn(self.trained, self.model, self.ids)
    step_fn = step_lib.make_train_step(
      loss_fn, objective.make_totals_fn(cfg), optimizer, grad_accum=cfg.grad_accum
    )
    self.train_step = step_lib.jit_train_step(step_fn, self.abstract, self.mesh)
    acceptance = objective.make_acceptance_fn(self.trained, self.model, self.ids)
    self.eval_step = step_lib.jit_eval_step(acceptance, self.abstract, self.mesh)
    self.schedule = schedules.schedule_arrays(cfg.optim.schedule, cfg.optim.peak_lr)

    # --- Logging ---------------------------------------------------------------------------------
    if mesh_lib.is_main_process():
      run_config.write(workdir, cfg, header=f"A draft. revision: {start.git_revision()}")
    resume = self.step if self.step else -1
    self.writer = stack.enter_context(logging_lib.MetricWriter(workdir, resume_step=resume))
    self.bar = stack.enter_context(logging_lib.progress(cfg.num_steps, start=self.step))
    self.stop = stack.enter_context(stop.StopOnSignal(self.store))

  def train(self) -> draft_lib.Draft | bita_lib.Bita:
    cfg, pending, sums, last_loss = self.cfg, None, {}, None
    if self.step == 0:
      self._evaluate()
    began = time.monotonic()
    while self.step < cfg.num_steps:
      batch = draft_loss.with_row_seeds(next(self.batches), self.step)
      batch = mesh_lib.shard_batch(self.mesh, batch)
      self.state, *fetched = self.train_step(self.state, batch, self.schedule)
      self.step += 1
      is_stopped = self.stop.is_requested(self.step)
      is_last = is_stopped or self.step == cfg.num_steps
      is_due = is_last or self.step % cfg.log_every == 0 or self.store.is_due(self.step)
      # Metrics of the step before, while this one runs; of this one too where a line is due.
      waiting = [x for x in (pending, (self.step, *fetched) if is_due else None) if x is not None]
      pending = None if is_due else (self.step, *fetched)
      for step, metrics, leaf_norms in jax.device_get(waiting):
        window.check_finite(
          int(step), metrics, leaf_norms, last_loss=last_loss, last_good=self._last_good
        )
        last_loss = float(metrics["loss"].mean)
        self.tokens += int(metrics["tokens"].sum)
        sums = metrics_lib.add(sums, metrics)
      if is_last or self.step % cfg.log_every == 0:
        values = metrics_lib.means({k: v for k, v in sums.items() if k != "tokens"})
        values["seconds"] = time.monotonic() - began
        sums, began = {}, time.monotonic()
        self.writer.write(self.step, values)
        shown = ("loss", "acc_1", "acc_2", "acc_3", "learning_rate", "seconds")
        self.bar.update(self.step, {k: values[k] for k in shown if k in values})
      if is_last or self.store.is_due(self.step):
        self._save()
      if not is_stopped and (is_last or self.step % cfg.eval_every == 0):
        self._evaluate()
      if is_stopped:
        self.store.wait()
        raise stop.Stopped(
          f"{self.stop.reason}: saved step {self.step} of {cfg.num_steps}, no draft written; "
          "starting again goes on"
        )
    self.store.wait()
    draft = self._export()
    if self.stop.has_come:  # while the last step was saved or evaluated
      raise stop.Stopped(f"{self.stop.reason}: step {self.step} was the last, the draft is written")
    return draft

  # --- Start -------------------------------------------------------------------------------------

  def _vocab_ids(self) -> np.ndarray | None:
    path = self.workdir / "vocab_ids.npy"
    if _vocab_size(self.cfg) is None:
      return None
    if not path.exists():
      if self.cfg.init_from is not None and self.cfg.draft.kind == "eagle3":
        ids = draft_io.load_draft(self.cfg.init_from, self.model.cfg).ids
      else:
        ids = draft_vocab(self.cfg)
      if ids is None or not mesh_lib.is_main_process():
        return ids
      with files.replacing(path) as partial:
        np.save(partial, ids)
    return np.load(path)

  def _store_features(self, params: types.Params) -> None:
    """Runs the target over the training and held-out rows, where this is not done yet."""
    cfg, (index, count) = self.cfg, mesh_lib.data_process(self.mesh)
    folder = self.workdir / "features" / f"process{index}of{count}"
    size = cfg.data.batch_size // count
    write = functools.partial(draft_features.write, cfg=cfg, model=self.model, params=params)
    rows = write(folder / "train", self.batches, cfg.stored_rows // count)
    for name in cfg.eval_sources:
      own = folder / f"eval-{name}-{cfg.eval_batches or 'all'}"  # the number may change
      self.stored[name] = write(own, self._eval_batches(name), None)
    self.batches.close()
    self.batches = draft_features.Epochs(rows, size, cfg.seed)

  def _trained_config(self, params: types.Params) -> config.DistillConfig:
    """The config whose draft is in the state: EAGLE-3 has its features at unit size there."""
    cfg, path = self.cfg, self.workdir / "feature_exponent.json"
    if cfg.draft.kind != "eagle3" or not cfg.unit_features:
      return cfg
    if path.exists():
      k = json.loads(path.read_text())["exponent"]
    elif self.store.latest_step() is not None:  # of a run before there was such a file
      k = 0
    else:
      size = cfg.data.batch_size
      with contextlib.closing(
        iterator.make_iterator(cfg.data, batch_size_per_host=size, process_count=1)
      ) as batches:
        k = draft_scale.exponent(cfg.draft, self.model, params, next(batches))
      if mesh_lib.is_main_process():
        files.write_json(path, {"exponent": k})
    return dataclasses.replace(cfg, draft=draft_scale.scaled(cfg.draft, k))

  def _begin(self, optimizer: Any, target_params: types.Params) -> Any:
    """(state, step, tokens seen): own checkpoint, a given draft, the MTP module, random."""
    cfg, places = self.cfg, step_lib.shardings_of(self.abstract)
    target_params = jax.device_get(target_params)  # may lie on one device of the mesh
    # Copies: the state is donated, what the caller holds must live on.
    put = lambda x, place: jax.device_put(np.array(x), place)  # noqa: E731
    held = draft_features.head_params(target_params) if cfg.stored_rows else target_params
    target = jax.tree.map(put, held, places.params["target"])
    newest = self.store.latest_step()
    if newest is not None:
      state = step_lib.TrainState(
        step=jax.device_put(jnp.int32(newest), self.abstract.step.sharding),
        params={
          "draft": self.store.params(newest, self.abstract.params["draft"]),
          "target": target,
        },
        opt_state=self.store.opt_state(newest, self.abstract.opt_state),
      )
      self.batches.set_state(self.store.data(newest))
      return state, newest, int(self.store.meta(newest)["tokens"])
    if cfg.init_from is not None:
      load = bita_io.load_bita if self.is_bita else draft_io.load_draft
      loaded = load(cfg.init_from, self.model.cfg)
      if not self.is_bita and loaded.cfg.layer.quant is not None:
        raise ValueError(f"init_from: {cfg.init_from}: found quantised weights, expected floats")
      draft = loaded.params
      if cfg.draft.kind == "eagle3":
        new = self.trained.draft.feature_scale
        draft = draft_scale.moved(draft, loaded.cfg.feature_scale, new)
    elif self.is_bita:
      draft = bita_lib.init_params(cfg.draft, self.model.cfg, rng.key(cfg.seed, "draft_init"))
    elif cfg.from_mtp:
      _, draft = convert.mtp_to_eagle(self.model.cfg, target_params)
    else:
      draft = draft_lib.init_params(cfg.draft, rng.key(cfg.seed, "draft_init"))
      if cfg.draft.kind == "eagle3" and cfg.head_from_target:
        draft |= _head_of(self.model.cfg, target_params, self.ids)
    params = {
      "draft": jax.tree.map(
        lambda x, like, place: put(np.asarray(x, like.dtype), place),
        draft,
        self.abstract.params["draft"],
        places.params["draft"],
      ),
      "target": target,
    }
    return step_lib.fresh_state(optimizer, params, self.abstract), 0, 0

  # --- Checkpoints, acceptance -------------------------------------------------------------------

  def _last_good(self) -> str:
    step = self.store.latest_step()
    return "there is no earlier checkpoint" if step is None else f"the last checkpoint is {step}"

  def _save(self) -> None:
    self.store.save(
      self.step,
      params=self.state.params["draft"],
      opt_state=self.state.opt_state,
      data=self.batches.get_state(),
      meta={"tokens": self.tokens, "config_hash": orbax_io.config_hash(self.cfg)},
    )

  def _eval_batches(self, name: str) -> Any:
    """This host's rows of the held-out source."""
    index, count = mesh_lib.data_process(self.mesh)
    rows = self.cfg.data.batch_size // count
    for batch in iterator.make_eval_iterator(self.cfg.data, name, self.cfg.eval_batches or None):
      yield {key: x[index * rows : (index + 1) * rows] for key, x in batch.items()}

  def _evaluate(self) -> None:
    _, count = mesh_lib.data_process(self.mesh)
    for name in self.cfg.eval_sources:
      total: dict[str, metrics_lib.Metric] = {}
      rows = self.cfg.data.batch_size // count
      stored = self.stored.get(name)
      for batch in self._eval_batches(name) if stored is None else stored.in_order(rows):
        sharded = mesh_lib.shard_batch(self.mesh, batch)
        total = metrics_lib.add(total, self.eval_step(self.state.params, sharded))
      means = metrics_lib.means(total)
      self.writer.write(self.step, {f"eval/{name}/{key}": x for key, x in means.items()})
      spelled = ", ".join(f"{key} {x:.3f}" for key, x in means.items())
      self.bar.message(f"step {self.step}: {name}: {spelled}")

  def _export(self) -> draft_lib.Draft | bita_lib.Bita:
    params = jax.device_get(self.state.params["draft"])
    if self.is_bita:
      draft = bita_lib.Bita(self.cfg.draft, params)
    else:
      # The head of the other kinds is the target's.
      ids = self.ids if self.cfg.draft.kind == "eagle3" else None
      if self.cfg.draft.kind == "eagle3":
        scales = (self.trained.draft.feature_scale, self.cfg.draft.feature_scale)
        params = draft_scale.moved(params, *scales)
      draft = draft_lib.Draft(self.cfg.draft, params, ids)
    if mesh_lib.is_main_process():
      draft_export.write(self.workdir, draft, self.model.cfg)
      draft_export.write_curves(self.workdir, self.cfg)
    return draft


def _head_of(
  cfg: config.ModelConfig, params: types.Params, ids_R: np.ndarray | None
) -> types.Params:
  """The target's final norm and its head's rows of the draft's vocabulary, as EAGLE-3's own."""
  head_DV = transformer.head_weight(cfg, params)[:, : cfg.vocab_size] / cfg.logit_divisor
  head_DR = head_DV if ids_R is None else head_DV[:, ids_R]
  return {"norm": {"scale": params["final_norm"]["scale"]}, "lm_head": {"kernel": head_DR}}


def _check_workdir(cfg: config.DistillConfig, workdir: pathlib.Path) -> None:
  if not (workdir / run_config.FILE_NAME).exists():
    return
  found = run_config.differences(run_config.read(workdir, config.DistillConfig), cfg)
  wrong = {k: v for k, v in found.items() if not k.startswith(MAY_CHANGE)}
  if wrong:
    lines = [f"  {name}: found {a!r}, expected {b!r}" for name, (a, b) in wrong.items()]
    raise start.WorkdirError(
      f"{workdir}: found a run of another config; use another workdir or that run's values:\n"
      + "\n".join(lines)
    )


def _open_data(cfg: config.DistillConfig, mesh: jax.sharding.Mesh) -> iterator.BatchIterator:
  index, count = mesh_lib.data_process(mesh)
  rows = cfg.data.batch_size // count
  batches = iterator.make_iterator(
    cfg.data, batch_size_per_host=rows, process_index=index, process_count=count
  )
  vocab = cfg.draft.vocab_size if cfg.draft.kind == "bita" else cfg.draft.layer.vocab_size
  if (batches.vocab_size or 0) > vocab:
    raise ValueError(f"data: found a vocabulary of {batches.vocab_size}, expected at most {vocab}")
  return batches


def _abstract_state(
  optimizer: Any, shapes: Any, places: Any, mesh: jax.sharding.Mesh
) -> step_lib.TrainState:
  whole = mesh_lib.replicated(mesh)
  opt_places = build.state_shardings(optimizer, shapes, places, whole)
  state = step_lib.TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer.init, shapes)
  )
  all_places = step_lib.TrainState(whole, places, opt_places)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, all_places
  )
