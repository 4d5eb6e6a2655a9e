"""Training checkpoints: `workdir/checkpoints/<step>` by Orbax (CheckpointManager, v0 API).

A checkpoint is one atomic Orbax composite of four items:
  params     the parameter tree
  optimizer  {"opt_state", "step"}; absent where only weights were imported
  data       position of the input iterator, one JSON file a process
  meta       step, tokens seen, seed, versions, the hash of the config
There is no random state to save: every key is a function of (seed, purpose, step), `core.rng`.
Step n means: n updates are in the parameters.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from minicpm_jax import config
from minicpm_jax.ckpt import errors, orbax_codes, run_config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees, types
from minicpm_jax.models import joined, transformer


def _is_damage(error: Exception) -> bool:
  """Is it what Orbax, tensorstore and json raise for files that are missing, cut or damaged?

  Orbax raises the bare class where tensorstore cannot read an array. Anything else (a bug, no
  memory) is not about the checkpoint and goes through.
  """
  return isinstance(error, OSError | ValueError | KeyError) or type(error) is Exception


class _ProcessJsonHandler(ocp.CheckpointHandler):
  """A JSON value for each process (grain's own handler wants a grain iterator)."""

  def _name(self) -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}.json"

  def save(self, directory: Any, args: "_ProcessJson") -> None:
    (directory / self._name()).write_text(json.dumps(args.item))

  def restore(self, directory: Any, args: "_ProcessJson | None" = None) -> Any:
    path = directory / self._name()
    if not path.exists():
      found = sorted(p.name for p in directory.glob("process_*"))
      raise errors.CheckpointError(
        f"{directory}: found the data position of other processes ({found}), expected "
        f"{path.name}: resume with the number of processes that saved it"
      )
    return json.loads(path.read_text())


