"""Block-scaled FP8 product behind one function; see `matmul`."""

import jax.numpy as jnp

from pallas_kernels.common import spec
from pallas_kernels.fp8_gemm import mosaic_gpu, ref, triton, xla

OP = "fp8_gemm"
BLOCK = ref.BLOCK
TYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def matmul(
  xq_MK,
  xs_MQ,
  wq_KN,
  ws_QP,
  *,
  out_dtype=jnp.float32,
  implementation: spec.Implementation = "auto",
  config: triton.TritonConfig | mosaic_gpu.MosaicGpuConfig | None = None,
  interpret: bool | None = None,
):
  """y [M, N] of rows in 1 x 128 tiles and a matrix in 128 x 128 blocks (MiniCPM4 section 2.3.2).

    y[m, n] = sum_q xs[m, q] ws[q, n // 128] sum_{k in block q} xq[m, k] wq[k, n]

  xq_MK, wq_KN: both float8_e4m3fn or both float8_e5m2; xs_MQ, ws_QP: float32 with Q =
  ceil(K / 128), P = ceil(N / 128); edges need not be whole blocks. Sums over blocks are float32;
  inside a block, those of the tensor cores (float32 in `ref` and `xla`).

  GPUs want both operands contiguous along K, so their kernels read wq.T: a copy of one byte a
  weight that XLA makes, or none where the argument is itself a transpose (the input gradient).

  ValueError: shapes or types that do not fit one another, named. NotImplementedError: a named
  implementation that does not serve the call (`mosaic_gpu`: Hopper; `triton`: a CUDA device of
  compute capability 8.9 or later, as older ones have no FP8 tensor cores); `auto` takes the next.
  `config` is of the implementation of its class; others that `auto` tries take their own.
  `interpret` is of mosaic_gpu: None = on a CPU. Not differentiable: quantising is not (quant/fp8.py
  has the training rule). 2 M N K FLOPs.
  """
  check(xq_MK, xs_MQ, wq_KN, ws_QP)
  classes = dict(mosaic_gpu=mosaic_gpu.MosaicGpuConfig, triton=triton.TritonConfig)
  tiles = spec.configs(OP, implementation, config, **classes)
  args = (xq_MK, xs_MQ, wq_KN, ws_QP, out_dtype)
  return spec.dispatch(
    OP,
    implementation,
    {
      "ref": lambda: ref.matmul_ref(*args),
      "xla": lambda: xla.matmul_xla(*args),
      "mosaic_gpu": lambda: mosaic_gpu.matmul_mosaic_gpu(
        *args, config=tiles["mosaic_gpu"], interpret=interpret
      ),
      "triton": lambda: triton.matmul_triton(*args, config=tiles["triton"]),
    },
  )


def check(xq_MK, xs_MQ, wq_KN, ws_QP) -> None:
  """Raises ValueError naming the array, what was found and what was expected."""
  if xq_MK.ndim != 2 or xq_MK.dtype not in TYPES:
    raise ValueError(f"{OP}: x: found {_name(xq_MK)}, expected float8_e4m3fn or _e5m2 [M, K]")
  M, K = xq_MK.shape
  if wq_KN.ndim != 2 or wq_KN.shape[0] != K or wq_KN.dtype != xq_MK.dtype:
    raise ValueError(f"{OP}: w: found {_name(wq_KN)}, expected {xq_MK.dtype}[{K}, N]")
  Q, P = -(-K // BLOCK), -(-wq_KN.shape[1] // BLOCK)
  for name, scale, want in (("x scale", xs_MQ, (M, Q)), ("w scale", ws_QP, (Q, P))):
    if scale.shape != want or scale.dtype != jnp.float32:
      raise ValueError(f"{OP}: {name}: found {_name(scale)}, expected float32{list(want)}")


def _name(x) -> str:
  return f"{x.dtype}{list(x.shape)}"
