"""Kernels of quantisation-aware training: quantised once a step, trained through the latent floats.

A `Prepared` leaf stands where the latent kernel stood. Its forward value is the quantised weight,
its gradient goes to `latent` unchanged (straight-through, also where codes were clipped), so that
`prepare` runs once a step and serves every micro-batch and the rematerialised backward pass. A
float leaf that was not prepared is prepared on the spot, so any forward of a model whose config has
`quant` sees quantised weights.

Three forms: `value` alone (weights with their scale: float32 compute, or groups), `value` and
`scale` (low-precision compute, one scale an output channel: exact codes in the product and the
scale after it, quantization.md 1.2), or FP8 codes with block scales (`quant.fp8`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from minicpm_jax.config import FP8Config, QuantConfig
from minicpm_jax.core import trees, types
from minicpm_jax.quant import fp8, leaf, qtensor, schemes, tree


@flax.struct.dataclass
class Prepared:
  """latent and value [*lead, *in, *out]; scale [*lead, 1, out], of FP8 [*lead, P, Q], or None."""

  latent: Any
  value: Any
  scale: Any = None
  num_in: int = flax.struct.field(pytree_node=False, default=1)
  fp8: FP8Config | None = flax.struct.field(pytree_node=False, default=None)
  act_bits: int | None = flax.struct.field(pytree_node=False, default=None)


def is_active(cfg: QuantConfig | None) -> bool:
  """True where training differs from that of plain weights."""
  return cfg is not None and (cfg.scheme != "none" or cfg.fp8 is not None)


def is_leaf(x: Any) -> bool:
  """True for the kernels that `functional.linear` takes beside arrays."""
  return isinstance(x, Prepared | qtensor.QTensor)


@jax.custom_jvp
def straight_through(latent: Float[types.AnyArray, "..."], value: Float[types.AnyArray, "..."]):
  """`value` in the forward pass; its tangent is that of `latent`."""
  del latent
  return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  value = primals[1]
  return value, tangents[0].astype(value.dtype)


# --- Quantising ----------------------------------------------------------------------------------


def quantize_latent(
  cfg: QuantConfig, path: str, w: Float[types.AnyArray, "..."], *, num_in: int, num_lead: int = 0
) -> qtensor.QTensor:
  """Codes and scales that the forward pass makes of a latent kernel."""
  cfg = dataclasses.replace(cfg, weights="codes", fp8=None)
  w = jax.lax.stop_gradient(w)
  return leaf.quantize_kernel(cfg, path, w, num_in=num_in, num_lead=num_lead)


def prepare_kernel(
  cfg: QuantConfig,
  path: str,
  w: Float[types.AnyArray, "..."],
  *,
  num_in: int,
  num_lead: int,
  dtype: Any,
) -> Prepared:
  """The kernel `w` as forward passes in `dtype` use it."""
  form = dict(latent=w, num_in=num_in, fp8=cfg.fp8, act_bits=cfg.act_bits)
  if cfg.scheme == "none":
    value = jax.lax.stop_gradient(w)
  else:
    qt = quantize_latent(cfg, path, w, num_in=num_in, num_lead=num_lead)
    is_exact = jnp.dtype(dtype) == jnp.float32 or cfg.fp8 is not None
    if qt.num_groups == 1 and not is_exact and not schemes.get(qt.scheme).offset:
      codes = qt.codes.astype(jnp.int8).astype(dtype)
      scale = qt.scale.astype(jnp.float32).reshape(*qt.lead, 1, -1)
      return Prepared(value=codes, scale=scale, **form)
    value = qtensor.dequantize(qt, jnp.float32 if cfg.fp8 is not None else dtype)
  if cfg.fp8 is None:
    return Prepared(value=value, **form)
  lead, width = w.shape[:num_lead], math.prod(w.shape[num_lead : num_lead + num_in])
  codes, scale = fp8.quantize_blocks(value.reshape(*lead, width, -1), cfg.fp8)
  return Prepared(value=codes.reshape(w.shape), scale=scale, **form)


def prepare(
  cfg: QuantConfig | None, params: types.Params, dtype: Any
) -> Callable[[types.Params], types.Params]:
  """Quantises `params` once; the result puts latents beside what was prepared of them.

  `attach = prepare(cfg, params, dtype)`, then `attach(params)` is the tree that the model takes and
  that is differentiated with respect to its argument.
  """
  if not is_active(cfg):
    return lambda latents: latents
  found = {}
  for path, w in tree.selected(cfg, params).items():
    if tree.is_table(path) or path == "lm_head/kernel":
      check_running_only(cfg, path)
    num_in, num_lead = tree.layout(path)
    found[path] = prepare_kernel(cfg, path, w, num_in=num_in, num_lead=num_lead, dtype=dtype)

  def attach(latents: types.Params) -> types.Params:
    def one(path: str, w: Any) -> Any:
      return found[path].replace(latent=w) if path in found else w

    return trees.map_with_path(one, latents)

  return attach


def check_running_only(cfg: QuantConfig | None, path: str) -> None:
  """Refuses training of a quantised embedding or head: they are rounded for running alone."""
  if is_active(cfg) and cfg.weights == "latent" and cfg.selects(path):
    raise ValueError(
      f"{path}: quant.include selects it with weights 'latent', expected projections alone (the "
      "embedding and the head are rounded for running: quant.tree.quantize_head)"
    )


def check_not_latent(cfg: QuantConfig | None) -> None:
  """Refuses latent weights where those of the forward pass are meant: scaled or turned ones get
  other codes."""
  if cfg is not None and cfg.scheme != "none" and cfg.weights == "latent":
    raise ValueError(
      f"model.quant: found latent weights of scheme {cfg.scheme!r}, expected what the forward pass "
      "makes of them (models.convert.fuse), or their own codes (models.convert.to_codes)"
    )


def view(
  cfg: QuantConfig | None, path: str, w: Any, *, num_in: int, num_lead: int = 0, dtype: Any
) -> Any:
  """What the matmul gets for the leaf `w` at `path`: as it is, or prepared on the spot."""
  if qtensor.is_qtensor(w) and cfg is not None and cfg.act_bits is not None:
    return w.replace(act_bits=cfg.act_bits) if tree.selects(cfg, path) else w
  if is_leaf(w) or not is_active(cfg) or not cfg.selects(path):
    return w
  if path == "lm_head/kernel":
    check_running_only(cfg, path)
  return prepare_kernel(cfg, path, w, num_in=num_in, num_lead=num_lead, dtype=dtype)


# --- Using ---------------------------------------------------------------------------------------


def as_array(kernel: Any, dtype: Any) -> Float[types.AnyArray, "..."]:
  """A kernel as floats in `dtype` (experts, kv_b, sequences cut over cp), not of FP8."""
  if not is_leaf(kernel):
    return kernel.astype(dtype)
  for name in ("fp8", "act_bits"):
    if (found := getattr(kernel, name, None)) is not None:
      raise NotImplementedError(
        f"quant.{name}: found {found} for a kernel that is not used as one matrix product "
        "(experts, kv_b, a sequence cut over cp), expected None"
      )
  if qtensor.is_qtensor(kernel):
    return qtensor.dequantize(kernel, dtype)
  value = kernel.value
  if kernel.scale is not None:
    lead = kernel.scale.shape[:-2]
    flat = value.reshape(*lead, -1, kernel.scale.shape[-1])
    value = (flat.astype(jnp.float32) * kernel.scale).reshape(value.shape)
  return straight_through(kernel.latent, value.astype(dtype))


def matmul(x_MK: Float[types.AnyArray, "M K"], kernel: Prepared) -> Float[types.AnyArray, "M N"]:
  """x times the quantised kernel in x's dtype, with the straight-through gradient."""
  K = x_MK.shape[1]
  if kernel.act_bits is not None:
    x_MK = straight_through(x_MK, qtensor.fake_rows(jax.lax.stop_gradient(x_MK)))
  flat = [a.reshape(K, -1) for a in (kernel.latent, kernel.value)]
  if kernel.fp8 is not None:
    return fp8.linear(x_MK, *flat, kernel.scale, kernel.fp8)
  if kernel.scale is not None:
    return scaled_matmul(x_MK, *flat, kernel.scale)
  return jnp.matmul(x_MK, straight_through(*flat).astype(x_MK.dtype))


