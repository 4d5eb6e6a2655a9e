"""What the tests of the Triton kernels need."""

import pytest


@pytest.fixture
def triton_installed():
  pytest.importorskip("triton", reason="triton is not installed (pip install minicpm_jax[gpu])")
  pytest.importorskip("jax_triton", reason="jax-triton needs jax's CUDA plugin (make test)")
