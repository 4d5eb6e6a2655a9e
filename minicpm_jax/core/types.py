"""Dimension letters (style.md 2.3), array aliases, dtype names.

B batch, T query tokens, S key/cache tokens, D model width, N query heads, K key/value heads,
H head width, F feed-forward, V vocabulary, L layers, E experts, X experts a token, R low rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
AnyArray = jax.Array | np.ndarray
ArrayLike = jax.typing.ArrayLike
Params = dict[str, Any]  # nested dict of arrays, paths as in style.md 2.3

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}


def dtype_of(name: str) -> Any:
  """'bf16' -> jnp.bfloat16; also accepts numpy's names ('bfloat16', 'float32', 'float16')."""
  if name in DTYPES:
    return DTYPES[name]
  for short, dtype in DTYPES.items():
    if jnp.dtype(dtype).name == name:
      return DTYPES[short]
  raise ValueError(f"dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
