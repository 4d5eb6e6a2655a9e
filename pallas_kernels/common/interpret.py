"""Whether a Pallas kernel runs in interpret mode."""

import jax


def is_interpreted(op: str, interpret: bool | None, platform: str) -> bool:
  """None: interpret on a CPU; on `platform` run; elsewhere refuse by NotImplementedError."""
  if interpret is not None:
    return interpret
  backend = jax.default_backend()
  if backend not in ("cpu", platform):
    raise NotImplementedError(f"{op}: needs a {platform}, the default backend is {backend}")
  return backend == "cpu"


def gpu_params():
  """What `plgpu.kernel(interpret=...)` takes to simulate a GPU: shared memory, copies, barriers."""
  try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
  except ImportError:  # jax 0.10 keeps it private
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
  return InterpretGPUParams()


def has_transposed_references() -> bool:
  """Whether the GPU interpreter can give wgmma a transposed reference (jax 0.10 cannot)."""
  return jax.__version_info__ >= (0, 11)
