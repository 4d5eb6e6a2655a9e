"""Gradients of the packed matmuls on backends that have none of their own: those of the XLA form.

Kept for the backward pass: the arguments alone, all of them alive anyway. In x and the scales;
codes and zero points are integers.
"""

import functools

import jax

from pallas_kernels.w4a16_gemm import xla


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def matmul(forward, bits: int, low: int, x_MK, codes_RN, scale_QN, zero_QN):
  """forward(x, codes, scale, zero)."""
  del bits, low
  return forward(x_MK, codes_RN, scale_QN, zero_QN)


def _forward(forward, bits, low, *arrays):
  return matmul(forward, bits, low, *arrays), arrays


def _backward(forward, bits, low, arrays, dy_MN):
  del forward
  _, pull = jax.vjp(functools.partial(xla.matmul_xla, bits=bits, low=low), *arrays)
  return pull(dy_MN.astype(arrays[0].dtype))


matmul.defvjp(_forward, _backward)
