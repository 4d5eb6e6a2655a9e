"""Random keys by (seed, purpose, step): no key is carried, so a resumed step draws the same."""

import hashlib

import jax
from jaxtyping import Int, Key

from minicpm_jax.core import types


def tag(purpose: str) -> int:
  """Stable 31-bit integer of a purpose name ("init", "dropout", ...), equal on every machine."""
  return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little") >> 1


def key(
  seed: int | Int[types.Array, ""], purpose: str, step: int | Int[types.Array, ""] = 0
) -> Key[types.Array, ""]:
  """The typed key of `purpose` at `step` (both numbers may be traced)."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), tag(purpose)), step)
