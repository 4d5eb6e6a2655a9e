"""What bench_train measures of whole train steps at the 0.5B shape on an accelerator.

A suite is a list of parts. A part that fails leaves its error in its row and the others go on;
parts that would begin after the budget are not run and say so. Rows are printed as they are made.
"""

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from configs import minicpm4_0p5b
from experiments import _bench_train
from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import metrics
from minicpm_jax.models import zoo

WARMUPS = 2
QUANTS = {
  "ternary, a scale a channel": config.QuantConfig(scheme="ternary"),
  "FP8, blocks of 128": config.QuantConfig(scheme="none", fp8=config.FP8Config()),
  "int4, groups of 128": config.QuantConfig(scheme="int4", group_size=128),
  "ternary, groups of 128": config.QuantConfig(scheme="ternary", group_size=128),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """`tokens` of a step: rows of `short` tokens, or of `long` ones."""

  base: config.ModelConfig
  recipe: config.ModelConfig
  sparse: config.SparseAttentionConfig
  tokens: int
  short: int
  long: int
  documents: int = 8  # of a packed row


def shape_0p5b() -> Shape:
  fields = dict(dtype="bf16", vocab_multiple=128)
  return Shape(
    base=zoo.minicpm4_0p5b(**fields),
    recipe=minicpm4_0p5b.get_config().model,
    sparse=config.SparseAttentionConfig(),
    tokens=32768,
    short=4096,
    long=32768,
  )


def shape_tiny() -> Shape:
  """For tests: the same parts in seconds on a CPU."""
  base = _bench_train.SIZES["tiny"]
  sparse = config.SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=4, dense_len=64
  )
  recipe = dataclasses.replace(base, mtp=config.MTPConfig(), remat="full")
  sizes = dict(tokens=1024, short=64, long=128, documents=4)
  return Shape(base=base, recipe=recipe, sparse=sparse, **sizes)


SHAPES = {"0p5b": shape_0p5b, "tiny": shape_tiny}


