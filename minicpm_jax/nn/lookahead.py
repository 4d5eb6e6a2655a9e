"""Mask tokens among the rows of a forward, and soft prompts that they alone see (BiTA).

A mask token has a learned embedding in place of a word's and asks for a token that lies further
ahead. The soft prompts are keys and values by layer, in front of everything and without rotation.
Rows of real tokens see neither, so what they say is that of the bare model (inference.md 15).
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class Lookahead:
  """Which rows of a forward are mask tokens, and all that is learned."""

  mask_BT: Any  # int32: 0 = a real token, i = the i-th mask token
  embedding_MD: Any  # as rows M of the embedding table would be, not yet scaled
  k_LPKH: Any  # the prompts' keys and values
  v_LPKH: Any


@flax.struct.dataclass
class Prompts:
  """One layer's soft prompts; `sees_BT` has the rows that see them."""

  k_PKH: Any
  v_PKH: Any
  sees_BT: Any  # bool

  def behind(self, k_BSKH: Array, v_BSKH: Array) -> tuple[Array, Array]:
    """Keys and values with the prompts' behind them."""
    B = k_BSKH.shape[0]

    def joined(x_BSKH: Array, prompt_PKH: Array) -> Array:
      rows = jnp.broadcast_to(prompt_PKH.astype(x_BSKH.dtype)[None], (B, *prompt_PKH.shape))
      return jnp.concatenate((x_BSKH, rows), axis=1)

    return joined(k_BSKH, self.k_PKH), joined(v_BSKH, self.v_PKH)

  def behind_mask(self, mask_BTS: Array) -> Array:
    """A mask of keys with the prompts' columns behind it."""
    own_BTP = jnp.broadcast_to(self.sees_BT[:, :, None], (*self.sees_BT.shape, self.k_PKH.shape[0]))
    return jnp.concatenate((mask_BTS, own_BTP), axis=2)


def embedded(
  x_BTD: Float[Array, "B T D"], lookahead: Lookahead, scale_emb: float
) -> Float[Array, "B T D"]:
  """Embeddings with the mask tokens' in their rows."""
  rows_MD = lookahead.embedding_MD.astype(x_BTD.dtype)
  rows_MD = rows_MD if scale_emb == 1.0 else rows_MD * scale_emb
  masks_BTD = jnp.take(rows_MD, jnp.maximum(lookahead.mask_BT - 1, 0), axis=0)
  return jnp.where((lookahead.mask_BT > 0)[:, :, None], masks_BTD, x_BTD)