@ocp.args.register_with_handler(_ProcessJsonHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ProcessJson(ocp.args.CheckpointArgs):
  item: Any = None


@dataclasses.dataclass
class _KeepRules:
  """Which checkpoints survive: newest `keep_last`, `keep_steps`, the first past each milestone."""

  cfg: config.CheckpointConfig
  tokens: dict[int, int]  # step -> tokens seen

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [int(info.step) for info in checkpoints]
    return [step in self.kept(steps) for step in steps]

  def kept(self, steps: Sequence[int]) -> set[int]:
    steps = sorted(steps)
    kept = set(steps[-self.cfg.keep_last :]) | (set(steps) & set(self.cfg.keep_steps))
    passed = 0
    for step in steps if self.cfg.keep_every_tokens else ():
      milestone = self.tokens.get(step, 0) // self.cfg.keep_every_tokens
      if milestone > passed:
        kept.add(step)
        passed = milestone
    return kept


class CheckpointStore:
  """The checkpoints of one workdir. Use as a context manager: leaving waits for the last save."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    cfg: config.CheckpointConfig | None = None,
    *,
    is_read_only: bool = False,
  ):
    self.directory = pathlib.Path(workdir).resolve() / "checkpoints"
    self.cfg = cfg or config.CheckpointConfig()
    if is_read_only and not self.directory.is_dir():
      raise errors.CheckpointError(
        f"{workdir}: found no checkpoints folder, expected a training run"
      )
    self._new = [p for p in (self.directory, self.directory.parent) if not p.exists()]
    self._rules = _KeepRules(self.cfg, {})
    options = ocp.CheckpointManagerOptions(
      read_only=is_read_only,
      create=not is_read_only,
      save_interval_steps=0 if is_read_only else 1,  # the loop decides, see is_due
      enable_async_checkpointing=self.cfg.is_async and not is_read_only,
      cleanup_tmp_directories=not is_read_only,
      preservation_policy=checkpoint_managers.AnyPreservationPolicy([self._rules]),
    )
    handlers = {
      "params": ocp.StandardCheckpointHandler(),
      "optimizer": ocp.StandardCheckpointHandler(),
      "data": _ProcessJsonHandler(),
      "meta": ocp.JsonCheckpointHandler(),
    }
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a read-only manager is read only
    try:
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise errors.CheckpointError(
        f"{self.directory}: the metadata of a step cannot be read, it is damaged: "
        f"{_first_line(error)}"
      ) from error
    finally:
      logging.set_verbosity(level)
    if not is_read_only and self.cfg.keep_every_tokens:
      for step in self.all_steps():
        self._rules.tokens[step] = self.meta(step)["tokens"]

  def __enter__(self) -> "CheckpointStore":
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self._manager.close()
    if mesh_lib.is_main_process():
      with contextlib.suppress(OSError):  # a run that failed before its first save leaves nothing
        for folder in self._new:
          folder.rmdir()

  def all_steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def is_due(self, step: int) -> bool:
    """True where the config asks for a checkpoint after update `step`."""
    every = self.cfg.every_steps
    return step in self.cfg.keep_steps or (every > 0 and step % every == 0)

  def reached_preemption(self, step: int) -> bool:
    """Under `jax.distributed`: true on all processes at one step after SIGTERM to any."""
    return self._manager.reached_preemption(step)

  def save(
    self,
    step: int,
    *,
    params: types.Params,
    opt_state: Any = None,
    data: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any],
  ) -> None:
    """Saves after update `step` (no-op if it is there already); returns before it is on disk."""
    if self.latest_step() == step:
      return
    self._rules.tokens[step] = int(meta["tokens"])
    items: dict[str, Any] = {
      "params": ocp.args.StandardSave(params),
      "meta": ocp.args.JsonSave({"step": step, **meta}),
    }
    if opt_state is not None:
      items["optimizer"] = ocp.args.StandardSave({"opt_state": opt_state})
    if data is not None:
      items["data"] = _ProcessJson(dict(data))
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def wait(self) -> None:
    """Returns when every save has reached the disk; raises what a background save raised."""
    self._manager.wait_until_finished()

  def meta(self, step: int) -> dict[str, Any]:
    return self._restore(step, "meta", ocp.args.JsonRestore())

  def data(self, step: int) -> dict[str, Any]:
    """The saved position of this process's input iterator."""
    return self._restore(step, "data", _ProcessJson())

  def params(self, step: int, target: types.Params) -> types.Params:
    """Parameters laid out as `target`: a tree of ShapeDtypeStruct with shardings, of any mesh.

    QTensors have the zero points and the act order of the checkpoint, which no config foresees.
    """
    self._check_step(step, "params")
    target = orbax_codes.as_stored(target, self._metadata(step, "params"))
    return self._arrays(step, "params", target)

  def opt_state(self, step: int, target: Any) -> Any:
    """Optimiser state laid out as `target`."""
    return self._arrays(step, "optimizer", {"opt_state": target})["opt_state"]

  def _check_step(self, step: int, item: str) -> None:
    self.wait()
    if step not in self.all_steps():
      raise errors.CheckpointError(
        f"{self.directory}: found steps {self.all_steps()}, expected {step}"
      )
    if not (self.directory / str(step) / item).is_dir():
      raise errors.CheckpointError(
        f"{self.directory / str(step)}: found no item {item!r}; a checkpoint of imported weights "
        "or a damaged one (use init_from for weights, or an earlier step)"
      )

  def _restore(self, step: int, item: str, args: Any) -> Any:
    self._check_step(step, item)
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:
      if isinstance(error, errors.CheckpointError) or not _is_damage(error):
        raise
      where = self.directory / str(step) / item
      raise errors.CheckpointError(
        f"{where}: cannot be read, the checkpoint is damaged: {error}"
      ) from error

  def _arrays(self, step: int, item: str, target: Any) -> Any:
    self._check_step(step, item)
    self._check_leaves(step, item, target)
    try:
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
      return self._manager.restore(step, args=args)[item]
    except Exception as error:
      if not _is_damage(error):
        raise
      leaf = self._first_damaged_leaf(step, item, target)
      raise errors.CheckpointError(
        f"{self.directory / str(step) / item}: leaf {leaf} cannot be read, the checkpoint is "
        f"truncated or damaged; delete this step or use an earlier one ({_first_line(error)})"
      ) from error

  def _metadata(self, step: int, item: str) -> dict[str, Any]:
    """Path -> shape and dtype of every stored array."""
    where = self.directory / str(step) / item
    try:
      metadata = self._manager.item_metadata(step)[item]
      if metadata is None:
        raise KeyError(f"no metadata of {item}")
      found = trees.flatten_paths(metadata.tree)
      for path, leaf in found.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
          raise KeyError(f"no array at {path}")
      return found
    except Exception as error:  # Orbax trusts what it reads: any kind
      raise errors.CheckpointError(
        f"{where}: found no readable metadata, expected a complete checkpoint "
        f"({_first_line(error)})"
      ) from error

  def _check_leaves(self, step: int, item: str, target: Any) -> None:
    """Orbax casts dtypes silently and names no leaf for shapes: compare with the metadata first."""
    where, stored = self.directory / str(step) / item, self._metadata(step, item)
    wanted = trees.flatten_paths(target)
    for path, leaf in wanted.items():
      if path not in stored:
        raise errors.CheckpointError(f"{where}: leaf {path}: found none, expected {_shape(leaf)}")
      if _shape(stored[path]) != _shape(leaf):
        found = _shape(stored[path])
        raise errors.CheckpointError(
          f"{where}: leaf {path}: found {found}, expected {_shape(leaf)}"
        )
    extra = sorted(set(stored) - set(wanted))
    if extra:
      found = _shape(stored[extra[0]])
      raise errors.CheckpointError(
        f"{where}: leaf {extra[0]}: found {found}, expected none ({len(extra)} unexpected leaves)"
      )

  def _first_damaged_leaf(self, step: int, item: str, target: Any) -> str:
    folder = self.directory / str(step) / item
    for path, leaf in trees.flatten_paths(target).items():
      one = {path: leaf}
      tree = trees.unflatten(one)
      args = ocp.args.PyTreeRestore(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
      )
      try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
          reader.restore(folder, args=args)
      except Exception as error:
        if not _is_damage(error):
          raise
        return path
    return "(every leaf alone can be read)"


def _shape(leaf: Any) -> str:
  return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def config_hash(cfg: Any) -> str:
  return hashlib.sha256(config.as_python(cfg).encode()).hexdigest()[:16]


def latest_step(workdir: str | os.PathLike[str]) -> int:
  """Newest step of a workdir, 0 if it has no checkpoint."""
  folder = pathlib.Path(workdir) / "checkpoints"
  return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def has_checkpoint(workdir: str | os.PathLike[str]) -> bool:
  """Whether a workdir has one of any step, 0 included."""
  return any(p.name.isdigit() for p in (pathlib.Path(workdir) / "checkpoints").glob("*"))


# --- Whole runs --------------------------------------------------------------------------------


def open_run(path: str | os.PathLike[str]) -> tuple[CheckpointStore, int, config.TrainConfig]:
  """(store, step, config) of 'workdir[@step]', read only."""
  workdir, step = run_config.split_step(path)
  cfg = run_config.read(workdir, config.TrainConfig)
  store = CheckpointStore(workdir, is_read_only=True)
  step = store.latest_step() if step is None else step
  if step is None:
    raise errors.CheckpointError(f"{store.directory}: found no checkpoint, expected at least one")
  return store, step, cfg


def abstract_params(model: transformer.Transformer, mesh: jax.sharding.Mesh | None) -> types.Params:
  """ShapeDtypeStruct of every parameter, placed on `mesh` or on the first local device."""
  shapes, specs = transformer.abstract_params(model)
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: place, shapes)
  else:
    shardings = mesh_lib.tree_shardings(mesh, specs, shapes)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def load_run(
  path: str | os.PathLike[str], *, mesh: jax.sharding.Mesh | None = None
) -> tuple[transformer.Transformer, types.Params, Any]:
  """(model, params, tokenizer or None) of a run folder 'workdir[@step]'.

  Parameters are born on `mesh`, whatever mesh they were trained on.
  """
  store, step, cfg = open_run(path)
  model = transformer.Transformer(cfg.model)
  with store:
    params = store.params(step, abstract_params(model, mesh))
  return model, params, load_tokenizer(run_config.split_step(path)[0])


