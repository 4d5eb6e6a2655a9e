"""Activations times packed ternary weights behind one function; see `matmul`.

The bodies are those of `w4a16_gemm` with two bits a code (quantization.md section 10).
"""

from pallas_kernels.common import spec
from pallas_kernels.w4a16_gemm import api

OP = "ternary_gemm"
CODE = dict(bits=2, low=-1)


def matmul(
  x_MK,
  codes_RN,
  scale_QN,
  *,
  group_size: int = -1,
  implementation: spec.Implementation = "auto",
  config: api.Config | None = None,
  interpret: bool | None = None,
  out_dtype=None,
):
  """x [M, K] times a kernel [K, N] of codes -1, 0, 1, in `out_dtype` (None: x's), sums in float32.

    y[m, n] = scale[n] * sum_k x[m, k] * code[k, n]      (group_size -1: the scale after the sum)

  codes_RN: uint8 [ceil(K / 4), N]; byte r holds inputs 4r .. 4r + 3, the first in its lowest two
    bits, each as code + 1. The value 3 is no code and is not looked for here.
  scale_QN: floats [1, N], or [K / g, N] for groups of g consecutive inputs.

  Errors, gradients, `config` and `interpret` as `w4a16_gemm.api.matmul`; triton serves groups of a
  multiple of 64, mosaic_gpu of 256. At few rows bound by the K N / 4 bytes of codes.
  """
  options = dict(group_size=group_size, config=config, interpret=interpret, out_dtype=out_dtype)
  return api.serve(OP, CODE, (x_MK, codes_RN, scale_QN, None), implementation, **options)
