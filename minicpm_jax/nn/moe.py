"""Mixture of experts of MiniCPM-MoE (models.md 4): top-k of a float32 softmax, renormalised.

No capacity and no dropped tokens. Two exact forms of the expert computation:
  dense   every expert on every token, weighted (0 where not chosen): one large matmul each, cut
          over the expert axis by the partitioner. XLA's CPU has no grouped matmul: this is faster.
  ragged  token copies sorted by expert, `lax.ragged_dot`: only the chosen experts' arithmetic.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.config import ModelConfig, MoEConfig
from minicpm_jax.core import mesh
from minicpm_jax.nn import functional, layers


def route(
  x_BTD: Float[Array, "B T D"], kernel_DE: Float[Array, "D E"], num_chosen: int
) -> tuple[Float[Array, "B T E"], Float[Array, "B T X"], Int[Array, "B T X"]]:
  """(softmax over all experts, renormalised weights of the top k, their indices), float32."""
  logits_BTE = x_BTD.astype(jnp.float32) @ kernel_DE.astype(jnp.float32)
  probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
  top_BTX, index_BTX = jax.lax.top_k(probs_BTE, num_chosen)
  return probs_BTE, top_BTX / jnp.sum(top_BTX, axis=-1, keepdims=True), index_BTX


def balance_loss(
  probs_BTE: Float[Array, "B T E"],
  index_BTX: Int[Array, "B T X"],
  is_token_BT: Bool[Array, "B T"] | None,
  cfg: MoEConfig,
) -> Float[Array, ""]:
  """E * sum_e f_e P_e of one layer, un-weighted (Fedus et al.; 1 at uniform routing).

  f_e counts all slots or the first (`cfg.aux_counts`); padding does not count.
  """
  counted_BTX = index_BTX if cfg.aux_counts == "all_slots" else index_BTX[..., :1]
  chosen_BTE = jnp.mean(jax.nn.one_hot(counted_BTX, cfg.num_experts), axis=2)
  if is_token_BT is None:
    f_E, p_E = jnp.mean(chosen_BTE, axis=(0, 1)), jnp.mean(probs_BTE, axis=(0, 1))
  else:
    share_BT = is_token_BT / jnp.maximum(jnp.sum(is_token_BT), 1)
    f_E = jnp.einsum("BT,BTE->E", share_BT, chosen_BTE)
    p_E = jnp.einsum("BT,BTE->E", share_BT, probs_BTE)
  return cfg.num_experts * jnp.sum(f_E * p_E)


def experts_dense(
  x_BTD: Float[Array, "B T D"],
  weights_BTX: Float[Array, "B T X"],
  index_BTX: Int[Array, "B T X"],
  gate_EDF: Float[Array, "E D F"],
  up_EDF: Float[Array, "E D F"],
  down_EFD: Float[Array, "E F D"],
  cfg: ModelConfig,
) -> Float[Array, "B T D"]:
  """sum_e w_e down_e(act(gate_e x) * up_e x) with w_e = 0 for the experts not chosen."""
  one_hot_BTXE = jax.nn.one_hot(index_BTX, cfg.moe.num_experts, dtype=jnp.float32)
  weights_EBT = jnp.einsum("BTX,BTXE->EBT", weights_BTX, one_hot_BTXE).astype(x_BTD.dtype)
  gate_EBTF = jnp.einsum("BTD,EDF->EBTF", x_BTD, gate_EDF)
  up_EBTF = jnp.einsum("BTD,EDF->EBTF", x_BTD, up_EDF)
  h_EBTF = functional.gated(gate_EBTF, up_EBTF, cfg.act, cfg.act_threshold)
  h_EBTF = mesh.constrain(h_EBTF, "act_expert", "act_batch", "act_seq", "act_mlp")
  return jnp.einsum("EBTF,EFD->BTD", h_EBTF * weights_EBT[..., None], down_EFD)


def experts_ragged(
  x_BTD: Float[Array, "B T D"],
  weights_BTX: Float[Array, "B T X"],
  index_BTX: Int[Array, "B T X"],
  gate_EDF: Float[Array, "E D F"],
  up_EDF: Float[Array, "E D F"],
  down_EFD: Float[Array, "E F D"],
  cfg: ModelConfig,
) -> Float[Array, "B T D"]:
  """The same sum over the chosen experts only: sort, three grouped matmuls, un-sort."""
  X, D = index_BTX.shape[-1], x_BTD.shape[-1]
  expert_R = jnp.reshape(index_BTX, (-1,))  # one row a (token, slot)
  order_R = jnp.argsort(expert_R, stable=True)
  group_sizes_E = jnp.bincount(expert_R, length=cfg.moe.num_experts).astype(jnp.int32)
  x_RD = jnp.take(jnp.reshape(x_BTD, (-1, D)), order_R // X, axis=0)
  gate_RF = jax.lax.ragged_dot(x_RD, gate_EDF, group_sizes_E)
  up_RF = jax.lax.ragged_dot(x_RD, up_EDF, group_sizes_E)
  h_RF = functional.gated(gate_RF, up_RF, cfg.act, cfg.act_threshold)
  y_RD = jax.lax.ragged_dot(h_RF, down_EFD, group_sizes_E)
  y_BTXD = jnp.reshape(jnp.take(y_RD, jnp.argsort(order_R), axis=0), (*index_BTX.shape, D))
  return jnp.einsum("BTXD,BTX->BTD", y_BTXD, weights_BTX.astype(y_RD.dtype))


class MoE(nn.Module):
  """Router and experts; returns (output, un-weighted balance loss)."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, "B T D"], is_token_BT: Bool[Array, "B T"] | None = None
  ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    cfg, moe = self.cfg, self.cfg.moe
    D, F, E = cfg.model_dim, cfg.mlp_dim, moe.num_experts
    router_axes, in_axes = ("embed", None), ("expert", "embed", "mlp")
    router = layers.Kernel(cfg, (D, E), router_axes, moe.router_init_std, name="router")()
    kernels = (
      layers.Kernel(cfg, (E, D, F), in_axes, name="gate")(),
      layers.Kernel(cfg, (E, D, F), in_axes, name="up")(),
      layers.Kernel(cfg, (E, F, D), ("expert", "mlp", "embed"), name="down")(),
    )
    probs_BTE, weights_BTX, index_BTX = route(x_BTD, router, moe.experts_per_token)
    loss = balance_loss(probs_BTE, index_BTX, is_token_BT, moe)
    experts = experts_dense if jax.default_backend() == "cpu" else experts_ragged
    kernels = tuple(kernel.astype(x_BTD.dtype) for kernel in kernels)
    return experts(x_BTD, weights_BTX, index_BTX, *kernels, cfg), loss
