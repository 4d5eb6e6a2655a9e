"""Calibrate and quantise a whole model, block by block (quantization.md 4-6, MiniCPM4 4.1.2).

True sequential: {q,k,v}, {o}, {gate,up}, {down}, each calibrated on inputs that already passed the
quantised predecessors, and the next block on the quantised block's output. Methods:

  rtn       nearest code, no calibration         gptq      Hessians over all tokens
  ternary   absmean, no calibration (a start for QAT; useless without it)
  p-gptq    Hessians without the first positions of every document, or (p_first="bound") with them
            counting no more than other tokens: a first token that is an attention sink, 1,000 times
            larger, is lost when it is left out where it is made
  s-gptq, s-p-gptq    the same after AWQ smoothing

{q_a,kv_a}, {q_b}, {kv_b} take the place of {q,k,v} in latent attention. Experts have a Hessian each
over the tokens that the router gives them; an expert that gets none is rounded to nearest. Behind a
prefix (`deploy.prefix`) all inputs are those of text that follows the prefix, which is not
quantised and not counted.

The result holds QTensor leaves (int4 codes) where kernels were; norms that smoothing changed stay
floats. Activations are kept batch by batch on the host; one block's work is on the device.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minicpm_jax.config import ModelConfig, QuantConfig, validate
from minicpm_jax.core import trees, types
from minicpm_jax.deploy import blocks, smooth
from minicpm_jax.models import joined, transformer
from minicpm_jax.quant import awq, calib, gptq, prefix, qat, qtensor, ternary

Method = Literal["rtn", "ternary", "gptq", "p-gptq", "s-gptq", "s-p-gptq"]
METHODS = ("rtn", "ternary", "gptq", "p-gptq", "s-gptq", "s-p-gptq")
Batch = tuple[np.ndarray, np.ndarray]  # tokens [B, T], segment ids [B, T] (0 = padding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
  """How a model is quantised."""

  method: Method = "s-p-gptq"
  solver: gptq.GPTQConfig = gptq.GPTQConfig(static_groups=True, scale_dtype="f16")
  skip: int = 4  # first positions of a document that P- leaves out of the statistics
  p_layers: Literal["all", "down"] = "all"  # projections whose Hessian leaves them out
  p_first: Literal["drop", "bound"] = "drop"  # bound: they count, but no more than other tokens
  awq_tokens: int = 4096  # tokens (whole batches) of the smoothing search
  awq_ratios: int = awq.NUM_RATIOS
  awq_first: Literal["drop", "bound", "keep"] = "drop"  # S-P-: the same of the search

  def __post_init__(self):
    validate.require_hints(self, "quantize.")
    for name, least in (("skip", 0), ("awq_tokens", 1), ("awq_ratios", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"quantize.{name}: found {getattr(self, name)}, expected >= {least}")

  @property
  def is_calibrated(self) -> bool:
    return self.method.endswith("gptq")

  @property
  def is_smoothed(self) -> bool:
    return self.method.startswith("s-")

  def skipped(self, name: str) -> int:
    """Positions that the statistics of the projection `name` leave out."""
    is_down = name.endswith("/down")
    is_masked = "p-gptq" in self.method and (self.p_layers == "all" or is_down)
    return self.skip if is_masked else 0


class Quantized(NamedTuple):
  """Parameters with QTensor leaves, and one row a projection: error, damp, seconds."""

  params: types.Params
  report: list[dict[str, Any]]
  seconds: dict[str, float]  # by phase: forward, hessian (with the forward it needs), solve, smooth


def quantize_model(
  model: transformer.Transformer,
  params: types.Params,
  batches: Sequence[Batch],
  cfg: QuantizeConfig,
  *,
  before: prefix.Prefix | None = None,
  progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> Quantized:
  """Quantises the projections of every block (experts too); embedding, head, router and norms stay.

  Args:
    batches: calibration text, all of one shape; empty for rtn and ternary.
    before: prefix tokens in front of every row, which then is one document.
    progress: called after each block with its number (from 1) and its mean error.
  """
  model_cfg = model.cfg
  params = joined.split_projections(model_cfg, params)
  _check(model_cfg, params, batches, cfg, before)
  work = _Work(model_cfg, cfg, batches, before)
  hidden = [np.asarray(blocks.embed(model, params, tokens)) for tokens, _ in batches]
  done, report = [], []
  for i in range(model_cfg.num_layers):
    layer = blocks.layer_params(model_cfg, params, i)
    if not cfg.is_calibrated:
      layer, rows = _without_data(model_cfg, layer, cfg, i)
    else:
      layer, rows = work.block(layer, hidden, i)
    done.append(layer)
    report += rows
    if progress is not None:
      progress(i + 1, {"error": float(np.mean([r["error"] for r in rows]))})
  return Quantized(blocks.with_layers(model_cfg, params, done), report, work.seconds)


def _check(
  model_cfg: ModelConfig,
  params: types.Params,
  batches: Sequence[Batch],
  cfg: QuantizeConfig,
  before: prefix.Prefix | None,
) -> None:
  qat.check_not_latent(model_cfg.quant)
  for path, leaf in trees.flatten_paths(params, qtensor.is_qtensor).items():
    if qtensor.is_qtensor(leaf):
      raise ValueError(f"{path}: found a QTensor ({leaf.scheme}), expected floats to quantise")
  if cfg.is_calibrated and not batches:
    raise ValueError(f"batches: found none, expected calibration text for {cfg.method}")
  shapes = {x.shape for batch in batches for x in batch}
  if len(shapes) > 1:
    raise ValueError(f"batches: found shapes {sorted(shapes)}, expected one (one compilation)")
  if before is not None and any(np.max(segments) > 1 for _, segments in batches):
    raise ValueError("batches: found several documents in a row, expected one behind a prefix")
  size = -1 if cfg.method == "ternary" else cfg.solver.group_size
  layer = blocks.layer_params(model_cfg, params, 0)
  for name in (name for stage in blocks.stages(model_cfg) for name in stage):
    gptq.check_groups(blocks.kernel(layer, name).shape[-2], size, name)
  scheme = "ternary" if cfg.method == "ternary" else "int4"
  ternary.check_latent(QuantConfig(scheme=scheme, group_size=size), params)


# Eager, the few operations of each of these would be a dozen programs a shape to compile.


def _to_leaf(
  solutions: Sequence[gptq.Solution], cfg: QuantizeConfig, name: str, w: Array
) -> tuple[qtensor.QTensor, Array, Array]:
  """(leaf, the floats it stands for, their distance from w) of the kernel `w`: of one solution, or
  of one an expert. The distance is a share of w's norm, 0 where that is 0."""
  return _leaf(list(solutions), w, cfg.solver, blocks.num_in(name), name.startswith("moe/"))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _leaf(solutions: Any, w: Array, cfg: gptq.GPTQConfig, num_in: int, is_moe: bool) -> Any:
  if is_moe:
    leaves = [gptq.to_qtensor(one, cfg, w.shape[1:]) for one in solutions]
    leaf = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
  else:
    leaf = gptq.to_qtensor(solutions[0], cfg, w.shape, num_in=num_in)
  floats = qtensor.dequantize(leaf)
  return leaf, floats, _distance(floats, w)


