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