def load_tokenizer(workdir: str | os.PathLike[str]) -> Any:
  """The tokenizer beside a run (`workdir/tokenizer`), or None."""
  folder = pathlib.Path(workdir) / "tokenizer"
  if not folder.is_dir():
    return None
  from minicpm_jax.text import tokenizer

  return tokenizer.load_tokenizer(folder)


def import_params(
  workdir: str | os.PathLike[str],
  cfg: config.ModelConfig | config.TrainConfig,
  params: types.Params,
  tok: Any = None,
) -> None:
  """Writes weights as step 0 of a new run folder that `load_run` and `init_from` accept.

  Projections joined for decoding are written apart, and codes in the form of `model.quant`.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / run_config.FILE_NAME).exists() or (workdir / "checkpoints").exists():
    raise errors.CheckpointError(f"{workdir}: found a run there already, expected a new folder")
  if isinstance(cfg, config.ModelConfig):
    data, grid = config.DataConfig(), 1 if cfg.sparse is None else cfg.sparse.alignment
    length = max(data.seq_len // grid, 1) * grid
    data = dataclasses.replace(data, align=grid, seq_len=length)
    cfg = config.TrainConfig(name=cfg.name, model=cfg, data=data)
  params = orbax_codes.in_form(cfg.model, joined.split_projections(cfg.model, params))
  with CheckpointStore(workdir, cfg.checkpoint) as store:
    store.save(0, params=params, meta={"tokens": 0, "config_hash": config_hash(cfg)})
    store.wait()
  if mesh_lib.is_main_process():
    if tok is not None:
      tok.save(workdir / "tokenizer")
    run_config.write(workdir, cfg, header="Imported weights; no optimiser state.")
  logging.info("wrote %s", workdir)