@jax.jit
def _distance(found: Array, w: Array) -> Float[Array, ""]:
  w = w.astype(jnp.float32)
  size = jnp.linalg.norm(w.ravel())
  return jnp.where(size > 0, jnp.linalg.norm((found - w).ravel()) / size, 0.0)


@jax.jit
def _cut(whole: gptq.Solution, kernels: list[Array], hessian: Array) -> list[gptq.Solution]:
  """The solutions of kernels that were solved joined."""
  found, start = [], 0
  for w_IO in kernels:
    out = slice(start, start + w_IO.shape[1])
    start = out.stop
    one = whole._replace(
      codes_IO=whole.codes_IO[:, out],
      scale_QO=whole.scale_QO[:, out],
      zero_QO=whole.zero_QO[:, out],
    )
    error = gptq.relative_error(gptq.dequantize(one), w_IO, hessian)
    found.append(one._replace(error=error))
  return found


def _without_data(
  model_cfg: ModelConfig, layer: types.Params, cfg: QuantizeConfig, i: int
) -> tuple[types.Params, list[dict[str, Any]]]:
  rows = []
  for name in (name for stage in blocks.stages(model_cfg) for name in stage):
    part, kernel = name.split("/")
    w, is_moe = layer[part][kernel]["kernel"], part == "moe"
    path = f"layers_{i}/{name}"
    if not jnp.all(jnp.isfinite(w)):
      raise ValueError(f"{path}: found weights that are not finite")
    if cfg.method == "ternary":
      more = dict(num_in=blocks.num_in(name), num_lead=int(is_moe), scale_dtype=jnp.float16)
      leaf = qtensor.quantize(w, "ternary", -1, **more)
      error = _distance(qtensor.dequantize(leaf), w)
    else:
      kernels = blocks.kernel(layer, name)
      found = [
        gptq.round_to_nearest(one, cfg.solver, name=path)
        for one in (kernels if is_moe else [kernels])
      ]
      leaf, _, error = _to_leaf(found, cfg, name, w)
    rows.append({"layer": i, "name": name, "shape": list(w.shape), "error": float(error)})
    layer = blocks.with_kernel(layer, name, leaf)
  return layer, rows


