"""Runs the Triton kernels of pallas_kernels on the CPU, in Triton's interpreter.

Only in a process that sets TRITON_INTERPRET=1 before anything imports triton: `run_in_process`
starts a test file in one. float32 only (the interpreter's bf16 matmul is wrong).
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np


class HostBuffer:
  """A numpy array that Triton's interpreter accepts where it expects a torch tensor."""

  def __init__(self, array):
    self.array = np.ascontiguousarray(array)

  dtype = property(lambda self: self.array.dtype.name)
  shape = property(lambda self: self.array.shape)
  device = "cpu"

  def data_ptr(self):
    return self.array.ctypes.data

  def untyped_storage(self):
    return self

  def cpu(self):
    return self

  def storage_offset(self):
    return 0

  def size(self):
    return self.array.shape

  def stride(self):
    return tuple(n // self.array.itemsize for n in self.array.strides)

  def new_empty(self, n, device=None):
    return HostBuffer(np.empty(0, self.array.dtype))

  def set_(self, storage, offset, size, stride):
    self.array = storage.array

  def copy_(self, other):
    pass


def launch(
  kernel, *arrays, out_shape, grid, num_warps, num_stages, compute_capability=None, **sizes
):
  """`gpu.launch` on the host. Outputs start as garbage, as on a device."""

  def run(*values):
    shapes = jax.tree.leaves(out_shape)
    garbage = [np.full(s.shape, np.array(-77).astype(s.dtype)) for s in shapes]
    inputs, outputs = [HostBuffer(np.asarray(x)) for x in values], [HostBuffer(x) for x in garbage]
    kernel[grid](*inputs, *outputs, **sizes)
    return jax.tree.unflatten(jax.tree.structure(out_shape), [x.array for x in outputs])

  return jax.pure_callback(run, out_shape, *arrays)


def run_in_process(path: str, keyword: str) -> None:
  """Runs the tests of `path` that match `keyword` in a process of their own."""
  root = pathlib.Path(__file__).parents[2]
  environment = dict(os.environ, TRITON_INTERPRET="1", JAX_PLATFORMS="cpu", XLA_FLAGS="")
  command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-q"]
  command += ["-p", "no:cacheprovider", "--import-mode=importlib", path, "-k", keyword]
  done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
