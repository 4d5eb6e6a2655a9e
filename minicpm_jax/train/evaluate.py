"""Held-out loss in nats per token, and in bits per byte where the source knows its bytes."""

import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import metrics as metrics_lib
from minicpm_jax.core import types
from minicpm_jax.data import iterator, shards

EvalStep = Callable[[types.Params, dict[str, jax.Array]], dict[str, metrics_lib.Metric]]


def evaluate(
  eval_step: EvalStep, params: types.Params, cfg: config.TrainConfig, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  """{"eval/SOURCE/loss", "eval/SOURCE/accuracy", "eval/SOURCE/bits_per_byte"} for every source.

  bits per byte = loss / ln 2 * tokens / bytes, tokens and bytes of the whole source (EOS counted
  as a token); a Parquet source does not record its bytes and has no such value. Every call reads
  the same batches.
  """
  values: dict[str, float] = {}
  for name in cfg.eval_sources:
    means = metrics_lib.means(_sums(eval_step, params, cfg, mesh, name))
    values |= {f"eval/{name}/{key}": value for key, value in means.items()}
    ratio = tokens_per_byte(cfg.data, name)
    if ratio is not None:
      values[f"eval/{name}/bits_per_byte"] = means["loss"] / math.log(2) * ratio
  return values


def _sums(
  eval_step: EvalStep, params: types.Params, cfg: config.TrainConfig, mesh: Any, name: str
) -> dict[str, metrics_lib.Metric]:
  index, count = mesh_lib.data_process(mesh)
  rows = cfg.data.batch_size // count
  total: dict[str, metrics_lib.Metric] = {}
  batches = iterator.make_eval_iterator(
    cfg.data, name, cfg.eval_batches or None, vocab_size=cfg.model.vocab_size
  )
  with contextlib.closing(batches):
    for batch in batches:
      mine = {key: x[index * rows : (index + 1) * rows] for key, x in batch.items()}
      total = metrics_lib.add(total, eval_step(params, mesh_lib.shard_batch(mesh, mine)))
  return total


def tokens_per_byte(cfg: config.DataConfig, name: str) -> float | None:
  """Tokens per byte of text of a source; None where it has no index (Parquet) or is chat."""
  paths = {source.name: source.path for source in cfg.sources}
  if name not in paths:
    raise ValueError(f"name: found {name!r}, expected one of {list(paths)}")
  path = pathlib.Path(paths[name])
  if not (path / shards.INDEX_FILE).exists():
    return None
  index = shards.read_index(path)
  return None if index.config.is_chat else index.num_tokens / index.text_bytes
