"""Layers of draft models: attention over several sets of keys, the fc, one decoder layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minicpm_jax.config import DraftConfig, ModelConfig
from minicpm_jax.core import mesh, types
from minicpm_jax.nn import functional, layers, rope


def attend(
  q_BTNH: Float[Array, "B T N H"],
  parts: list[tuple[Array, Array, Array]],
  own: tuple[Array, Array] | None = None,
  diagonals: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "B T N H"]:
  """One softmax over several sets of keys, the first not copied; 0 where a row sees nothing.

  parts: (k_BSKH, v_BSKH, mask_BTS). own: (k_BTKH, v_BTKH), row t sees its own. diagonals:
  (k_JBTKH, v_JBTKH, is_on_J), row t sees row t of each set that is on.
  """
  B, T, N, H = q_BTNH.shape
  K = parts[0][0].shape[2]
  G = N // K
  q_BKTGH = jnp.transpose(q_BTNH.reshape(B, T, K, G, H), (0, 2, 1, 3, 4))
  q_BKRH = q_BKTGH.reshape(B, K, T * G, H)  # scores and weights have their keys last
  if own is not None and diagonals is None:
    parts = _with_own(parts, own)
  elif own is not None:
    diagonals = (
      jnp.concatenate((diagonals[0], own[0][None])),
      jnp.concatenate((diagonals[1], own[1][None])),
      jnp.concatenate((diagonals[2], jnp.ones((1,), bool))),
    )
  scores, masks = [], []
  for k_BSKH, _, mask_BTS in parts:
    scores.append(_by_head(q_BKRH, k_BSKH.astype(q_BTNH.dtype), 3).reshape(B, K, T, G, -1))
    masks.append(mask_BTS)
  if diagonals is not None:
    k_JBTKH, _, is_on_J = diagonals
    scores.append(jnp.einsum("BKTGH,JBTKH->BKTGJ", q_BKTGH, k_JBTKH))
    masks.append(jnp.broadcast_to(is_on_J[None, None, :], (B, T, is_on_J.shape[0])))
  sizes = [s.shape[-1] for s in scores]
  scores_all = jnp.concatenate(scores, axis=-1).astype(jnp.float32) * H**-0.5
  mask_all = jnp.concatenate(masks, axis=-1)[:, None, :, None, :]
  scores_all = jnp.where(mask_all, scores_all, -1e30)
  weights = jnp.where(mask_all, jax.nn.softmax(scores_all, axis=-1), 0.0).astype(q_BTNH.dtype)
  split = jnp.split(weights, np.cumsum(sizes)[:-1].tolist(), axis=-1)
  out_BKTGH = jnp.zeros_like(q_BKTGH)
  for weight, (_, v_BSKH, _) in zip(split, parts, strict=False):
    weight_BKRS = weight.reshape(B, K, T * G, -1)
    out_BKTGH += _by_head(weight_BKRS, v_BSKH.astype(q_BTNH.dtype), 1).reshape(B, K, T, G, H)
  if diagonals is not None:
    out_BKTGH += jnp.einsum("BKTGJ,JBTKH->BKTGH", split[-1], diagonals[1])
  return jnp.transpose(out_BKTGH, (0, 2, 1, 3, 4)).reshape(B, T, N, H)


def _with_own(parts: list[tuple[Array, Array, Array]], own: tuple[Array, Array]):
  """The parts with one more, or a larger last one (never the first, the cache): keys that row t
  sees at t alone. A product over all rows, as XLA would compute sums over H within the softmax."""
  B, T = own[0].shape[:2]
  mine = (*own, jnp.broadcast_to(jnp.eye(T, dtype=bool)[None], (B, T, T)))
  if len(parts) < 2:
    return [*parts, mine]
  *others, last = parts
  axes = (1, 1, 2)
  joined = (jnp.concatenate(x, axis=a) for *x, a in zip(last, mine, axes, strict=True))
  return [*others, tuple(joined)]


def _by_head(x_BKRX: Array, y_BSKH: Array, axis: int) -> Array:
  """[B, K, R, the other axis of y]: sums over the last axis of x and `axis` of y. `jnp.einsum`
  would turn the sides round, and its result would lie with the keys in front of the rows."""
  return jax.lax.dot_general(x_BKRX, y_BSKH, (((3,), (axis,)), ((0, 1), (0, 2))))


class Fuse(nn.Module):
  """The fc: [features] -> D, with a bias where the checkpoint has one."""

  cfg: DraftConfig
  num_in: int

  @nn.compact
  def __call__(self, x_BTF: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
    cfg, D = self.cfg.layer, self.cfg.layer.model_dim
    shape, std = (self.num_in * D, D), layers.matrix_std(cfg)
    x_BTD = functional.linear(x_BTF, layers.kernel_leaf(self, cfg, shape, ("embed", None), std))
    if self.cfg.fc_bias:
      dtype = types.dtype_of(cfg.param_dtype)
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
      x_BTD = x_BTD + self.param("bias", zeros, (D,), dtype).astype(x_BTD.dtype)[None, None, :]
    return x_BTD


class DraftAttention(nn.Module):
  """q, k, v of `x` (D or 2D wide), rotated; `attend` over what the caller says it sees."""

  cfg: ModelConfig
  in_dim: int

  @nn.compact
  def __call__(
    self, x: Array, tables: rope.RopeTables, past: Any, own_mask: Any, diagonals: Any
  ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    cfg, N, K, H = self.cfg, self.cfg.num_heads, self.cfg.num_kv_heads, self.cfg.head_dim
    kv_axes = ("embed", "kv_heads", "head_dim")
    q_axes = ("embed", "heads", "head_dim")
    q_BTNH = layers.Linear(cfg, (self.in_dim, N, H), q_axes, name="q")(x)
    k_BTKH = layers.Linear(cfg, (self.in_dim, K, H), kv_axes, name="k")(x)
    v_BTKH = layers.Linear(cfg, (self.in_dim, K, H), kv_axes, name="v")(x)
    q_BTNH, k_BTKH = rope.apply_rope(q_BTNH, tables), rope.apply_rope(k_BTKH, tables)
    q_BTNH = mesh.constrain(q_BTNH, "act_batch", "act_seq", "act_heads", None)
    parts = list(past)
    if own_mask is not None:
      parts.append((k_BTKH, v_BTKH, own_mask))
    own = (k_BTKH, v_BTKH) if own_mask is None else None
    out_BTNH = attend(q_BTNH, parts, own, diagonals)
    o_axes = ("heads", "head_dim", "embed")
    out_BTD = layers.Linear(cfg, (N, H, cfg.model_dim), o_axes, num_in=2, name="o")(out_BTNH)
    return out_BTD, (k_BTKH, v_BTKH)


class DraftLayer(nn.Module):
  """One decoder layer; without `attn_norm` its input goes to q, k, v as it is."""

  cfg: DraftConfig
  has_attn_norm: bool

  @nn.compact
  def __call__(
    self, x_BTD: Array, inputs: Any, tables: rope.RopeTables, past: Any, own_mask: Any, diag: Any
  ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    cfg, s = self.cfg.layer, self.cfg.residual_scale
    if inputs is None:
      inputs = layers.RMSNorm(cfg, name="attn_norm")(x_BTD) if self.has_attn_norm else x_BTD
    attn = DraftAttention(cfg, inputs.shape[-1], name="attn")
    branch, new = attn(inputs, tables, past, own_mask, diag)
    x_BTD = functional.add_branch(x_BTD, branch, s)
    normed = layers.RMSNorm(cfg, name="mlp_norm")(x_BTD)
    x_BTD = functional.add_branch(x_BTD, layers.MLP(cfg, name="mlp")(normed), s)
    return mesh.constrain(x_BTD, "act_batch", "act_seq", "act_embed"), new
