"""Multi-token prediction: inputs one token ahead, targets two (MiniCPM4 §2.3.2).

The module itself (norms, projection, one block) is `models.transformer.MTP`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def shift_left(
  x_BT: Int[Array, "B T"] | Float[Array, "B T"],
) -> Int[Array, "B T"] | Float[Array, "B T"]:
  """Column i takes column i + 1; the last becomes 0."""
  return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def shift_targets(
  targets_BT: Int[Array, "B T"],
  loss_mask_BT: Float[Array, "B T"],
  segment_ids_BT: Int[Array, "B T"],
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
  """Targets and mask of the extra head from those of next-token prediction.

  Position i predicts token i + 2, which is position i + 1's target; both inputs of position i
  (h_i and token i + 1) must lie in one segment.
  """
  is_same_BT = shift_left(segment_ids_BT) == segment_ids_BT
  return shift_left(targets_BT), shift_left(loss_mask_BT) * is_same_BT.astype(loss_mask_BT.dtype)
