"""Values of the packed matmul kernel. Run by its test in a process with TRITON_INTERPRET=1."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.ternary_gemm import cases as ternary_cases
from pallas_kernels.w4a16_gemm import cases, matvec, triton
from tests.pallas_kernels import packed_suite as suite
from tests.pallas_kernels import ptx_host

CASES = {f"int4_{name}": (case, 4, 32) for name, case in cases.TINY.items()}
CASES |= {f"ternary_{name}": (case, 2, 64) for name, case in ternary_cases.TINY.items()}


pytestmark = pytest.mark.usefixtures("on_the_host")


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_packed(name, splits):
  case, bits, block_k = CASES[name]
  config = triton.TritonConfig(block_n=32, block_k=block_k, num_splits=splits)
  suite.check(functools.partial(triton.matmul_triton, config=config), case, bits)


MATVEC = {  # (bits, case, config): one and several groups a warp, splits, no whole tile
  "int4_groups": (4, cases.Case(rows=1, num_in=512, num_out=144), dict(num_warps=2)),
  "int4_zero": (
    4,
    cases.Case(rows=1, num_in=768, num_out=128, group_size=96, has_zero=True),
    dict(num_splits=2, num_warps=4, unroll=2),
  ),
  "int4_channel": (
    4,
    cases.Case(rows=1, num_in=1280, num_out=80, group_size=-1, has_zero=True),
    dict(num_warps=1, unroll=8),
  ),
  "int4_eight_warps": (
    4,
    cases.Case(rows=1, num_in=1536, num_out=48, group_size=-1),
    dict(num_warps=8),
  ),
  "ternary_channel": (
    2,
    cases.Case(rows=1, num_in=1280, num_out=64, group_size=-1),
    dict(num_warps=8),
  ),
  "ternary_groups": (2, cases.Case(rows=1, num_in=1024, num_out=128), dict(num_warps=4)),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", MATVEC)
def test_packed_matvec(name, dtype, monkeypatch):
  from triton.runtime import interpreter

  bits, case, config = MATVEC[name]
  config = matvec.MatvecConfig(**config)
  monkeypatch.setattr(
    interpreter.InterpreterBuilder, "create_inline_asm", ptx_host.create_inline_asm
  )
  backend = functools.partial(triton.matmul_triton, config=config)
  suite.check(backend, case, bits, dtype)
  # Where the bar of 16 bits says little: the interpreter cuts float32 to them without rounding.
  if name in ("int4_groups", "int4_eight_warps") and dtype == jnp.bfloat16:
    suite.check_wide(backend, case, bits, bar=1e-5)
