"""GPTQ of one linear layer (quantization.md 4): codes that minimise ||(Wq - W) X^T||^2 greedily.

Weights are kernels [in, out] here, so the loop over input channels walks rows. Both loops are
`lax.fori_loop`s: one compilation per (in, out, options), whatever the size. Everything runs in the
weights' dtype, float32 or (with jax_enable_x64) float64; shorter floats are widened to float32
first. P-GPTQ is the same solver on a Hessian without the first positions (`calib`). The factor U
with H^-1 = U^T U comes from one Cholesky of the reversed matrix, H = R R^T with R upper, and U =
R^-1; the reference factors the inverse, which is the same in real arithmetic and takes more work
and rounding.

A symmetric group's maximum lies exactly between two codes (7.5 s): where no error has reached it
yet, the rounding of the division decides which one it gets: float32 and float64 may differ there.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from minicpm_jax.config import validate
from minicpm_jax.quant import qtensor, schemes

_MAX_TRIES = 60  # of adding damp_step until the Cholesky factor is finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQConfig:
  """Options of the solver; the defaults but for static_groups are the reference's."""

  bits: int = 4
  group_size: int = 128  # inputs that share a scale; -1 = all
  symmetric: bool = True  # zero point 2^(bits - 1) and s = 2 max|w| / (2^bits - 1)
  act_order: bool = False  # inputs in the order of falling diag(H)
  static_groups: bool = False  # all scales from the original weights, groups in original order
  damp: float = 0.01  # share of mean(diag H) added to the diagonal
  damp_step: float = 0.01  # added to `damp` while the Cholesky factor is not finite
  block_size: int = 128  # inputs whose errors are applied to the rest at once
  mse: bool = False  # search a shrunken range for every group (norm 2.4, 80 steps of 1 %)
  scale_dtype: Literal["f32", "f16"] = "f32"  # f16: scales rounded as files store them, first

  def __post_init__(self):
    validate.require_hints(self, "gptq.")
    checks = (
      ("bits", self.bits in (2, 3, 4), "2, 3 or 4"),
      ("group_size", self.group_size == -1 or self.group_size > 0, "-1 or inputs > 0"),
      ("damp", 0 <= self.damp < math.inf, "a share >= 0"),
      ("damp_step", 0 < self.damp_step < math.inf, "a share > 0"),
      ("block_size", self.block_size > 0, "inputs > 0"),
    )
    for name, ok, expected in checks:
      if not ok:
        raise ValueError(f"gptq.{name}: found {getattr(self, name)!r}, expected {expected}")


class Solution(NamedTuple):
  """Codes 0 .. 2^bits - 1 and what they mean: w = scale[g, n] (code - zero[g, n])."""

  codes_IO: UInt8[Array, "I O"]
  scale_QO: Float[Array, "Q O"]
  zero_QO: Int[Array, "Q O"]
  g_idx_I: Int[Array, " I"]  # group of every input
  damp: Float[Array, ""]  # that was used
  error: Float[Array, ""]  # ||(Wq - W) X^T|| / ||W X^T||


def solve(
  w_IO: Float[Array, "I O"], hessian_II: Float[Array, "H H"], cfg: GPTQConfig, name: str = "kernel"
) -> Solution:
  """GPTQ of one kernel under H = X^T X (any positive multiple of it).

  Several kernels with the same input may be joined along the outputs: rows of HF's W are
  independent. Raises ValueError where the group size does not divide the inputs, H is not finite or
  stays indefinite.
  """
  check_groups(w_IO.shape[0], cfg.group_size, name)
  w_IO = _wide(w_IO)
  if hessian_II.shape != (w_IO.shape[0],) * 2:
    raise ValueError(
      f"{name}: hessian: found shape {hessian_II.shape}, expected {(w_IO.shape[0],) * 2}"
    )
  solution = _solve(w_IO, hessian_II.astype(w_IO.dtype), cfg)
  _check_range(solution, w_IO, cfg, name)
  if not np.isfinite(solution.error):
    raise ValueError(
      f"{name}: found a Hessian or weights that are not finite, or a Hessian that stays indefinite "
      f"at damp {float(solution.damp):.3g}, expected finite values (more calibration text?)"
    )
  return solution


def round_to_nearest(
  w_IO: Float[Array, "I O"], cfg: GPTQConfig, hessian_II: Any = None, name: str = "kernel"
) -> Solution:
  """Every weight to the nearest code of its group's range: the baseline, no Hessian needed."""
  check_groups(w_IO.shape[0], cfg.group_size, name)
  w_IO = _wide(w_IO)
  solution = _nearest(w_IO, hessian_II, cfg)
  _check_range(solution, w_IO, cfg, name)
  return solution


