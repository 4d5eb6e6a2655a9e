"""What a target says of training text, computed once and kept on disk for drafts.

The target is the dear part of a draft's step, and text is gone over many times. A folder holds
packed rows in shards: NAME-00000.npz (tokens, positions, ..., the target's best token) and
NAME-00000.hidden.npy [rows, T, D], the output of the final norm, and for EAGLE-3 .features.npy
[rows, T, 3D]; bfloat16 lies there as its 16 bits. index.json says what they were made from, and at
the end how many rows each shard has.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from minicpm_jax import config
from minicpm_jax.align import draft as draft_loss
from minicpm_jax.core import files, trees, types
from minicpm_jax.models import transformer

INDEX = "index.json"
VERSION = 1
SHARD_ROWS = 64
ARRAYS = ("hidden", "features")


class FeatureStoreError(ValueError):
  """A folder of features that does not belong to this run; names the field."""


def head_params(params: types.Params) -> types.Params:
  """What a loss needs of the target where its hidden states are stored: embedding and head."""
  return {name: params[name] for name in ("embed", "lm_head") if name in params}


def description(
  cfg: config.DistillConfig, model: transformer.Transformer, params: types.Params
) -> dict[str, Any]:
  """What the features depend on beside the text."""
  sums = [float(jnp.sum(jnp.abs(x.astype(jnp.float32)))) for x in jax.tree.leaves(params)]
  return {
    "version": VERSION,
    "target": {"name": model.cfg.name, "num": trees.num_params(params), "sum": f"{sum(sums):.6g}"},
    "feature_layers": list(cfg.draft.feature_layers),
    "seq_len": cfg.data.seq_len,
    "dtype": cfg.stored_dtype,
  }


def write(
  folder: str | os.PathLike[str],
  batches: Iterator[draft_loss.Batch],
  num_rows: int | None,
  cfg: config.DistillConfig,
  model: transformer.Transformer,
  params: types.Params,
) -> "Rows":
  """The first `num_rows` rows of `batches` (None: all) with the target's features.

  A finished folder is kept, a stopped one goes on behind its last whole shard: `batches` must be
  the same from the start.
  """
  folder = pathlib.Path(folder)
  wanted = description(cfg, model, params)
  if (folder / INDEX).exists():
    if "shards" in _read_index(folder, wanted):
      return Rows(folder, wanted)
  else:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / INDEX, wanted)
  run = _compiled(cfg, model)
  shards: list[int] = []
  for rows in _shards(batches, num_rows):
    name, count = f"rows-{len(shards):05d}", len(rows["tokens"])
    shards.append(count)
    if (folder / f"{name}.npz").exists():  # written last
      continue
    parts = [
      run(params, {key: x[i : i + cfg.data.batch_size] for key, x in rows.items()})
      for i in range(0, count, cfg.data.batch_size)
    ]
    out = {key: np.concatenate([np.asarray(p[key]) for p in parts]) for key in parts[0]}
    for key in ARRAYS:
      if key in out:
        with files.replacing(folder / f"{name}.{key}.npy") as partial:
          np.save(partial, _bits(out.pop(key)))
    with files.replacing(folder / f"{name}.npz") as partial:
      np.savez(partial, **rows, **out)
    print(f"{folder}: {sum(shards)} rows of {cfg.data.seq_len} tokens", flush=True)
  if not shards:
    raise FeatureStoreError(f"{folder}: found no rows to store, expected at least one")
  files.write_json(folder / INDEX, wanted | {"shards": shards})
  return Rows(folder, wanted)


def _compiled(cfg: config.DistillConfig, model: transformer.Transformer) -> Any:
  dtype = types.dtype_of(cfg.stored_dtype)

  @jax.jit
  def run(params: types.Params, batch: draft_loss.Batch) -> dict[str, Any]:
    seen = draft_loss.observe(model, params, batch, cfg.draft, cfg.loss_chunk)
    found = {"hidden": seen.hidden_BTD.astype(dtype), "best": seen.best_BT}
    if cfg.draft.feature_layers:
      found["features"] = seen.features_BTF.astype(dtype)
    return found

  return run


def _shards(batches: Iterator[draft_loss.Batch], num_rows: int | None) -> Iterator[Any]:
  """Dicts of at most SHARD_ROWS rows."""
  waiting: list[dict[str, np.ndarray]] = []
  count, is_open = 0, True
  while is_open or waiting:
    while is_open and len(waiting) < SHARD_ROWS:
      batch = next(batches, None) if num_rows is None or count < num_rows else None
      is_open = batch is not None
      if batch is not None:
        rows = [{key: x[i] for key, x in batch.items()} for i in range(len(batch["tokens"]))]
        rows = rows if num_rows is None else rows[: num_rows - count]
        count, waiting = count + len(rows), waiting + rows
    some, waiting = waiting[:SHARD_ROWS], waiting[SHARD_ROWS:]
    if some:
      yield {key: np.stack([row[key] for row in some]) for key in some[0]}


def _read_index(folder: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  index = json.loads((folder / INDEX).read_text())
  for name, value in wanted.items():
    if index.get(name) != value:
      raise FeatureStoreError(
        f"{folder / INDEX}: {name}: found {index.get(name)!r}, expected {value!r} (remove the "
        "folder to compute the features again)"
      )
  return index


def _bits(x: np.ndarray) -> np.ndarray:
  return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


class Rows:
  """The stored rows of a folder; features are read from disk as they are asked for."""

  def __init__(self, folder: pathlib.Path, wanted: dict[str, Any]):
    index = _read_index(folder, wanted)
    self._arrays = []
    for number in range(len(index["shards"])):
      stem = folder / f"rows-{number:05d}"
      arrays = dict(np.load(f"{stem}.npz"))
      for key in ARRAYS:
        path = pathlib.Path(f"{stem}.{key}.npy")
        if path.exists():
          x = np.load(path, mmap_mode="r")
          arrays[key] = x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x
      self._arrays.append(arrays)
    self._starts = np.concatenate(([0], np.cumsum(index["shards"])))

  def __len__(self) -> int:
    return int(self._starts[-1])

  def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """One batch of these rows, in this order."""
    shards = np.searchsorted(self._starts, rows, side="right") - 1
    found = [(self._arrays[s], r - self._starts[s]) for s, r in zip(shards, rows, strict=True)]
    return {key: np.stack([arrays[key][i] for arrays, i in found]) for key in found[0][0]}

  def in_order(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of all rows once; a last one that is not full is filled with rows of no weight."""
    for first in range(0, len(self), batch_size):
      rows = np.arange(first, first + batch_size)
      batch = self.take(np.minimum(rows, len(self) - 1))
      batch["loss_mask"] = batch["loss_mask"] * (rows < len(self))[:, None]
      yield batch


class Epochs:
  """Endless batches of stored rows, every epoch in an order of its own; position as JSON."""

  def __init__(self, rows: Rows, batch_size: int, seed: int):
    self._rows, self._batch_size, self._seed, self.step = rows, batch_size, seed, 0

  def __next__(self) -> dict[str, np.ndarray]:
    places = self.step * self._batch_size + np.arange(self._batch_size)
    epochs, at = np.divmod(places, len(self._rows))
    orders = {int(e): self._order(int(e)) for e in set(epochs.tolist())}
    self.step += 1
    return self._rows.take(np.array([orders[int(e)][i] for e, i in zip(epochs, at, strict=True)]))

  def _order(self, epoch: int) -> np.ndarray:
    return np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))

  def get_state(self) -> dict[str, int]:
    return {"step": self.step, "stored_rows": len(self._rows), "batch_size": self._batch_size}

  def set_state(self, state: dict[str, int]) -> None:
    for name, value in self.get_state().items():
      if name != "step" and state.get(name) != value:
        raise FeatureStoreError(f"data state: {name}: found {state.get(name)}, expected {value}")
    self.step = state["step"]

  def close(self) -> None:
    """Nothing is held open."""
