"""Elementwise and normalisation math of the family (models.md 3): arrays in, arrays out."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from minicpm_jax.nn import output_major
from minicpm_jax.quant import qat, qtensor

Act = Literal["silu", "fatrelu"]


def rms_norm(
  x: Float[Array, "*rows D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*rows D"]:
  """x * rsqrt(mean(x^2) + eps) in float32, cast to x's dtype, times `scale` (Llama's order)."""
  normed = _normalized(x, eps) if x.dtype == jnp.float32 else _recomputed_normalized(x, eps)
  return normed.astype(x.dtype) * jnp.reshape(scale.astype(x.dtype), (1,) * (x.ndim - 1) + (-1,))


def _normalized(x, eps: float):
  x32 = x.astype(jnp.float32)
  return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


# Of 16-bit inputs the backward pass keeps x, not the float32 values made of it.
_recomputed_normalized = jax.checkpoint(_normalized, static_argnums=1, prevent_cse=False)


def activation(
  x: Float[Array, "*shape"], act: Act, threshold: float = 0.0
) -> Float[Array, "*shape"]:
  """silu, or MiniCPM-S's FATReLU: x where x > threshold (strictly), else 0."""
  if act == "silu":
    return jax.nn.silu(x)
  return jnp.where(x > threshold, x, jnp.zeros_like(x))


def gated(
  gate: Float[Array, "*shape"], up: Float[Array, "*shape"], act: Act, threshold: float = 0.0
) -> Float[Array, "*shape"]:
  """act(gate) * up, the inner product of SwiGLU and of MiniCPM-S's FFN."""
  if act == "silu":
    return _gated_silu(gate, up)
  return activation(gate, act, threshold) * up


@jax.custom_vjp
def _gated_silu(gate, up):
  return jax.nn.silu(gate) * up


def _gated_silu_bwd(inputs, dout):
  """Keeps gate and up alone; the barrier has the sigmoid computed again, not stored and read."""
  gate, up = jax.lax.optimization_barrier(inputs)
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  return dout * up * (sigmoid + silu * (1 - sigmoid)), dout * silu


_gated_silu.defvjp(lambda gate, up: (_gated_silu(gate, up), (gate, up)), _gated_silu_bwd)


def linear(
  x: Float[Array, "*rows"],
  kernel: Num[Array, "*kernel"] | output_major.OutputMajor | qtensor.QTensor | qat.Prepared,
  num_in: int = 1,
) -> Float[Array, "*out"]:
  """Contracts the last `num_in` axes of x with the first of the kernel, in x's dtype.

  As one matrix product: XLA's CPU backend takes 1.6 times as long for a step whose products keep
  more axes. A sequence that is sharded (cp) keeps its axis, which joined rows could not express.
  """
  is_cut = jax.sharding.get_abstract_mesh().shape.get("cp", 1) > 1
  if isinstance(kernel, qtensor.QTensor) and not is_cut:
    return qtensor.matmul(x, kernel)
  is_turned = isinstance(kernel, output_major.OutputMajor)
  if is_cut:
    kernel = output_major.restore(kernel) if is_turned else kernel
    return jnp.tensordot(x, qat.as_array(kernel, x.dtype), axes=num_in)
  is_prepared = isinstance(kernel, qat.Prepared)
  shape = kernel.latent.shape if is_prepared else kernel.shape
  rows, out, width = x.shape[: x.ndim - num_in], shape[num_in:], math.prod(shape[:num_in])
  if is_turned:
    y = output_major.matmul(x.reshape(-1, width), kernel)
  elif is_prepared:
    y = qat.matmul(x.reshape(-1, width), kernel)
  else:
    y = jnp.matmul(x.reshape(-1, width), kernel.astype(x.dtype).reshape(width, -1))
  return y.reshape(*rows, *out)


def add_branch(
  x: Float[Array, "*shape"], branch: Float[Array, "*shape"], scale: float
) -> Float[Array, "*shape"]:
  """Residual stream plus the scaled branch output; the stream itself is never scaled."""
  return x + branch if scale == 1.0 else x + branch * scale


def unembed(
  hidden_BTD: Float[Array, "B T D"],
  head: Num[Array, "..."] | qtensor.QTensor,
  divisor: float,
  *,
  is_tied: bool,
) -> Float[Array, "B T V"]:
  """float32 logits of (hidden / divisor) @ W; the hidden state is divided, not the logits.

  `head` is the embedding table [V, D] when tied, else the head kernel [D, V]; or codes of it.
  """
  if divisor != 1.0:
    hidden_BTD = hidden_BTD / divisor
  if isinstance(head, qtensor.QTensor):
    return qtensor.matmul(hidden_BTD, head, jnp.float32)
  equation = "BTD,VD->BTV" if is_tied else "BTD,DV->BTV"
  return jnp.einsum(
    equation, hidden_BTD, head.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
  )
