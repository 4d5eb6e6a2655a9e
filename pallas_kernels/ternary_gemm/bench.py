"""Ternary matmuls of MiniCPM4's shapes: `python -m pallas_kernels.ternary_gemm.bench`.

Timed as `w4a16_gemm.bench` says.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.ternary_gemm import api, cases
from pallas_kernels.w4a16_gemm import bench

TERNARY = bench.Op(
  name=api.OP,
  matmul=api.matmul,
  bits=2,
  low=-1,
  high=1,
  scale_of=lambda size: jnp.mean(size, axis=1, keepdims=True),
)

main = functools.partial(bench.main, op=TERNARY, shapes=cases.REAL)

if __name__ == "__main__":
  main()