class Step:
  """A compiled train step and its state; batches of one shape."""

  def __init__(self, cfg: config.ModelConfig, tokens: int, seq_len: int):
    self.cfg, self.seq_len = cfg, seq_len
    self._ours = _bench_train.Ours(cfg, batch_size=tokens // seq_len, seq_len=seq_len)
    self._batch = self._ours.batch
    self.loss = math.nan
    self.run(WARMUPS)

  def pack(self, documents: int) -> None:
    """Rows of so many documents of equal length from here on; the program stays."""
    rows, T = self._ours.tokens // self.seq_len, self.seq_len
    batch = _bench_train.random_batch(self.cfg, rows, T)
    index_T = np.arange(T, dtype=np.int32) * documents // T
    start_T = np.searchsorted(index_T, index_T).astype(np.int32)
    batch["segment_ids"] = np.broadcast_to(1 + index_T, (rows, T)).copy()
    batch["positions"] = np.broadcast_to(np.arange(T) - start_T, (rows, T)).astype(np.int32)
    self._batch = mesh_lib.shard_batch(self._ours.mesh, batch)
    self.run(1)

  def run(self, num_steps: int) -> float:
    """Mean seconds of steps that are all enqueued before the last loss is waited for."""
    began = time.perf_counter()
    for _ in range(num_steps):
      loss = self._ours.dispatch(self._batch)
    self.loss = float(loss.sum) / float(loss.weight)
    seconds = (time.perf_counter() - began) / num_steps
    if not math.isfinite(self.loss):
      raise FloatingPointError(f"loss: found {self.loss}, expected a finite one")
    return seconds

  def row(self, seconds: float) -> dict[str, Any]:
    """`MFU` where dense attention's work is what is done (`metrics`)."""
    ours, kind = self._ours, jax.devices()[0].device_kind
    speed, memory = ours.tokens / seconds, ours.compiled.memory_analysis()
    used = None
    if self.cfg.sparse is None:
      more = dict(seq_len=self.seq_len, tokens_per_second=speed, device_kind=kind)
      used = metrics.mfu(self.cfg, **more)
    return {
      "tok/s": speed,
      "ms a step": 1e3 * seconds,
      "MFU": used,
      "temporary GiB": memory.temp_size_in_bytes / 2**30,
      "state GiB": memory.argument_size_in_bytes / 2**30,
      "trace s": ours.lower_seconds,
      "compile s": ours.compile_seconds,
      "loss": self.loss,
    }


# --- Suites: name of a part -> its row -----------------------------------------------------------

Parts = dict[str, Callable[[], dict[str, Any]]]


def mfu_parts(shape: Shape, repeats: int) -> Parts:
  """Dense at the short length, two kinds of rows of one program; sparse, dense at the long one."""
  held: dict[str, Any] = {}

  def make(length: int, **changes: Any) -> None:
    held.clear()
    gc.collect()
    held["step"] = Step(dataclasses.replace(shape.base, **changes), shape.tokens, length)

  def measured(length: int, **changes: Any) -> dict[str, Any]:
    make(length, **changes)
    return held["step"].row(held["step"].run(repeats))

  def packed() -> dict[str, Any]:
    if "step" not in held:  # the part before, whose program this is, was not asked for
      make(short, remat="none")
    held["step"].pack(shape.documents)
    return held["step"].row(held["step"].run(repeats))

  def recipe() -> dict[str, Any]:
    held.clear()
    gc.collect()
    step = Step(shape.recipe, shape.tokens, shape.short)
    return step.row(step.run(repeats))

  long, short = shape.long, shape.short
  return {
    f"dense, {short}": lambda: measured(short, remat="none"),
    f"dense, {short}, {shape.documents} documents a row": packed,
    f"sparse, {long}, remat dots": lambda: measured(long, remat="dots", sparse=shape.sparse),
    f"dense, {long}, remat dots": lambda: measured(long, remat="dots"),
    f"remat dots, dense, {short}": lambda: measured(short, remat="dots"),
    f"recipe (MTP, remat {shape.recipe.remat}), {short}": recipe,
  }


def qat_parts(shape: Shape, repeats: int) -> Parts:
  """The plain step, and each quantised one in turn with it (medians of the ratios)."""
  held: dict[str, Step] = {}
  base = dataclasses.replace(shape.base, remat="none")

  def made() -> Step:
    if "plain" not in held:  # quantised parts measure it too, asked for or not
      held["plain"] = Step(base, shape.tokens, shape.short)
    return held["plain"]

  def plain() -> dict[str, Any]:
    return {"time to plain": 1.0} | made().row(made().run(repeats))

  def quantized(quant: config.QuantConfig) -> dict[str, Any]:
    against = made()
    gc.collect()
    step = Step(dataclasses.replace(base, quant=quant), shape.tokens, shape.short)
    rounds = [(step.run(repeats), against.run(repeats)) for _ in range(3)]
    ratio = statistics.median(a / b for a, b in rounds)
    return {"time to plain": ratio} | step.row(statistics.median(a for a, _ in rounds))

  parts: Parts = {"plain": plain}
  for name, quant in QUANTS.items():
    parts[name] = lambda quant=quant: quantized(quant)
  return parts


SUITES = {"mfu": mfu_parts, "qat": qat_parts}


def is_served(suite: str) -> bool:
  """True for mfu, and for qat where there is an accelerator (a CPU has its own, smaller one)."""
  return suite == "mfu" or (suite == "qat" and jax.default_backend() != "cpu")


def unread(suite: str) -> tuple[str, ...]:
  """Flags of bench_train that the suite does not read."""
  if is_served(suite):
    return ("batch_size", "seq_len")
  return ("parts", "budget", *(("repeats",) if suite == "compile" else ()))


def rows(
  suite: str, size: str, repeats: int, *, budget: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
  """A row a part: its numbers, or `error`. `only`: beginnings of the names of the parts to run."""
  device = jax.devices()[0]
  if device.platform == "cpu" and size != "tiny":
    raise ValueError(f"--suite={suite}: found device {device.platform}, expected a GPU or TPU")
  began, found = time.perf_counter(), []
  parts = SUITES[suite](SHAPES[size](), repeats)
  chosen = [n for n in parts if not only or any(n.startswith(x) for x in only)]
  if unknown := [x for x in only if not any(n.startswith(x) for n in parts)]:
    raise ValueError(f"--parts: found {unknown}, expected beginnings of {list(parts)}")
  for name in chosen:
    row = {"part": name, "device": device.device_kind}
    if time.perf_counter() - began > budget:
      row["error"] = f"not begun: {budget:g} s are over"
    else:
      try:
        row |= parts[name]()
      except Exception as error:  # one broken part must not cost the others their time on a device
        row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
    row["elapsed s"] = time.perf_counter() - began
    print(json.dumps(row), flush=True)
    found.append(row)
  return found
