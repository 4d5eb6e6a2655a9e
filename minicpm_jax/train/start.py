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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minicpm_jax import config
from minicpm_jax.ckpt import orbax_io, run_config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees, types
from minicpm_jax.models import convert, transformer
from minicpm_jax.optim import schedules
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
  "compilation_cache",
  "grad_accum",
  "checkpoint",
  "mesh",
  "model.remat",
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


# --- Workdir -------------------------------------------------------------------------------------


def check_workdir(workdir: pathlib.Path, cfg: config.TrainConfig) -> list[str]:
  """Refuses a workdir of another config; returns a line for every allowed change."""
  if not (workdir / run_config.FILE_NAME).exists():
    return []
  old = run_config.read(workdir)
  found = run_config.differences(old, cfg)
  wrong = {
    name: pair
    for name, pair in found.items()
    if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_CHANGE)
  }
  if wrong:
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


def write_workdir(workdir: pathlib.Path, cfg: config.TrainConfig, mesh: jax.sharding.Mesh) -> None:
  """`workdir/config.py`, with revision, versions and devices in its docstring (main process)."""
  if not mesh_lib.is_main_process():
    return
  versions = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
  header = [
    "The config of this run, as resolved when it last started; `get_config()` rebuilds it.",
    "",
    f"revision: {git_revision()}",
    f"python {platform.python_version()}, "
    + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions),
    f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, "
    f"{jax.process_count()} processes, mesh {axes or 'of one device'}",
  ]
  run_config.write(workdir, cfg, header="\n".join(header))


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
  if store.latest_step() is not None:
    return _restore(store, store.latest_step(), abstract, "resumed own checkpoint")
  if cfg.branch_from is not None:
    source, step, _ = orbax_io.open_run(cfg.branch_from)
    with source:
      return _restore(source, step, abstract, f"branched from {cfg.branch_from}")
  if cfg.init_from is not None:
    params = load_weights(cfg.init_from, model, abstract, mesh, cfg.seed)
    description = f"weights of {cfg.init_from}, new optimiser state"
  else:
    params = step_lib.init_params(model, abstract, cfg.seed)
    description = f"random weights, seed {cfg.seed}"
  return Start(step_lib.fresh_state(optimizer, params, abstract), 0, 0, None, description)


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


def load_weights(
  path: str,
  model: transformer.Transformer,
  abstract: step_lib.TrainState,
  mesh: jax.sharding.Mesh,
  seed: int,
) -> types.Params:
  """Weights of an HF folder, GGUF file or run folder in the form that `model` wants.

  Casts to the param dtype, pads the vocabulary, and starts an MTP head that the source lacks from
  random values. Any other difference names the leaf.
  """
  loaded_model, params, _ = _loader(path)(path)
  cfg, source_cfg = model.cfg, loaded_model.cfg
  if source_cfg.padded_vocab_size != cfg.padded_vocab_size:
    _, params = convert.unpad_vocab(source_cfg, params)
    source_cfg = dataclasses.replace(source_cfg, vocab_multiple=1)
    _, params = convert.pad_vocab(source_cfg, params, cfg.vocab_multiple)
  found, wanted = trees.flatten_paths(params), trees.flatten_paths(abstract.params)
  if cfg.mtp is not None and "mtp" not in params:
    fresh = step_lib.init_params(model, abstract, seed)
    found |= {k: v for k, v in trees.flatten_paths(fresh).items() if k.startswith("mtp/")}
  if cfg.mtp is None:
    found = {k: v for k, v in found.items() if not k.startswith("mtp/")}
  for name in sorted(set(found) | set(wanted)):
    a, b = (tree[name].shape if name in tree else "none" for tree in (found, wanted))
    if a != b:
      raise ValueError(f"init_from {path}: tensor {name}: found {a}, expected {b}")

  def place(name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(found[name].astype(target.dtype), target.sharding)

  return trees.map_with_path(place, abstract.params)


def _loader(path: str) -> Callable[..., Any]:
  from minicpm_jax import ckpt

  folder, _ = orbax_io.split_step(path)
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
