"""Values of the FP8 kernel. Run by its test in a process with TRITON_INTERPRET=1."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.fp8_gemm import cases, triton
from tests.pallas_kernels import fp8_suite as suite

pytestmark = pytest.mark.usefixtures("on_the_host")


@pytest.mark.parametrize("block_n", [32, 128])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("name", cases.TINY)
def test_fp8(name, dtype, block_n):
  config = triton.TritonConfig(block_m=16, block_n=block_n)
  suite.check(functools.partial(triton.matmul_triton, config=config), cases.TINY[name], dtype)


def test_fp8_tiles_in_groups():
  """18 rows of tiles: a whole group and a lower one."""
  case = cases.Case(rows=280, num_in=128, num_out=40)
  config = triton.TritonConfig(block_m=16, block_n=16)
  suite.check(functools.partial(triton.matmul_triton, config=config), case)
