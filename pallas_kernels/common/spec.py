"""Which backend serves a call of an op (style.md 2.7)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import numpy as np

Implementation = Literal["auto", "mosaic_gpu", "triton", "mosaic_tpu", "xla", "ref"]
Result = TypeVar("Result")

_AUTO = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}


def dispatch(op: str, implementation: str, servers: dict[str, Callable[[], Result]]) -> Result:
  """Result of the named server, or for `auto` of the first that does not refuse the call.

  A server refuses by NotImplementedError with the reason. `auto` tries the kernels of the platform
  in the order of `servers`, which is the op's (the fastest on a device first), then xla.
  """
  if implementation != "auto":
    if implementation not in servers:
      raise NotImplementedError(f"{op}: no {implementation!r}, expected auto or {sorted(servers)}")
    return servers[implementation]()
  for name, serve in servers.items():
    if name in _AUTO.get(jax.default_backend(), ()):
      try:
        return serve()
      except NotImplementedError:
        continue
  return servers["xla"]()


def configs(
  op: str, implementation: str, config: Any, **classes: type | tuple[type, ...]
) -> dict[str, Any]:
  """Server -> `config` where it is of the server's class or classes, else None: its own tiles.

  `classes` are of the servers that take a config. With `auto` it is one of theirs, which the others
  that are tried do not get; a named server takes its own alone. TypeError for any other.
  """
  served = {n: c for n, c in classes.items() if implementation in ("auto", n)}
  if config is not None and not isinstance(config, tuple(served.values())):
    kinds = {k for c in served.values() for k in (c if isinstance(c, tuple) else (c,))}
    expected = " or ".join(["None", *sorted(_full_name(k) for k in kinds)])
    raise TypeError(
      f"{op}: config: found {_full_name(type(config))}, expected {expected} with implementation "
      f"{implementation!r}"
    )
  return {n: config if isinstance(config, c) else None for n, c in classes.items()}


def check_shape(op: str, name: str, x: Any, expected: tuple[int | None, ...]) -> None:
  """ValueError where x, if there is one, has another shape; None stands for any size."""
  found = expected if x is None else np.shape(x)
  is_same = len(found) == len(expected)
  if not is_same or any(e not in (None, f) for f, e in zip(found, expected, strict=True)):
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    raise ValueError(f"{op}: {name}: found shape {found}, expected ({sizes})")


def check_heads(op: str, num_heads: int, num_kv_heads: int) -> None:
  if num_kv_heads == 0 or num_heads % num_kv_heads:
    raise ValueError(
      f"{op}: q: found {num_heads} heads, expected a multiple of the {num_kv_heads} key heads"
    )


def requested(config: Any, interpret: bool | None) -> Any:
  """`config` with the `interpret` that the call asks for; None leaves the config's own."""
  return config if interpret is None else dataclasses.replace(config, interpret=interpret)


def _full_name(kind: type) -> str:
  return f"{kind.__module__}.{kind.__qualname__}"
