"""Activations times 8-bit weights: `matmul` (packed), `matmul_by_output` (the other order)."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common import spec
from pallas_kernels.w4a16_gemm import packed, ref
from pallas_kernels.w4a16_gemm import xla as packed_xla
from pallas_kernels.w8a16_gemm import xla

OP = "w8a16_gemm"
CODE = dict(bits=8, low=-127)


def matmul(
  x_MK,
  codes_KN,
  scale_QN,
  *,
  group_size: int = -1,
  implementation: Literal["auto", "xla", "ref"] = "auto",
  out_dtype=None,
):
  """x [M, K] times a kernel [K, N] of 8-bit codes, in `out_dtype` (None: x's); sums are float32.

    y[m, n] = sum_k x[m, k] * scale[k // g, n] * code[k, n]

  codes_KN: uint8 [K, N], code + 127 with code in -127..127 (255 is no code, not looked for here).
  scale_QN: floats [K / g, N] for groups of g consecutive inputs, or [1, N] for group_size -1.

  ValueError: shapes or types that do not fit one another, named. NotImplementedError: another
  implementation than these (no kernel of its own on GPU or TPU). Differentiable in x and scale.
  At few rows bound by the K N bytes of codes.
  """
  packed.check(OP, CODE["bits"], x_MK, codes_KN, scale_QN, None, group_size)
  args = (x_MK, codes_KN, scale_QN)
  code = {**CODE, "out_dtype": packed.out_dtype(OP, x_MK, out_dtype)}
  return spec.dispatch(
    OP,
    implementation,
    {
      "ref": lambda: ref.matmul_ref(*args, **code),
      "xla": lambda: packed_xla.matmul_xla(*args, **code),
    },
  )


def matmul_by_output(
  x_MK,
  codes_NK,
  scale_1N,
  *,
  implementation: Literal["auto", "xla", "ref"] = "auto",
  out_dtype=None,
):
  """x [M, K] times a kernel whose outputs come first, one scale an output; sums are float32.

    y[m, n] = scale[n] * sum_k x[m, k] * code[n, k]

  codes_NK: int8 [N, K], -127..127. scale_1N: floats [1, N]. Up to 32 rows on a CPU are multiplied
  as integers (`xla`). Errors and gradients as of `matmul`.
  """
  if x_MK.ndim != 2 or not jnp.issubdtype(x_MK.dtype, jnp.floating):
    raise ValueError(f"{OP}: x: found {x_MK.dtype}{list(x_MK.shape)}, expected floats [M, K]")
  if codes_NK.ndim != 2 or codes_NK.dtype != jnp.int8 or codes_NK.shape[1] != x_MK.shape[1]:
    found = f"{codes_NK.dtype}{list(codes_NK.shape)}"
    raise ValueError(f"{OP}: codes: found {found}, expected int8[N, {x_MK.shape[1]}]")
  want = (1, codes_NK.shape[0])
  if scale_1N.shape != want or not jnp.issubdtype(scale_1N.dtype, jnp.floating):
    found = f"{scale_1N.dtype}{list(scale_1N.shape)}"
    raise ValueError(f"{OP}: scale: found {found}, expected floats {list(want)}")
  out_dtype = packed.out_dtype(OP, x_MK, out_dtype)
  args = (x_MK, codes_NK, scale_1N)
  return spec.dispatch(
    OP,
    implementation,
    {
      "ref": lambda: _by_output_ref(*args, out_dtype),
      "xla": lambda: xla.matmul_xla(*args, out_dtype=out_dtype),
    },
  )


def _by_output_ref(x_MK, codes_NK, scale_1N, out_dtype):
  w_KN = codes_NK.T.astype(jnp.float32) * scale_1N.astype(jnp.float32)
  y_MN = jnp.matmul(x_MK.astype(jnp.float32), w_KN, precision=jax.lax.Precision.HIGHEST)
  return y_MN.astype(out_dtype)
