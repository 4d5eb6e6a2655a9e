"""A float kernel stored with its outputs first, which XLA multiplies one row with fastest on a CPU.

With [in, out] every input's row of the kernel is added to all the sums; with [out, in] each sum is
one run through memory. Measured on two cores: as fast where memory is slow, up to a third faster
where it is fast. `models.joined` makes and undoes the form.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class OutputMajor:
  """`values` [*out, *in] of the kernel [*in, *out]; `shape` is the kernel's."""

  values: Any
  num_in: int = flax.struct.field(pytree_node=False, default=1)

  @property
  def shape(self) -> tuple[int, ...]:
    num_out = self.values.ndim - self.num_in
    return (*self.values.shape[num_out:], *self.values.shape[:num_out])

  @property
  def dtype(self) -> Any:
    return self.values.dtype

  @property
  def nbytes(self) -> int:
    return self.values.nbytes


def store(kernel: Float[Array, "*kernel"], num_in: int = 1) -> OutputMajor:
  """The kernel [*in, *out] with its outputs first."""
  axes = (*range(num_in, kernel.ndim), *range(num_in))
  return OutputMajor(jnp.transpose(kernel, axes), num_in)


def restore(kernel: OutputMajor) -> Float[Array, "*kernel"]:
  """The kernel [*in, *out] again, the same numbers."""
  num_out = kernel.values.ndim - kernel.num_in
  axes = (*range(num_out, kernel.values.ndim), *range(num_out))
  return jnp.transpose(kernel.values, axes)


def matmul(x_MK: Float[Array, "M K"], kernel: OutputMajor) -> Float[Array, "M N"]:
  """x times the kernel, both flattened to matrices, in x's dtype."""
  width = math.prod(kernel.shape[: kernel.num_in])
  values_NK = jnp.reshape(kernel.values, (-1, width)).astype(x_MK.dtype)
  return jax.lax.dot_general(x_MK, values_NK, (((1,), (1,)), ((), ())))
