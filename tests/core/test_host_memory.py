"""Kept host memory: a freed large block is handed out again without new pages."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from minicpm_jax.core import host_memory

if sys.argv[1] == "keep" and not host_memory.keep():
  print("unsupported")
  sys.exit()
for _ in range(3):
  np.ones(2**25)  # 256 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  np.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> str:
  command = [sys.executable, "-c", PROGRAM, mode]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_freed_block_is_used_again():
  kept = page_faults("keep")
  if kept == "unsupported":
    pytest.skip("the C library is not glibc")
  plain = int(page_faults("plain"))
  assert int(kept) < 50
  assert plain > 20 * max(int(kept), 1)
