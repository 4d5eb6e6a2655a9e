"""Values of the packed matmul kernel. Run by its test in a process with TRITON_INTERPRET=1."""

import functools

import pytest

from pallas_kernels.common import gpu
from pallas_kernels.ternary_gemm import cases as ternary_cases
from pallas_kernels.w4a16_gemm import cases, triton
from tests.pallas_kernels import packed_suite as suite
from tests.pallas_kernels import triton_host as host

CASES = {f"int4_{name}": (case, 4, 32) for name, case in cases.TINY.items()}
CASES |= {f"ternary_{name}": (case, 2, 64) for name, case in ternary_cases.TINY.items()}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
  monkeypatch.setattr(gpu, "launch", host.launch)
  monkeypatch.setattr(gpu, "check_cuda", lambda *_, **__: None)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_packed(name, splits):
  case, bits, block_k = CASES[name]
  config = triton.TritonConfig(block_n=32, block_k=block_k, num_splits=splits)
  suite.check(functools.partial(triton.matmul_triton, config=config), case, bits)
