"""Values of the packed matmul kernel. Run by its tests in a process with TRITON_INTERPRET=1."""

import functools
import importlib.util
import pathlib

import pytest

from pallas_kernels.common import gpu
from pallas_kernels.ternary_gemm import cases as ternary_cases
from pallas_kernels.w4a16_gemm import cases, triton


def load(name):
  path = pathlib.Path(__file__).with_name(f"{name}.py")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


host, suite = load("triton_host"), load("packed_suite")


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
  monkeypatch.setattr(gpu, "launch", host.launch)
  monkeypatch.setattr(gpu, "check_cuda", lambda *_: None)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", cases.TINY)
def test_w4a16(name, splits):
  config = triton.TritonConfig(block_n=32, block_k=32, num_splits=splits)
  suite.check(functools.partial(triton.matmul_triton, config=config), cases.TINY[name], 4)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ternary_cases.TINY)
def test_ternary(name, splits):
  config = triton.TritonConfig(block_n=32, block_k=64, num_splits=splits)
  suite.check(functools.partial(triton.matmul_triton, config=config), ternary_cases.TINY[name], 2)