def _check_range(s: Solution, w_IO: Array, cfg: GPTQConfig, name: str) -> None:
  """Refuses weights that are not finite, and scales beyond float16 (outside jit)."""
  if isinstance(s.scale_QO, jax.core.Tracer):
    return
  high, scale = (float(x) for x in _largest(w_IO, s.scale_QO))
  if not math.isfinite(high):
    raise ValueError(f"{name}: found weights that are not finite")
  if cfg.scale_dtype == "f16" and scale > 65504:
    raise ValueError(
      f"{name}: found weights up to {high:.4g}, expected group scales within float16 (65504); "
      "scale_dtype='f32' keeps them"
    )


@jax.jit
def _largest(w_IO: Array, scale_QO: Array) -> tuple[Array, Array]:
  return jnp.max(jnp.abs(w_IO)), jnp.max(scale_QO)


def _wide(w_IO: Float[Array, "I O"]) -> Float[Array, "I O"]:
  """float32 or more: scales are statistics of float32 values whatever the weights' dtype."""
  return w_IO.astype(jnp.promote_types(w_IO.dtype, jnp.float32))


def check_groups(num_in: int, group_size: int, name: str) -> None:
  if group_size != -1 and num_in % group_size:
    raise ValueError(
      f"{name}: group_size: found {group_size}, expected -1 or a divisor of {num_in} inputs"
    )


