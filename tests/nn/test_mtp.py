"""Targets of the extra head against a loop over positions."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_jax.nn import mtp


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2))
def test_position_i_predicts_token_i_plus_2_of_its_own_document(lengths, padding):
  ids = [i + 1 for i, n in enumerate(lengths) for _ in range(n)] + [0] * padding
  T = len(ids)
  tokens = np.arange(10, 10 + T)
  has_next = [i + 1 < T and ids[i] == ids[i + 1] != 0 for i in range(T)]
  targets = [int(tokens[i + 1]) if has_next[i] else 0 for i in range(T)]
  found, mask = mtp.shift_targets(
    jnp.asarray([targets]), jnp.asarray([has_next], jnp.float32), jnp.asarray([ids])
  )
  for i in range(T):
    has_second = i + 2 < T and ids[i] == ids[i + 2] != 0
    assert float(mask[0, i]) == float(has_second)
    if has_second:
      assert int(found[0, i]) == tokens[i + 2]
