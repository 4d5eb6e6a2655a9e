"""Values of the k largest in Triton. Run by its test in a process with TRITON_INTERPRET=1."""

import pytest

from pallas_kernels.vocab_topk import triton
from tests.pallas_kernels import test_vocab_topk as suite

pytestmark = pytest.mark.usefixtures("on_the_host")


@pytest.mark.parametrize("values", ["few", "forbidden", "zeros"])
def test_vocab_topk(values):
  suite.check(triton.top_k_triton, values, V=3001, k=5)