def grid(
  w_gO: Float[Array, "*lead g O"], cfg: GPTQConfig
) -> tuple[Float[Array, "*lead O"], Float[Array, "*lead O"]]:
  """(scale, zero) of groups that lie along the axis before the last."""
  maxq = 2**cfg.bits - 1
  low = jnp.minimum(jnp.min(w_gO, axis=-2), 0)
  high = jnp.maximum(jnp.max(w_gO, axis=-2), 0)
  if cfg.symmetric:
    high = jnp.maximum(-low, high)
    low = -high
  is_empty = (low == 0) & (high == 0)
  low, high = jnp.where(is_empty, -1, low), jnp.where(is_empty, 1, high)

  def at(shrink: Any) -> tuple[Array, Array]:
    scale = schemes.quotient(shrink * (high - low), maxq)
    if cfg.scale_dtype == "f16":  # 2^-24 is float16's least number above 0
      scale = jnp.maximum(scale, 2.0**-24).astype(jnp.float16).astype(w_gO.dtype)
    middle = jnp.full_like(scale, 2 ** (cfg.bits - 1))
    return scale, middle if cfg.symmetric else jnp.clip(jnp.round(-shrink * low / scale), 0, maxq)

  if not cfg.mse:
    return at(1.0)

  def better(i: Any, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    scale, zero = at(1.0 - i.astype(w_gO.dtype) / 100)
    off = _value(_code(w_gO, scale, zero, maxq), scale, zero) - w_gO
    loss = jnp.sum(jnp.abs(off) ** 2.4, axis=-2)
    return jax.tree.map(
      lambda new, old: jnp.where(loss < best[0], new, old), (loss, scale, zero), best
    )

  first = jnp.full_like(low, jnp.inf)
  return jax.lax.fori_loop(0, 80, better, (first, *at(1.0)))[1:]


def _code(w: Array, scale: Array, zero: Array, maxq: Any) -> Array:
  """Codes of values [*lead, g, O] under scales and zeros [*lead, O]."""
  scale, zero = jnp.expand_dims(scale, -2), jnp.expand_dims(zero, -2)
  return jnp.clip(jnp.round(w / scale) + zero, 0, maxq)


def _value(code: Array, scale: Array, zero: Array) -> Array:
  return jnp.expand_dims(scale, -2) * (code - jnp.expand_dims(zero, -2))


def inverse_factor(hessian_II: Float[Array, "I I"]) -> Float[Array, "I I"]:
  """Upper U with H^-1 = U^T U; not finite where H is not positive definite."""
  r_II = jnp.linalg.cholesky(hessian_II[::-1, ::-1])[::-1, ::-1]
  eye = jnp.eye(r_II.shape[0], dtype=r_II.dtype)
  return jax.scipy.linalg.solve_triangular(r_II, eye, lower=False)


def _damped_factor(h_II: Array, cfg: GPTQConfig) -> tuple[Array, Array]:
  """(U, damp) with the first damp of damp, damp + step, ... that makes H positive definite."""
  mean, eye = jnp.mean(jnp.diag(h_II)), jnp.eye(h_II.shape[0], dtype=h_II.dtype)

  def factor(damp: Array) -> Array:
    return inverse_factor(h_II + damp * mean * eye)

  def is_bad(state: tuple[Array, Array, Array]) -> Array:
    return (state[2] < _MAX_TRIES) & ~jnp.all(jnp.isfinite(state[0]))

  def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    damp = state[1] + cfg.damp_step
    return factor(damp), damp, state[2] + 1

  damp = jnp.asarray(cfg.damp, h_II.dtype)
  u_II, damp, _ = jax.lax.while_loop(is_bad, again, (factor(damp), damp, jnp.int32(0)))
  return u_II, damp


@functools.partial(jax.jit, static_argnames="cfg")
def _solve(w_IO: Array, h_II: Array, cfg: GPTQConfig) -> Solution:
  num_in, num_out = w_IO.shape
  size, maxq = num_in if cfg.group_size == -1 else cfg.group_size, 2**cfg.bits - 1
  num_groups, original_IO, original_II = num_in // size, w_IO, h_II
  is_dead_I = jnp.diag(h_II) == 0
  h_II = h_II + jnp.diag(is_dead_I.astype(h_II.dtype))
  w_IO = jnp.where(is_dead_I[:, None], 0, w_IO)
  is_static = cfg.static_groups or cfg.group_size == -1
  scale_QO, zero_QO = grid(w_IO.reshape(num_groups, size, num_out), cfg)
  order_I = jnp.arange(num_in)
  if cfg.act_order:
    order_I = jnp.argsort(-jnp.diag(h_II), stable=True)
    w_IO, h_II = w_IO[order_I], h_II[order_I][:, order_I]
  u_II, damp = _damped_factor(h_II, cfg)
  # Whole blocks: the rows added are 0 and depend on nothing.
  B = cfg.block_size
  extra = -num_in % B
  w_PO = jnp.pad(w_IO, ((0, extra), (0, 0)))
  u_PP = jnp.pad(u_II, ((0, extra), (0, extra))) + jnp.diag(
    (jnp.arange(num_in + extra) >= num_in).astype(u_II.dtype)
  )
  group_P = (
    jnp.pad(order_I, (0, extra)) // size if is_static else jnp.arange(num_in + extra) // size
  )

  def column(i: Any, state: Any, start: Any, w_PO: Array, u_BB: Array) -> Any:
    block_BO, error_BO, codes_BO, scale_QO, zero_QO = state
    at = start + i
    group = group_P[at]
    if not is_static:

      def fresh() -> tuple[Array, Array]:
        scale, zero = grid(jax.lax.dynamic_slice_in_dim(w_PO, at, size), cfg)
        return scale_QO.at[group].set(scale), zero_QO.at[group].set(zero)

      is_first = (at % size == 0) & (at < num_in)
      scale_QO, zero_QO = jax.lax.cond(is_first, fresh, lambda: (scale_QO, zero_QO))
    scale, zero = scale_QO[group], zero_QO[group]
    code = _code(block_BO[i][None], scale, zero, maxq)[0]
    error = (block_BO[i] - scale * (code - zero)) / u_BB[i, i]
    block_BO = block_BO - u_BB[i][:, None] * error[None]  # U is upper: rows before i stay
    put = jax.lax.dynamic_update_index_in_dim
    return (
      block_BO,
      put(error_BO, error, i, 0),
      put(codes_BO, code.astype(jnp.uint8), i, 0),
      scale_QO,
      zero_QO,
    )

  def block(b: Any, state: Any) -> Any:
    w_PO, codes_PO, scale_QO, zero_QO = state
    start = b * B
    block_BO = jax.lax.dynamic_slice_in_dim(w_PO, start, B)
    u_BP = jax.lax.dynamic_slice_in_dim(u_PP, start, B)
    u_BB = jax.lax.dynamic_slice_in_dim(u_BP, start, B, axis=1)
    one = functools.partial(column, start=start, w_PO=w_PO, u_BB=u_BB)
    codes_BO = jnp.zeros(block_BO.shape, jnp.uint8)
    first = (block_BO, jnp.zeros_like(block_BO), codes_BO, scale_QO, zero_QO)
    _, error_BO, codes_BO, scale_QO, zero_QO = jax.lax.fori_loop(0, B, one, first)
    is_later_1P = (jnp.arange(w_PO.shape[0]) >= start + B)[None]
    w_PO = w_PO - jnp.where(is_later_1P, u_BP, 0).T @ error_BO
    codes_PO = jax.lax.dynamic_update_slice_in_dim(codes_PO, codes_BO, start, 0)
    return w_PO, codes_PO, scale_QO, zero_QO

  codes_PO = jnp.zeros(w_PO.shape, jnp.uint8)
  state = (w_PO, codes_PO, scale_QO, zero_QO)
  _, codes_PO, scale_QO, zero_QO = jax.lax.fori_loop(0, w_PO.shape[0] // B, block, state)
  back_I = jnp.argsort(order_I)
  codes_IO, g_idx_I = codes_PO[:num_in][back_I], group_P[:num_in][back_I].astype(jnp.int32)
  value_IO = scale_QO[g_idx_I] * (codes_IO.astype(w_IO.dtype) - zero_QO[g_idx_I])
  error = relative_error(value_IO, original_IO, original_II)
  error = jnp.where(jnp.all(jnp.isfinite(u_II)), error, jnp.nan)
  return Solution(codes_IO, scale_QO, zero_QO.astype(jnp.int32), g_idx_I, damp, error)


@functools.partial(jax.jit, static_argnames="cfg")
def _nearest(w_IO: Array, h_II: Any, cfg: GPTQConfig) -> Solution:
  num_in, num_out = w_IO.shape
  size = num_in if cfg.group_size == -1 else cfg.group_size
  w_QgO = w_IO.reshape(num_in // size, size, num_out)
  scale_QO, zero_QO = grid(w_QgO, cfg)
  codes_QgO = _code(w_QgO, scale_QO, zero_QO, 2**cfg.bits - 1)
  value_IO = _value(codes_QgO, scale_QO, zero_QO).reshape(w_IO.shape)
  h_II = jnp.eye(num_in, dtype=w_IO.dtype) if h_II is None else h_II.astype(w_IO.dtype)
  return Solution(
    codes_QgO.astype(jnp.uint8).reshape(w_IO.shape),
    scale_QO,
    zero_QO.astype(jnp.int32),
    (jnp.arange(num_in) // size).astype(jnp.int32),
    jnp.zeros((), w_IO.dtype),
    relative_error(value_IO, w_IO, h_II),
  )


def relative_error(
  found_IO: Float[Array, "I O"], w_IO: Float[Array, "I O"], hessian_II: Float[Array, "I I"]
) -> Float[Array, ""]:
  """||(Wq - W) X^T|| / ||W X^T|| from H = X^T X; 0 where W X^T is 0."""

  def square(x_IO: Array) -> Array:
    return jnp.maximum(jnp.sum(x_IO * (hessian_II @ x_IO)), 0)

  total = square(w_IO)
  ratio = jnp.sqrt(square(found_IO - w_IO) / jnp.where(total == 0, 1, total))
  return jnp.where(total == 0, 0, ratio)


def dequantize(s: Solution) -> Float[Array, "I O"]:
  """The kernel that the codes stand for, in the dtype of the scales."""
  codes_IO = s.codes_IO.astype(s.scale_QO.dtype)
  return s.scale_QO[s.g_idx_I] * (codes_IO - s.zero_QO[s.g_idx_I].astype(s.scale_QO.dtype))


def to_qtensor(
  s: Solution, cfg: GPTQConfig, shape: tuple[int, ...], *, num_in: int = 1
) -> qtensor.QTensor:
  """The solution as a parameter leaf of kernel `shape` [*in, *out], scales in cfg.scale_dtype.

  Codes are stored around 0: code - 2^(bits - 1), zero points likewise (None when symmetric).
  """
  middle = 2 ** (cfg.bits - 1)
  groups = (s.scale_QO.shape[0], *shape[num_in:])
  codes = (s.codes_IO.astype(jnp.int32) - middle).astype(jnp.int8).reshape(shape)
  dtype = jnp.float16 if cfg.scale_dtype == "f16" else jnp.float32
  return qtensor.make(
    codes,
    s.scale_QO.astype(dtype).reshape(groups),
    "int4",
    group_size=cfg.group_size,
    num_in=num_in,
    zero=None if cfg.symmetric else (s.zero_QO - middle).reshape(groups),
    g_idx=s.g_idx_I if cfg.act_order and not cfg.static_groups and cfg.group_size != -1 else None,
  )
