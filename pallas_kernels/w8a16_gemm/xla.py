"""Rows times 8-bit weights stored with their outputs first, in XLA.

On a CPU few rows are multiplied as integers. A row is three digits,

  x = s (d0 + d1 / 254 + d2 / 254^2),  s = max |x| / 127,  digits in -127..127

which leaves 2^-24 of its largest value, as float32 does. XLA gives int8 products of two rows or
more to a library (YNNPACK) that uses the CPU's instructions for them; one row, or unsigned codes,
it multiplies one number at a time. One pass over the weights, a byte each, serves all digits; the
sums are exact, so a row's result does not depend on the rows beside it.
"""

import functools

import jax
import jax.numpy as jnp

DIGITS = 3
MAX_ROWS = 32  # of more the products in float32 take less time than three in integers
_BASE = 254.0  # a rest of -1/2..1/2 becomes a digit of -127..127
_MAX_IN = 2**31 // 127**2  # inputs whose sum int32 holds


@functools.cache
def has_integer_library() -> bool:
  """Whether this XLA gives int8 products on the CPU to a library (read off a compiled one)."""
  x, w = jax.ShapeDtypeStruct((2, 64), jnp.int8), jax.ShapeDtypeStruct((64, 64), jnp.int8)
  return "ynn_fusion" in jax.jit(_dot).lower(x, w).compile().as_text()


def serves(x_MK) -> bool:
  """True for few rows on a CPU whose XLA has products of integers worth using."""
  is_few = 0 < x_MK.shape[0] <= MAX_ROWS and x_MK.shape[1] <= _MAX_IN
  return is_few and jax.default_backend() == "cpu" and has_integer_library()


def matmul_xla(x_MK, codes_NK, scale_1N, *, out_dtype=None):
  """As `api.matmul_by_output`."""
  if serves(x_MK):
    y_MN = integer_products(x_MK.astype(jnp.float32), codes_NK)
  else:
    precision = jax.lax.Precision.HIGHEST if x_MK.dtype == jnp.float32 else None
    y_MN = _dot(x_MK, codes_NK.astype(x_MK.dtype), jnp.float32, precision)
  return (y_MN * scale_1N.astype(jnp.float32)).astype(out_dtype or x_MK.dtype)


@jax.custom_vjp
def integer_products(x_MK, codes_NK):
  """x [M, K] float32 times codes int8 [N, K], summed over k: [M, N] float32. A row that is not
  finite gives one that is not."""
  scale_M1 = jnp.max(jnp.abs(x_MK), axis=1, keepdims=True) * (1.0 / 127)
  rest_MK, digits = x_MK / jnp.where(scale_M1 == 0, 1.0, scale_M1), []
  for _ in range(DIGITS):
    digit_MK = jnp.rint(rest_MK)
    digits.append(digit_MK.astype(jnp.int8))
    rest_MK = (rest_MK - digit_MK) * _BASE
  # Not fused into the product, which would then be XLA's own.
  rows_PK = jax.lax.optimization_barrier(jnp.concatenate(digits))
  y_DMN = jnp.reshape(_dot(rows_PK, codes_NK), (DIGITS, *x_MK.shape[:1], -1)).astype(jnp.float32)
  return ((y_DMN[2] / _BASE + y_DMN[1]) / _BASE + y_DMN[0]) * scale_M1


def _forward(x_MK, codes_NK):
  return integer_products(x_MK, codes_NK), codes_NK


def _backward(codes_NK, dy_MN):
  return jnp.matmul(dy_MN, codes_NK.astype(dy_MN.dtype)), None


integer_products.defvjp(_forward, _backward)


def _dot(x_MK, codes_NK, sums=jnp.int32, precision=None):
  dims = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(x_MK, codes_NK, dims, precision=precision, preferred_element_type=sums)