class _Work:
  """The state of a calibrated run: masks by document position, timers, compiled steps."""

  def __init__(
    self,
    model_cfg: ModelConfig,
    cfg: QuantizeConfig,
    batches: Sequence[Batch],
    before: prefix.Prefix | None = None,
  ):
    self.model_cfg, self.cfg, self.before = model_cfg, cfg, before
    self.segments = [jnp.asarray(segments) for _, segments in batches]
    held = 0 if before is None else before.length  # positions that the prefix has
    self.keep = {
      skip: [calib.keep_mask(segments, max(0, skip - held)) for segments in self.segments]
      for skip in {0, cfg.skip}
    }
    if cfg.is_calibrated:
      kept = sum(int(k.sum()) for k in self.keep[cfg.skipped("mlp/down")])
      if kept == 0:
        raise ValueError(
          f"batches: found no token after the first {cfg.skip}, expected longer text"
        )
    self.seconds = dict.fromkeys(("forward", "hessian", "solve", "smooth"), 0.0)

  def timed(self, phase: str, fn: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    self.seconds[phase] += time.perf_counter() - start
    return out

  def block(
    self, layer: types.Params, hidden: list[np.ndarray], i: int
  ) -> tuple[types.Params, list[dict[str, Any]]]:
    """The quantised block; `hidden` becomes its outputs."""
    before = blocks.layer_prefix(self.model_cfg, self.before, i)
    ratios = {}
    if self.cfg.is_smoothed:
      layer, ratios = self.timed("smooth", self.smooth, layer, hidden, before)
    stored, rows = layer, []
    for stage in blocks.stages(self.model_cfg):
      hessian = self.timed("hessian", self.hessian, stage[0], layer, hidden, before)
      start = time.perf_counter()
      for name, solutions in self.solve(stage, layer, hessian, i).items():
        part, kernel = name.split("/")
        leaf, floats, _ = _to_leaf(solutions, self.cfg, name, layer[part][kernel]["kernel"])
        stored = blocks.with_kernel(stored, name, leaf)
        layer = blocks.with_kernel(layer, name, floats)
        rows.append(
          {
            "layer": i,
            "name": name,
            "shape": list(leaf.full_shape),
            "error": float(np.mean([s.error for s in solutions])),
            "damp": float(np.max([s.damp for s in solutions])),
          }
          | ({"awq_ratio": ratios[stage[0]]} if stage[0] in ratios else {})
        )
        if len(solutions) > 1:
          rows[-1]["errors"] = [float(s.error) for s in solutions]
      self.seconds["solve"] += time.perf_counter() - start
    for b, x in enumerate(hidden):
      args = (self.model_cfg, layer, jnp.asarray(x), self.segments[b], before)
      hidden[b] = np.asarray(self.timed("forward", blocks.output, *args))
    return stored, rows

  def hessian(
    self, name: str, layer: types.Params, hidden: list[np.ndarray], before: Any = None
  ) -> Float[Array, "*E I I"]:
    *lead, num_in, _ = blocks.kernel(layer, name).shape
    total = jnp.zeros((*lead, num_in, num_in), jnp.float32)
    keep, first = self.keep[self.cfg.skipped(name)], [None] * len(hidden)
    if self.cfg.p_first == "bound" and self.cfg.skipped(name):
      first = [a & ~b for a, b in zip(self.keep[0], keep, strict=True)]
      keep = self.keep[0]
    for b, x in enumerate(hidden):
      args = (self.model_cfg, name, layer, jnp.asarray(x), self.segments[b])
      total = blocks.add_hessian(*args, total, keep[b], before, first[b])
    return total

  def solve(
    self, stage: tuple[str, ...], layer: types.Params, hessian: Float[Array, "*E I I"], i: int
  ) -> dict[str, list[gptq.Solution]]:
    """Solutions by name, one a kernel or one an expert."""
    kernels, path = [blocks.kernel(layer, name) for name in stage], f"layers_{i}/" + "+".join(stage)
    if hessian.ndim == 2:
      solved = [self._solve_joined(kernels, hessian, path)]
    else:
      solved = [
        self._solve_joined([w_EIO[e] for w_EIO in kernels], hessian[e], f"{path}[{e}]")
        for e in range(hessian.shape[0])
      ]
    return {name: [one[n] for one in solved] for n, name in enumerate(stage)}

  def _solve_joined(
    self, kernels: list[Array], hessian: Float[Array, "I I"], path: str
  ) -> list[gptq.Solution]:
    """Kernels of one input solved together: outputs are independent of one another."""
    if not np.any(np.asarray(jnp.diag(hessian)) > 0):  # an expert without a token
      return [gptq.round_to_nearest(w_IO, self.cfg.solver, name=path) for w_IO in kernels]
    whole = gptq.solve(jnp.concatenate(kernels, axis=1), hessian, self.cfg.solver, path)
    return _cut(whole, kernels, hessian)

  def smooth(
    self, layer: types.Params, hidden: list[np.ndarray], before: Any = None
  ) -> tuple[types.Params, dict[str, Any]]:
    """The layer with the best factors folded in, and the ratio of every stage's first name."""
    per_batch = int(np.prod(hidden[0].shape[:2]))
    count = min(len(hidden), max(1, self.cfg.awq_tokens // per_batch))
    is_p, rule = "p-gptq" in self.cfg.method, self.cfg.awq_first
    keep = self.keep[self.cfg.skip if is_p and rule == "drop" else 0]
    first = [a & ~b for a, b in zip(self.keep[0], self.keep[self.cfg.skip], strict=True)]
    text = smooth.Text(
      [jnp.asarray(x) for x in hidden[:count]],
      self.segments[:count],
      keep[:count],
      first[:count] if is_p and rule == "bound" else None,
      before,
    )
    return smooth.smooth(self.model_cfg, layer, text, self.cfg.solver, self.cfg.awq_ratios)
