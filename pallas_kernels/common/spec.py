"""Which backend serves a call of an op (style.md 2.7)."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax

Implementation = Literal["auto", "mosaic_gpu", "triton", "mosaic_tpu", "xla", "ref"]
Result = TypeVar("Result")

_AUTO = {"gpu": ("mosaic_gpu", "triton", "xla"), "tpu": ("mosaic_tpu", "xla")}


def dispatch(op: str, implementation: str, servers: dict[str, Callable[[], Result]]) -> Result:
  """Result of the named server, or for `auto` of the first that does not refuse the call.

  A server refuses by NotImplementedError with the reason. `auto` tries, of those given:
  mosaic_gpu, triton, xla on CUDA; mosaic_tpu, xla on TPU; xla elsewhere.
  """
  if implementation != "auto":
    if implementation not in servers:
      raise NotImplementedError(f"{op}: no {implementation!r}, expected auto or {sorted(servers)}")
    return servers[implementation]()
  for name in _AUTO.get(jax.default_backend(), ("xla",)):
    if name == "xla":
      break
    if name in servers:
      try:
        return servers[name]()
      except NotImplementedError:
        continue
  return servers["xla"]()


def config_of(config_class: type[Result], config) -> Result | None:
  """`config` where it is of the class: a server that `auto` tries takes no other's tiles."""
  return config if isinstance(config, config_class) else None
