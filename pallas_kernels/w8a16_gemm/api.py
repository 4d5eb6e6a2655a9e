"""Activations times 8-bit weights behind one function; see `matmul`."""

from typing import Literal

from pallas_kernels.common import spec
from pallas_kernels.w4a16_gemm import packed, ref, xla

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
      "xla": lambda: xla.matmul_xla(*args, **code),
    },
  )
