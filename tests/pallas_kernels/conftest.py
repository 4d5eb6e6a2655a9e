"""What the tests of the Triton kernels need."""

import pytest

from pallas_kernels.common import gpu
from tests.pallas_kernels import triton_host


@pytest.fixture
def triton_installed():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  pytest.importorskip("jax_triton", reason="jax-triton needs jax's CUDA plugin (make test)")


@pytest.fixture
def on_the_host(monkeypatch):
  """Launches of Triton kernels go to Triton's interpreter (a process with TRITON_INTERPRET=1)."""
  monkeypatch.setattr(gpu, "launch", triton_host.launch)
  monkeypatch.setattr(gpu, "check_cuda", lambda *_, **__: None)
