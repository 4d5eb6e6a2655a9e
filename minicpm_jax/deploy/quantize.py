"""Calibrate and quantise a whole model, block by block (quantization.md 4-6, MiniCPM4 4.1.2).

True sequential: {q,k,v}, {o}, {gate,up}, {down}, each calibrated on inputs that already passed the
quantised predecessors, and the next block on the quantised block's output. Methods:

  rtn       nearest code, no calibration         gptq      Hessians over all tokens
  ternary   absmean, no calibration (a start for QAT; useless without it)
  p-gptq    Hessians without the first positions of every document
  s-gptq, s-p-gptq    the same after AWQ smoothing

The result holds QTensor leaves (int4 codes) where kernels were; norms that smoothing changed stay
floats. Activations are kept batch by batch on the host; one block's work is on the device.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minicpm_jax.config import ModelConfig, QuantConfig
from minicpm_jax.core import trees, types
from minicpm_jax.deploy import blocks
from minicpm_jax.models import transformer
from minicpm_jax.quant import awq, calib, gptq, qtensor, ternary

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
  awq_tokens: int = 4096  # tokens (whole batches) of the smoothing search
  awq_ratios: int = awq.NUM_RATIOS
  awq_skips: bool = False  # S-P-: the search leaves the first positions out as well

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"quantize.method: found {self.method!r}, expected one of {METHODS}")
    if self.p_layers not in ("all", "down"):
      raise ValueError(f"quantize.p_layers: found {self.p_layers!r}, expected all or down")
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
    is_masked = "p-gptq" in self.method and (self.p_layers == "all" or name == "mlp/down")
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
  progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> Quantized:
  """Quantises q, k, v, o, gate, up, down of every block; embedding, head and norms stay.

  Args:
    batches: calibration text, all of one shape; empty for rtn and ternary.
    progress: called after each block with its number (from 1) and its mean error.
  """
  model_cfg = model.cfg
  _check(model_cfg, params, batches, cfg)
  work = _Work(model_cfg, cfg, batches)
  hidden = [np.asarray(blocks.embed(model, params, tokens)) for tokens, _ in batches]
  done, report = [], []
  for i in range(model_cfg.num_layers):
    layer = blocks.layer_params(model_cfg, params, i)
    if not cfg.is_calibrated:
      layer, rows = _without_data(layer, cfg, i)
    else:
      layer, rows = work.block(layer, hidden, i)
    done.append(layer)
    report += rows
    if progress is not None:
      progress(i + 1, {"error": float(np.mean([r["error"] for r in rows]))})
  return Quantized(blocks.with_layers(model_cfg, params, done), report, work.seconds)


def _check(
  model_cfg: ModelConfig, params: types.Params, batches: Sequence[Batch], cfg: QuantizeConfig
) -> None:
  blocks.check_model(model_cfg)
  for path, leaf in trees.flatten_paths(params, qtensor.is_qtensor).items():
    if qtensor.is_qtensor(leaf):
      raise ValueError(f"{path}: found a QTensor ({leaf.scheme}), expected floats to quantise")
  if cfg.is_calibrated and not batches:
    raise ValueError(f"batches: found none, expected calibration text for {cfg.method}")
  shapes = {x.shape for batch in batches for x in batch}
  if len(shapes) > 1:
    raise ValueError(f"batches: found shapes {sorted(shapes)}, expected one (one compilation)")
  size = -1 if cfg.method == "ternary" else cfg.solver.group_size
  widths = {"attn/q": model_cfg.model_dim, "mlp/down": model_cfg.mlp_dim}
  widths["attn/o"] = model_cfg.num_heads * model_cfg.head_dim
  for name, width in widths.items():
    gptq.check_groups(width, size, name)
  scheme = "ternary" if cfg.method == "ternary" else "int4"
  ternary.check_latent(
    QuantConfig(scheme=scheme, group_size=size), params
  )  # not a fused checkpoint


def kernel_2d(layer: types.Params, name: str) -> Float[Array, "I O"]:
  """The kernel at "attn/o" as [in, out], float32."""
  part, kernel = name.split("/")
  w = layer[part][kernel]["kernel"]
  num_in = 2 if name == "attn/o" else 1
  return w.astype(jnp.float32).reshape(int(np.prod(w.shape[:num_in])), -1)


def put(layer: types.Params, name: str, leaf: Any) -> types.Params:
  """`layer` with another kernel; floats keep the dtype of the one they replace."""
  part, kernel = name.split("/")
  old = layer[part][kernel]["kernel"]
  if not qtensor.is_qtensor(leaf):
    leaf = leaf.reshape(old.shape).astype(old.dtype)
  return {**layer, part: {**layer[part], kernel: {"kernel": leaf}}}


def _without_data(
  layer: types.Params, cfg: QuantizeConfig, i: int
) -> tuple[types.Params, list[dict[str, Any]]]:
  rows = []
  for name in (name for stage in blocks.STAGES for name in stage):
    part, kernel = name.split("/")
    w = layer[part][kernel]["kernel"]
    num_in = 2 if name == "attn/o" else 1
    if cfg.method == "ternary":
      leaf = qtensor.quantize(w, "ternary", -1, num_in=num_in, scale_dtype=jnp.float16)
    else:
      solution = gptq.round_to_nearest(kernel_2d(layer, name), cfg.solver, name=name)
      leaf = gptq.to_qtensor(solution, cfg.solver, w.shape, num_in=num_in)
    off = qtensor.dequantize(leaf) - w.astype(jnp.float32)
    error = jnp.linalg.norm(off.ravel()) / jnp.linalg.norm(w.astype(jnp.float32).ravel())
    rows.append({"layer": i, "name": name, "shape": list(w.shape), "error": float(error)})
    layer = put(layer, name, leaf)
  return layer, rows


class _Work:
  """The state of a calibrated run: masks by document position, timers, compiled steps."""

  def __init__(self, model_cfg: ModelConfig, cfg: QuantizeConfig, batches: Sequence[Batch]):
    self.model_cfg, self.cfg = model_cfg, cfg
    self.segments = [jnp.asarray(segments) for _, segments in batches]
    self.keep = {
      skip: [calib.keep_mask(segments, skip) for segments in self.segments]
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
    if self.cfg.is_smoothed:
      layer, ratios = self.timed("smooth", self.smooth, layer, hidden)
    else:
      ratios = {}
    stored, rows = layer, []
    for stage in blocks.STAGES:
      hessian = self.timed("hessian", self.hessian, stage[0], layer, hidden)
      start = time.perf_counter()
      for name, solution, shape in self.solve(stage, layer, hessian, i):
        num_in = 2 if name == "attn/o" else 1
        leaf = gptq.to_qtensor(solution, self.cfg.solver, shape, num_in=num_in)
        stored = put(stored, name, leaf)
        layer = put(layer, name, qtensor.dequantize(leaf))
        rows.append(
          {
            "layer": i,
            "name": name,
            "shape": list(shape),
            "error": float(solution.error),
            "damp": float(solution.damp),
          }
          | ({"awq_ratio": ratios[stage[0]]} if stage[0] in ratios else {})
        )
      self.seconds["solve"] += time.perf_counter() - start
    for b, x in enumerate(hidden):
      args = (self.model_cfg, layer, jnp.asarray(x), self.segments[b])
      hidden[b] = np.asarray(self.timed("forward", blocks.output, *args))
    return stored, rows

  def hessian(self, name: str, layer: types.Params, hidden: list[np.ndarray]) -> Array:
    total = calib.hessian_init(kernel_2d(layer, name).shape[0])
    keep = self.keep[self.cfg.skipped(name)]
    for b, x in enumerate(hidden):
      args = (self.model_cfg, name, layer, jnp.asarray(x), self.segments[b])
      total = blocks.add_hessian(*args, total, keep[b])
    return total

  def solve(
    self, stage: tuple[str, ...], layer: types.Params, hessian: Array, i: int
  ) -> list[tuple[str, gptq.Solution, tuple[int, ...]]]:
    """Kernels of one input solved together: outputs are independent of one another."""
    kernels = [kernel_2d(layer, name) for name in stage]
    path = f"layers_{i}/" + "+".join(stage)
    whole = gptq.solve(jnp.concatenate(kernels, axis=1), hessian, self.cfg.solver, path)
    found, start = [], 0
    for name, w_IO in zip(stage, kernels, strict=True):
      part, kernel = name.split("/")
      out = slice(start, start + w_IO.shape[1])
      start = out.stop
      one = whole._replace(
        codes_IO=whole.codes_IO[:, out],
        scale_QO=whole.scale_QO[:, out],
        zero_QO=whole.zero_QO[:, out],
      )
      error = gptq.relative_error(gptq.dequantize(one), w_IO, hessian)
      found.append((name, one._replace(error=error), layer[part][kernel]["kernel"].shape))
    return found

  # --- smoothing ---------------------------------------------------------------------------------

  def smooth(
    self, layer: types.Params, hidden: list[np.ndarray]
  ) -> tuple[types.Params, dict[str, float]]:
    """The layer with the best factors folded in, and the ratio of every stage's first name."""
    model_cfg, cfg = self.model_cfg, self.cfg
    per_batch = int(np.prod(hidden[0].shape[:2]))
    count = min(len(hidden), max(1, cfg.awq_tokens // per_batch))
    xs = [jnp.asarray(x) for x in hidden[:count]]
    skip = cfg.skip if cfg.awq_skips and "p-gptq" in cfg.method else 0
    keep = self.keep[skip][:count]
    segments, ratios = self.segments[:count], {}

    def inputs(name: str) -> list[Array]:
      pairs = zip(xs, segments, strict=True)
      return [blocks.projection_input(model_cfg, name, layer, x, s) for x, s in pairs]

    def mean_abs(batches: list[Array]) -> Array:
      total = (jnp.zeros(batches[0].shape[-1]), jnp.zeros(()))
      for x, k in zip(batches, keep, strict=True):
        total = calib.abs_update(total, x, k)
      return total[0] / jnp.maximum(total[1], 1)

    def square(found: list[Array], wanted: list[Array]) -> Array:
      parts = zip(found, wanted, keep, strict=True)
      return sum(
        jnp.sum(jnp.where(k[..., None], a - b, 0).astype(jnp.float32) ** 2) for a, b, k in parts
      )

    def replaced(names: tuple[str, ...], t: Array) -> types.Params:
      changed = layer
      for name in names:
        changed = put(changed, name, _rounded(kernel_2d(layer, name), t, cfg.solver))
      return changed

    def attention(changed: types.Params) -> list[Array]:
      pairs = zip(xs, segments, strict=True)
      return [blocks.attention_branch(model_cfg, changed, x, s) for x, s in pairs]

    names, wanted = blocks.STAGES[0], attention(layer)
    found = awq.search(
      mean_abs(inputs("attn/q")),
      lambda t: square(attention(replaced(names, t)), wanted),
      cfg.awq_ratios,
    )
    layer, ratios[names[0]] = awq.fold_norm(layer, "attn_norm", names, found.factor_I), found.ratio

    names, normed = blocks.STAGES[2], inputs("mlp/gate")
    wanted = [blocks.mlp_branch(model_cfg, layer["mlp"], x) for x in normed]
    found = awq.search(
      mean_abs(normed),
      lambda t: square(
        [blocks.mlp_branch(model_cfg, replaced(names, t)["mlp"], x) for x in normed], wanted
      ),
      cfg.awq_ratios,
    )
    layer, ratios[names[0]] = awq.fold_norm(layer, "mlp_norm", names, found.factor_I), found.ratio

    inner, w_FD = inputs("mlp/down"), kernel_2d(layer, "mlp/down")
    total = calib.hessian_init(w_FD.shape[0])
    for x, k in zip(inner, keep, strict=True):
      total = calib.hessian_update(total, x, k)
    found = awq.search(
      mean_abs(inner),
      lambda t: gptq.relative_error(_rounded(w_FD, t, cfg.solver), w_FD, total),
      cfg.awq_ratios,
    )
    ratios["mlp/down"] = found.ratio
    return awq.fold_up_down(layer, found.factor_I), ratios


_rounded = jax.jit(awq.rounded, static_argnames="cfg")
