"""Code books of the weight schemes (quantization.md 1.1, 3): scale rule, codes, values.

| scheme  | scale s of a group     | codes q                        | value     | bits |
|---------|------------------------|--------------------------------|-----------|------|
| ternary | max(mean abs W, eps)   | clip(round(W/s), -1, 1)        | s q       | 2    |
| asym    | max abs W / 1.5        | clip(round(W/s), -2, 1)        | s q       | 2    |
| half    | max abs W / 1.5        | clip(round(W/s - 1/2), -2, 1)  | s (q+1/2) | 2    |
| sym     | max abs W / 2          | sign(W) clip(round W/s, 1, 2)  | s q       | 4    |
| five    | max abs W / 2          | clip(round(W/s), -2, 2)        | s q       | 4    |
| int4    | max abs W / 7.5        | clip(round(W/s), -8, 7)        | s q       | 4    |
| int8    | max abs W / 127        | clip(round(W/s), -127, 127)    | s q       | 8    |

Rounding is half to even. ternary is BitCPM4's, the four others with few values are the ablation of
BitCPM-CANN 3.1, int4 is GPTQ's symmetric grid. Scales are statistics of float32 values.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minicpm_jax.core import types

EPS = 1e-8  # least scale; not printed in the paper


@dataclasses.dataclass(frozen=True)
class Scheme:
  """A code book; `divisor` None means the mean of |W|, else s = max |W| / divisor."""

  name: str
  low: int
  high: int
  bits: int
  divisor: float | None = None
  offset: float = 0.0
  has_zero: bool = True  # sym has no code 0

  def scale(
    self, w: Float[types.AnyArray, "*lead Q g out"]
  ) -> Float[types.AnyArray, "*lead Q 1 out"]:
    """float32 scale of every group (third axis from the end is groups, second its channels)."""
    size = jnp.abs(w.astype(jnp.float32))
    if self.divisor is None:
      return jnp.maximum(jnp.mean(size, axis=-2, keepdims=True), EPS)
    # The largest weight is on a tie (1.5 or 7.5 scales): the last bit of s decides its code.
    return jnp.maximum(quotient(jnp.max(size, axis=-2, keepdims=True), self.divisor), EPS)

  def codes(
    self, w: Float[types.AnyArray, "*lead Q g out"], scale: Float[types.AnyArray, "*lead Q 1 out"]
  ) -> Float[types.AnyArray, "*lead Q g out"]:
    """Codes as float32 integers for given scales; a scale of 0 gives the code nearest to 0."""
    scale = jnp.where(scale > 0, scale, jnp.inf)
    if self.divisor is not None and self.divisor % 1:  # the largest weight's tie, as in `quotient`
      scale = jax.lax.optimization_barrier(jnp.broadcast_to(scale, w.shape))
    ratio = w.astype(jnp.float32) / scale
    if not self.has_zero:
      size = jnp.clip(jnp.round(jnp.abs(ratio)), 1, self.high)
      return jnp.where(ratio < 0, -size, size)
    return jnp.clip(jnp.round(ratio - self.offset), self.low, self.high)

  @property
  def dtype(self) -> jnp.dtype:
    """Storage of one unpacked code."""
    return jnp.dtype(jnp.int4 if self.name == "int4" else jnp.int8)


SCHEMES: dict[str, Scheme] = {
  s.name: s
  for s in (
    Scheme("ternary", -1, 1, 2),
    Scheme("asym", -2, 1, 2, divisor=1.5),
    Scheme("half", -2, 1, 2, divisor=1.5, offset=0.5),
    Scheme("sym", -2, 2, 4, divisor=2.0, has_zero=False),
    Scheme("five", -2, 2, 4, divisor=2.0),
    Scheme("int4", -8, 7, 4, divisor=7.5),
    Scheme("int8", -127, 127, 8, divisor=127.0),
  )
}


def quotient(x: Float[Array, "*s"], divisor: float | int) -> Float[Array, "*s"]:
  """x / divisor, correctly rounded: by a scalar XLA multiplies with its reciprocal, an ulp off."""
  return x / jax.lax.optimization_barrier(jnp.full_like(x, divisor))


def get(name: str) -> Scheme:
  if name not in SCHEMES:
    raise ValueError(f"scheme: found {name!r}, expected one of {list(SCHEMES)}")
  return SCHEMES[name]


def group_count(num_in: int, group_size: int, name: str = "kernel") -> int:
  """Groups along `num_in` input channels; a size that does not divide is refused."""
  if num_in < 1:
    raise ValueError(f"{name}: found {num_in} inputs, expected 1 or more")
  is_whole = isinstance(group_size, int) and not isinstance(group_size, bool)
  if is_whole and group_size == -1:
    return 1
  if not is_whole or group_size <= 0 or num_in % group_size:
    raise ValueError(
      f"{name}: group_size: found {group_size!r}, expected -1 or a divisor of {num_in} inputs"
    )
  return num_in // group_size
