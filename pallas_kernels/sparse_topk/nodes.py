"""Nodes of a draft tree as queries: the keys of the committed tokens' windows are common to a row's
nodes, those of the few windows with drafted tokens are a node's own (infllm_v2.md section 14)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["first_B", "keys_BTRKH"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Own:
  """Compressed keys that stand for the windows first .. first + R - 1 where node t looks.

  Windows before `first` are the row's; a node sees none behind its own R.
  """

  first_B: jax.Array  # int32
  keys_BTRKH: jax.Array

  @property
  def num(self) -> int:
    return self.keys_BTRKH.shape[2]

  def of(self, some: slice) -> "Own":
    """Of some of the nodes."""
    return dataclasses.replace(self, keys_BTRKH=self.keys_BTRKH[:, some])


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["pos_BT", "fine", "coarse"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Nodes:
  """`pos_BT`: int32, position of each node on its row's grid."""

  pos_BT: jax.Array
  fine: Own
  coarse: Own

  def of(self, some: slice) -> "Nodes":
    return Nodes(self.pos_BT[:, some], self.fine.of(some), self.coarse.of(some))


def with_own(dots_CGF, q_CGH, window_F, first, keys_CRH):
  """q k^T of the windows, those of each query's own in their places. q: of one key head."""
  dims = (((2,), (2,)), ((0,), (0,)))
  own_CGR = jax.lax.dot_general(q_CGH, keys_CRH, dims, preferred_element_type=jnp.float32)
  for r in range(keys_CRH.shape[1]):
    is_own_11F = (window_F == first + r)[None, None, :]
    dots_CGF = jnp.where(is_own_11F, own_CGR[:, :, r : r + 1], dots_CGF)
  return dots_CGF
