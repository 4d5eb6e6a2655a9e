"""Activations times packed 4-bit weights behind one function; see `matmul`."""

import functools

from pallas_kernels.common import spec
from pallas_kernels.w4a16_gemm import matvec, mosaic_gpu, packed, ref, triton, vjp, xla

OP = "w4a16_gemm"
Config = triton.TritonConfig | matvec.MatvecConfig | mosaic_gpu.MosaicGpuConfig
CODE = dict(bits=4, low=-8)


def matmul(
  x_MK,
  codes_RN,
  scale_QN,
  zero_QN=None,
  *,
  group_size: int = 128,
  implementation: spec.Implementation = "auto",
  config: Config | None = None,
  interpret: bool | None = None,
  out_dtype=None,
):
  """x [M, K] times a kernel [K, N] of 4-bit codes, in `out_dtype` (None: x's); sums are float32.

    y[m, n] = sum_k x[m, k] * scale[k // g, n] * (code[k, n] - zero[k // g, n])

  codes_RN: uint8 [ceil(K / 2), N]; byte r holds input 2r in its low four bits and 2r + 1 in its
    high ones, each as code + 8, code in -8..7.
  scale_QN: floats [K / g, N], or [1, N] for group_size -1 (one scale a channel).
  zero_QN: int8 like scale_QN; None = symmetric. Groups are consecutive inputs (no act order).

  ValueError: shapes or types that do not fit one another, named. NotImplementedError: a named
  implementation that does not serve the call (`mosaic_gpu`: Hopper, 16-bit floats, groups of a
  multiple of 128; `triton`: a CUDA device, float types, groups of a multiple of 32); `auto` takes
  the next, begins with triton for one row (`matvec`) and takes `xla` for more than 512 rows.
  `config` is of the implementation of its class; others that `auto` tries take their own.
  `interpret` is of mosaic_gpu: None = on a CPU, where it serves float32 too. Differentiable in x
  and scale (`vjp.py`). 2 M N K FLOPs; at few rows bound by the K N / 2 bytes of codes
  (quantization.md section 10).
  """
  options = dict(group_size=group_size, config=config, interpret=interpret, out_dtype=out_dtype)
  return serve(OP, CODE, (x_MK, codes_RN, scale_QN, zero_QN), implementation, **options)


def serve(
  op: str,
  code: dict,
  arrays: tuple,
  implementation: str,
  *,
  group_size,
  config,
  interpret,
  out_dtype,
):
  """The call of an op whose codes are of `code`: checks, then the implementation asked for."""
  packed.check(op, code["bits"], *arrays, group_size)
  on_triton_classes = (triton.TritonConfig, matvec.MatvecConfig)
  classes = dict(mosaic_gpu=mosaic_gpu.MosaicGpuConfig, triton=on_triton_classes)
  tiles = spec.configs(op, implementation, config, **classes)
  code = {**code, "out_dtype": packed.out_dtype(op, arrays[0], out_dtype)}
  options = dict(config=tiles["mosaic_gpu"], interpret=interpret)
  on_mosaic = functools.partial(mosaic_gpu.matmul_mosaic_gpu, op=op, **options, **code)
  on_triton = functools.partial(triton.matmul_triton, op=op, config=tiles["triton"], **code)
  if implementation == "auto" and arrays[0].shape[0] > mosaic_gpu.FEW:
    implementation = "xla"  # a float copy of the kernel, once, and the dense product
  kernels = {
    "mosaic_gpu": lambda: vjp.matmul(on_mosaic, code["bits"], code["low"], *arrays),
    "triton": lambda: vjp.matmul(on_triton, code["bits"], code["low"], *arrays),
    "ref": lambda: ref.matmul_ref(*arrays, **code),
    "xla": lambda: xla.matmul_xla(*arrays, **code),
  }
  if config is None and matvec.config_of(*arrays[:3], bits=code["bits"], op=op) is not None:
    kernels = {"triton": kernels.pop("triton"), **kernels}
  return spec.dispatch(op, implementation, kernels)