@jax.custom_vjp
def scaled_matmul(
  x_MK: Float[types.AnyArray, "M K"],
  latent_KN: Float[types.AnyArray, "K N"],
  codes_KN: Float[types.AnyArray, "K N"],
  scale_1N: Float[types.AnyArray, "1 N"],
) -> Float[types.AnyArray, "M N"]:
  """(x @ codes) * scale, sums and scale in float32; d latent = x^T dy.

  Where x is of 16 bits and not on a CPU, the sums are rounded to x's type before they are scaled:
  a product's result is written to memory there, and float32 ones cost more than the scale.
  """
  return _scaled_forward(x_MK, latent_KN, codes_KN, scale_1N)[0]


def _scaled_forward(x_MK: Any, latent_KN: Any, codes_KN: Any, scale_1N: Any) -> Any:
  written = jnp.float32 if jax.default_backend() == "cpu" else x_MK.dtype
  sums_MN = jnp.matmul(x_MK, codes_KN, preferred_element_type=written)
  y_MN = sums_MN.astype(jnp.float32) * scale_1N
  return y_MN.astype(x_MK.dtype), (x_MK, codes_KN, scale_1N, jnp.zeros((), latent_KN.dtype))


def _scaled_backward(saved: Any, dy_MN: Any) -> Any:
  x_MK, codes_KN, scale_1N, like = saved
  scaled_MN = (dy_MN.astype(jnp.float32) * scale_1N).astype(dy_MN.dtype)
  dx_MK = jnp.matmul(scaled_MN, codes_KN.T, preferred_element_type=jnp.float32)
  dw_KN = jnp.matmul(x_MK.T, dy_MN, preferred_element_type=jnp.float32)
  return dx_MK.astype(x_MK.dtype), dw_KN.astype(like.dtype), None, None


scaled_matmul.defvjp(_scaled_forward, _scaled_backward)


fake_rows = qtensor.fake_rows  # rounds the rows of a matrix to 8 bits


# --- Health --------------------------------------------------------------------------------------


def health(
  cfg: QuantConfig | None, old: types.Params, new: types.Params
) -> dict[str, tuple[Float[types.AnyArray, ""], float]]:
  """(sum, weight) of zero_share (of `old`) and flip_rate (codes that the update changed).

  Near a Gaussian the zero share of ternary weights is 0.31; empty where nothing is quantised.
  """
  if cfg is None or cfg.scheme == "none":
    return {}
  zeros = flips = jnp.float32(0)
  count, news = 0, tree.selected(cfg, new)
  for path, w in tree.selected(cfg, old).items():
    num_in, num_lead = tree.layout(path)
    quantize = functools.partial(quantize_latent, cfg, path, num_in=num_in, num_lead=num_lead)
    before, after = quantize(w).codes, quantize(news[path]).codes
    if not schemes.get(cfg.scheme).offset:  # code 0 of half-integers is 1/2
      zeros += jnp.sum(before == 0, dtype=jnp.float32)
    flips += jnp.sum(before != after, dtype=jnp.float32)
    count += math.prod(w.shape)
  return {"zero_share": (zeros, float(count)), "flip_rate": (flips, float(count))}
