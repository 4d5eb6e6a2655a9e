"""Values of the Triton kernels. Run by test_triton.py in a process with TRITON_INTERPRET=1."""

import importlib.util
import pathlib

import pytest

from pallas_kernels.common import gpu
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention import triton as attention
from pallas_kernels.sparse_decode import triton as decoding
from pallas_kernels.sparse_topk import triton as topk


def load(name):
  path = pathlib.Path(__file__).with_name(f"{name}.py")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


host, suite = load("triton_host"), load("sparse_suite")


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
  monkeypatch.setattr(gpu, "launch", host.launch)
  monkeypatch.setattr(gpu, "check_cuda", lambda *_: None)


@pytest.mark.parametrize("selection, lse", [("joint", "exact"), ("split", "coarse")])
def test_select(selection, lse):
  config = topk.TritonConfig(block_q=4, block_c=16)
  suite.check_select(
    lambda *a: topk.select_triton(*a, config=config), suite.small_rule(selection, lse)
  )


@pytest.mark.parametrize("selection, lse", [("joint", "coarse"), ("split", "exact")])
def test_select_packed(selection, lse):
  config = topk.TritonConfig(block_q=2, block_c=4, max_score_bytes=4 * 2 * 8 * 24)
  suite.check_select_packed(
    lambda *a: topk.select_triton(*a, config=config), suite.small_rule(selection, lse)
  )


@pytest.mark.parametrize("num_local", [0, 2])
def test_attend(num_local):
  config = attention.TritonConfig(run_queries=16, kv_rows=16, band_rows=32, band_keys=32)
  suite.check_attend(
    lambda *a, **kw: attention.attend_triton(*a, config=config, **kw), num_local=num_local
  )


def test_attend_backward_on_residuals_of_mosaic_gpu():
  config = mosaic_gpu.MosaicGpuConfig(backward="triton")
  suite.check_attend(
    lambda *a, **kw: mosaic_gpu.attend_mosaic_gpu(*a, config=config, **kw), num_local=2, T=37, H=16
  )


def test_decode():
  config = decoding.TritonConfig(num_splits=2)
  for layout in suite.LAYOUTS:
    suite.check_decode(lambda *a, **kw: decoding.decode_triton(*a, config=config, **kw), layout)
