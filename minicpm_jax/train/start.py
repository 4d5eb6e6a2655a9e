"""How a run begins: is the workdir ours, and where do the state and the data position come from.

The order is fixed and printed: (1) the newest checkpoint of the workdir itself, (2) `branch_from`:
everything of another run's checkpoint, Adam moments and data position included, (3) `init_from`:
weights only, (4) random weights.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io, run_config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import rng, trees, types
from minicpm_jax.data import iterator, sources
from minicpm_jax.models import convert, transformer
from minicpm_jax.optim import schedules
from minicpm_jax.quant import ternary, tree
from minicpm_jax.train import step as step_lib

# Fields that a workdir's run may change when it goes on; every other difference is refused. The
# schedule may change where no learning rate of the past changes (checked), the phases where the
# data iterator agrees (it refuses a changed past), and the mesh and micro-batches change results
# by rounding only.
MAY_CHANGE = (
  "name",
  "num_steps",
  "log_every",
  "eval_every",
  "eval_batches",
  "eval_sources",
  "profile_steps",
  "source_losses",
  "compilation_cache",
  "grad_accum",
  "checkpoint",
  "mesh",
  "model.remat",
  "model.scan_unroll",
  "model.attention",
  "optim.schedule",
  "data.phases",
  "data.num_threads",
  "data.prefetch",
)


class WorkdirError(ValueError):
  """A workdir that holds the run of another config."""


@dataclasses.dataclass
class Start:
  """State to continue from; `data` is the iterator position (None: from its beginning)."""

  state: step_lib.TrainState
  step: int
  tokens: int
  data: dict[str, Any] | None
  description: str
  tokenizer: Any = None  # of the run or folder that this one starts from
  is_branch: bool = False


# --- Workdir -------------------------------------------------------------------------------------


def check_workdir(workdir: pathlib.Path, cfg: config.TrainConfig) -> list[str]:
  """Refuses a workdir of another config; returns a line for every allowed change.

  A run that left no checkpoint (it ended before the first) holds nothing: all of it may change.
  """
  if not (workdir / run_config.FILE_NAME).exists():
    if (workdir / "config.json").exists():  # two models in one folder: which would be loaded?
      raise WorkdirError(
        f"{workdir}: found config.json of a Hugging Face folder, expected a run or a new folder"
      )
    return []
  old = run_config.read(workdir, config.TrainConfig)
  found = run_config.differences(old, cfg)
  wrong = {
    name: pair
    for name, pair in found.items()
    if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_CHANGE)
  }
  if wrong and orbax_io.has_checkpoint(workdir):
    lines = [f"  {name}: found {a!r}, expected {b!r}" for name, (a, b) in wrong.items()]
    raise WorkdirError(
      f"{workdir}: found a run of another config; use another workdir or that run's values:\n"
      + "\n".join(lines)
    )
  last_step = orbax_io.latest_step(workdir)
  changed_step = first_changed_rate(old.optim, cfg.optim, last_step)
  if changed_step is not None:
    raise WorkdirError(
      f"{workdir}: optim.schedule: found step {changed_step} trained with another learning rate "
      f"(the run is at step {last_step}), expected a schedule with an equal past; branch from an "
      "earlier checkpoint into a new workdir"
    )
  return [f"{name}: {a!r} -> {b!r}" for name, (a, b) in found.items()]


def first_changed_rate(
  old: config.OptimConfig, new: config.OptimConfig, last_step: int
) -> int | None:
  """First step in 1..last_step at which two schedules give different learning rates."""
  if last_step < 1:
    return None
  steps = jnp.arange(1, last_step + 1)

  def rates(cfg: config.OptimConfig) -> np.ndarray:
    arrays = schedules.schedule_arrays(cfg.schedule, cfg.peak_lr)
    return np.asarray(jax.vmap(lambda s: schedules.learning_rate(s, arrays))(steps))

  differs = ~np.isclose(rates(old), rates(new), rtol=1e-6, atol=0.0)
  return int(np.argmax(differs)) + 1 if differs.any() else None


def write_workdir(
  workdir: pathlib.Path, cfg: config.TrainConfig, mesh: jax.sharding.Mesh, tok: Any = None
) -> None:
  """`workdir/config.py` with revision, versions and devices in its docstring, `tokenizer/`."""
  if not mesh_lib.is_main_process():
    return
  versions = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
  header = [
    "The config of this run as it last started; get_config() rebuilds it.",
    "",
    f"revision: {git_revision()}",
    f"python {platform.python_version()}, "
    + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions),
    f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, "
    f"{jax.process_count()} processes, mesh {axes or 'of one device'}",
  ]
  run_config.write(workdir, cfg, header="\n".join(header))
  if tok is not None:
    if not orbax_io.has_checkpoint(workdir) or not (workdir / "tokenizer").exists():
      tok.save(workdir / "tokenizer")


def git_revision() -> str:
  """Commit of the source tree, with '+' if files differ from it; 'unknown' outside git."""
  folder = pathlib.Path(__file__).resolve().parents[2]

  def git(*args: str) -> str:
    command = ["git", "-C", os.fspath(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

  try:
    dirty = bool(git("status", "--porcelain", "--untracked-files=no").strip())
    return git("rev-parse", "HEAD").strip() + ("+" if dirty else "")
  except (OSError, subprocess.SubprocessError):
    return "unknown"


# --- The four starts -----------------------------------------------------------------------------


def begin(
  cfg: config.TrainConfig,
  model: transformer.Transformer,
  optimizer: optax.GradientTransformation,
  abstract: step_lib.TrainState,
  mesh: jax.sharding.Mesh,
  store: orbax_io.CheckpointStore,
) -> Start:
  """The first of the four ways that applies."""
  newest = store.latest_step()
  if newest is not None:
    return _restore(store, newest, abstract, "resumed own checkpoint")
  if cfg.branch_from is not None:
    source, step, _ = orbax_io.open_run(cfg.branch_from)
    with source:
      begun = _restore(source, step, abstract, f"branched from {cfg.branch_from}")
    tok = orbax_io.load_tokenizer(run_config.split_step(cfg.branch_from)[0])
    return dataclasses.replace(begun, tokenizer=tok, is_branch=True)
  tok = None
  if cfg.init_from is not None:
    params, tok = load_weights(cfg.init_from, model, abstract, mesh, cfg.seed)
    ternary.check_latent(cfg.model.quant, params)
    if cfg.keep_moments:
      return _keep_moments(cfg, params, abstract, tok)
    description = f"weights of {cfg.init_from}, new optimiser state"
  else:
    params = step_lib.init_params(model, abstract, cfg.seed)
    description = f"random weights, seed {cfg.seed}"
  return Start(step_lib.fresh_state(optimizer, params, abstract), 0, 0, None, description, tok)


def _keep_moments(
  cfg: config.TrainConfig, params: types.Params, abstract: step_lib.TrainState, tok: Any
) -> Start:
  """Weights already loaded, with the Adam moments of the run that they come from; step 0."""
  source, step, _ = orbax_io.open_run(cfg.init_from)
  with source:
    opt_state = source.opt_state(step, abstract.opt_state)
  state = step_lib.TrainState(
    jax.device_put(jnp.int32(0), abstract.step.sharding), params, opt_state
  )
  return Start(state, 0, 0, None, f"weights and moments of {cfg.init_from}, step 0", tok)


def _restore(
  store: orbax_io.CheckpointStore, step: int, abstract: step_lib.TrainState, how: str
) -> Start:
  meta = store.meta(step)
  state = step_lib.TrainState(
    step=jax.device_put(jnp.int32(step), abstract.step.sharding),
    params=store.params(step, abstract.params),
    opt_state=store.opt_state(step, abstract.opt_state),
  )
  return Start(state, step, int(meta["tokens"]), store.data(step), f"{how}, step {step}")


def check_tokenizer(
  tok: Any, cfg: config.TrainConfig, data: Mapping[str, Any] | None = None
) -> None:
  """Refuses a tokenizer (None: no opinion) with ids that the model has no row for, and one of
  another vocabulary than that of the shards (the hash also changes with a chat template)."""
  if tok is None:
    return
  if tok.vocab_size > cfg.model.vocab_size:
    raise ValueError(
      f"model.vocab_size: found {cfg.model.vocab_size}, expected at least {tok.vocab_size}, the "
      "size of the tokenizer"
    )
  for name, source in (data or {}).items():
    if source.tokenizer_hash and source.vocab_size != tok.vocab_size:
      raise ValueError(
        f"tokenizer: found {tok.vocab_size} tokens, expected the {source.vocab_size} of the "
        f"tokenizer that source {name} was made with"
      )


def open_data(cfg: config.TrainConfig, mesh: jax.sharding.Mesh) -> iterator.BatchIterator:
  """The batch iterator of this process, at its beginning.

  Sources with more ids than the model, those that are only evaluated included, are refused.
  """
  index, count = mesh_lib.data_process(mesh)
  for source in cfg.data.sources:
    if source.name in cfg.eval_sources:
      opened = sources.open_source(source.name, source.path)
      sources.check_vocabulary(opened, cfg.model.vocab_size)
  return iterator.make_iterator(
    cfg.data,
    batch_size_per_host=cfg.data.batch_size // count,
    process_index=index,
    process_count=count,
    vocab_size=cfg.model.vocab_size,
  )


def seek_data(batches: iterator.BatchIterator, begun: Start) -> str:
  """Moves `batches` to where `begun` stands; returns a line about it.

  A resumed run insists on the exact position. A branch may change what the rows look like (their
  length, the number of processes): every source then goes on from its own cursor.
  """
  if begun.data is None:
    return "data: from the beginning"
  try:
    batches.set_state(begun.data)
  except iterator.DataStateError as error:
    if not begun.is_branch:
      raise
    batches.set_state(begun.data, force=True)
    return f"data: sources go on from their cursors, but not the same rows: {error}"
  return f"data: goes on after batch {begun.step}"


def load_weights(
  path: str,
  model: transformer.Transformer,
  abstract: step_lib.TrainState,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> tuple[types.Params, Any]:
  """(params in the form that `model` wants, tokenizer or None) of `init_from`.

  Function-preserving changes are made as the config asks: untied head, dense to MoE, padded
  vocabulary, param dtype; an MTP head that the source lacks starts from random values. Any other
  difference names the tensor.
  """
  cfg = model.cfg
  load = _loader(path)
  try:
    loaded, params, tok = load(path, mesh=mesh)
  except mesh_lib.ShardingError:  # a vocabulary that tp divides only once it is padded
    loaded, params, tok = load(path)
    params = jax.device_get(params)
  tree.check_floats(params, f"init_from {path}: ")
  source = loaded.cfg
  if source.tie_embeddings and not cfg.tie_embeddings:
    source, params = convert.untie(source, params)
  if cfg.moe is not None and source.moe is None:
    source, params = convert.upcycle(source, params, rng.key(seed, "upcycle"), cfg.moe)
  if source.padded_vocab_size != cfg.padded_vocab_size:
    _, params = convert.pad_vocab(source, params, cfg.vocab_multiple)
  found, wanted = trees.flatten_paths(params), trees.flatten_paths(abstract.params)
  found = {name: x for name, x in found.items() if cfg.mtp is not None or name[:4] != "mtp/"}
  if cfg.mtp is not None and "mtp" not in params:
    fresh = trees.flatten_paths(step_lib.init_params(model, abstract, seed))
    found |= {name: x for name, x in fresh.items() if name.startswith("mtp/")}
  for name in sorted(set(found) | set(wanted)):
    a, b = (list(tree[name].shape) if name in tree else "none" for tree in (found, wanted))
    if a != b:
      raise ValueError(f"init_from {path}: tensor {name}: found {a}, expected {b}")

  def place(name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(found.pop(name).astype(target.dtype), target.sharding)

  return trees.map_with_path(place, abstract.params), tok


def _loader(path: str) -> Callable[..., Any]:
  from minicpm_jax import ckpt

  folder, _ = run_config.split_step(path)
  if (folder / run_config.FILE_NAME).is_file():
    return orbax_io.load_run
  if path.endswith(".gguf"):
    return ckpt.load_gguf
  if (pathlib.Path(path) / "config.json").is_file():
    return ckpt.load_hf
  raise ValueError(
    f"init_from: found {path!r}, expected a run folder (config.py), a Hugging Face folder "
    "(config.json) or a .gguf file"
  )
