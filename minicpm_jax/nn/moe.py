"""Mixture of experts of MiniCPM-MoE (models.md 4): top-k of a float32 softmax, renormalised.

No capacity and no dropped tokens: token copies are sorted by expert, three grouped matmuls do only
the chosen experts' arithmetic. XLA's CPU has no grouped matmul (`lax.ragged_dot` multiplies by all
experts there), so a loop over blocks of rows of one expert takes its place: 5 times faster.
On a mesh the sort is local to a device: rows are gathered over `ep`, each device runs its own
experts on them, and the sums are scattered back.
"""

import math

import flax.linen as nn
import flax.struct
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


def block_rows(num_rows: int, num_experts: int) -> int:
  """Rows a block, 8 to 256: a power of two of about half an expert's rows, so little is padded."""
  half = num_rows // (2 * num_experts)
  return min(256, max(8, 1 << (half - 1).bit_length() if half > 1 else 1))


@flax.struct.dataclass
class Layout:
  """Where each (token, slot) row goes when rows are grouped by expert in padded blocks.

  row_P: row that fills place p; is_row_P: is p filled; place_R: place of a row; block_expert_M and
  num_blocks: expert of each block of places, blocks in use; sizes_E: places of each expert.
  """

  row_P: Int[Array, " P"]
  is_row_P: Bool[Array, " P"]
  place_R: Int[Array, " R"]
  block_expert_M: Int[Array, " M"]
  num_blocks: Int[Array, ""]
  sizes_E: Int[Array, " E"]


def layout(expert_R: Int[Array, " R"], num_experts: int, block: int) -> Layout:
  """Groups rows by expert, each group padded to whole blocks; expert `num_experts` = nowhere."""
  R = expert_R.shape[0]
  max_blocks = min(R, R // block + num_experts)
  order_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
  sizes_E = jnp.bincount(expert_R, length=num_experts).astype(jnp.int32)
  blocks_E = -(-sizes_E // block)
  ends_E = jnp.cumsum(blocks_E)
  starts_E, first_E = ends_E - blocks_E, jnp.cumsum(sizes_E) - sizes_E
  block_M = jnp.arange(max_blocks, dtype=jnp.int32)
  expert_M = jnp.minimum(jnp.searchsorted(ends_E, block_M, side="right"), num_experts - 1)
  rank_MB = (block_M - starts_E[expert_M])[:, None] * block + jnp.arange(block)[None, :]
  is_row_MB = (rank_MB < sizes_E[expert_M][:, None]) & (block_M < ends_E[-1])[:, None]
  row_MB = order_R[jnp.clip(first_E[expert_M][:, None] + rank_MB, 0, R - 1)]
  own_R = jnp.minimum(expert_R, num_experts - 1)
  rank_R = jnp.argsort(order_R).astype(jnp.int32) - first_E[own_R]
  return Layout(
    row_P=jnp.reshape(row_MB, (-1,)),
    is_row_P=jnp.reshape(is_row_MB, (-1,)),
    place_R=jnp.clip(starts_E[own_R] * block + rank_R, 0, max_blocks * block - 1),
    block_expert_M=expert_M.astype(jnp.int32),
    num_blocks=ends_E[-1],
    sizes_E=blocks_E * block,
  )


@jax.custom_vjp
def block_matmul(
  x_MBK: Float[Array, "M B K"],
  w_EKN: Float[Array, "E K N"],
  expert_M: Int[Array, " M"],
  num_blocks: Int[Array, ""],
) -> Float[Array, "M B N"]:
  """x_m @ w[expert_m] for the first `num_blocks` blocks, zeros after them."""

  def body(m, y_MBN):
    y_BN = x_MBK[m] @ w_EKN[expert_M[m]]
    return jax.lax.dynamic_update_index_in_dim(y_MBN, y_BN, m, axis=0)

  y_MBN = jnp.zeros((*x_MBK.shape[:2], w_EKN.shape[2]), x_MBK.dtype)
  return jax.lax.fori_loop(0, num_blocks, body, y_MBN)


def _block_matmul_fwd(x_MBK, w_EKN, expert_M, num_blocks):
  return block_matmul(x_MBK, w_EKN, expert_M, num_blocks), (x_MBK, w_EKN, expert_M, num_blocks)


def _block_matmul_bwd(saved, dy_MBN):
  x_MBK, w_EKN, expert_M, num_blocks = saved

  def body(m, grads):
    dx_MBK, dw_EKN = grads
    e, dy_BN = expert_M[m], dy_MBN[m]
    dx_BK = jnp.einsum("BN,KN->BK", dy_BN, w_EKN[e])
    dx_MBK = jax.lax.dynamic_update_index_in_dim(dx_MBK, dx_BK, m, axis=0)
    dw_KN = dw_EKN[e] + jnp.einsum("BK,BN->KN", x_MBK[m], dy_BN, preferred_element_type=jnp.float32)
    return dx_MBK, jax.lax.dynamic_update_index_in_dim(dw_EKN, dw_KN, e, axis=0)

  zeros = jnp.zeros_like(x_MBK), jnp.zeros(w_EKN.shape, jnp.float32)
  dx_MBK, dw_EKN = jax.lax.fori_loop(0, num_blocks, body, zeros)
  return dx_MBK, dw_EKN.astype(w_EKN.dtype), None, None


block_matmul.defvjp(_block_matmul_fwd, _block_matmul_bwd)


def experts(
  x_RD: Float[Array, "tokens D"],
  weights_RX: Float[Array, "tokens X"],
  index_RX: Int[Array, "tokens X"],
  gate_EDF: Float[Array, "E D F"],
  up_EDF: Float[Array, "E D F"],
  down_EFD: Float[Array, "E F D"],
  cfg: ModelConfig,
  *,
  use_ragged_dot: bool,
) -> Float[Array, "tokens D"]:
  """sum_x w_x down_e(act(gate_e x) * up_e x); an index >= E stands for an expert elsewhere."""
  E, X, D = gate_EDF.shape[0], index_RX.shape[1], x_RD.shape[1]
  block = 1 if use_ragged_dot else block_rows(index_RX.size, E)
  at = layout(jnp.reshape(index_RX, (-1,)), E, block)
  x_PD = jnp.where(at.is_row_P[:, None], jnp.take(x_RD, at.row_P // X, axis=0), 0)

  def matmul(x_PK, w_EKN):
    if use_ragged_dot:
      return jax.lax.ragged_dot(x_PK, w_EKN, at.sizes_E)
    x_MBK = jnp.reshape(x_PK, (-1, block, x_PK.shape[1]))
    y_MBN = block_matmul(x_MBK, w_EKN, at.block_expert_M, at.num_blocks)
    return jnp.reshape(y_MBN, (-1, w_EKN.shape[2]))

  gate_PF, up_PF = matmul(x_PD, gate_EDF), matmul(x_PD, up_EDF)
  y_PD = matmul(functional.gated(gate_PF, up_PF, cfg.act, cfg.act_threshold), down_EFD)
  y_RXD = jnp.reshape(jnp.take(y_PD, at.place_R, axis=0), (*index_RX.shape, D))
  y_RXD = jnp.where((index_RX < E)[:, :, None], y_RXD, 0)
  return jnp.einsum("RXD,RX->RD", y_RXD, weights_RX.astype(y_RXD.dtype))


def _is_sharded() -> bool:
  here = jax.sharding.get_abstract_mesh()
  return not here.empty and not here.manual_axes and math.prod(here.shape.values()) > 1


def experts_on_mesh(x_BTD, weights_BTX, index_BTX, kernels, run):
  """`run` on every device with its tokens and its experts (ep), its slice of the width (tp)."""
  here = jax.sharding.get_abstract_mesh()
  sizes = dict(here.shape)

  def spec(x, *names):
    return mesh.partition_spec(names, sizes=sizes, shape=x.shape, is_hint=True)

  tokens = spec(x_BTD, "act_batch", "act_seq", None)
  gate, up, down = (spec(k, *n) for k, n in zip(kernels, _KERNEL_AXES, strict=True))
  is_cut_over_ep = "ep" in jax.tree.leaves(tuple(tokens))
  has_ep, has_tp = gate[0] is not None, gate[2] is not None

  def local(x_BTD, weights_BTX, index_BTX, *kernels):
    args = x_BTD, weights_BTX, index_BTX
    if has_ep:
      if is_cut_over_ep:
        args = tuple(jax.lax.all_gather(a, "ep", axis=0, tiled=True) for a in args)
      num_own = kernels[0].shape[0]
      index = args[2] - jax.lax.axis_index("ep") * num_own
      args = *args[:2], jnp.where((index >= 0) & (index < num_own), index, num_own)
    y_BTD = run(*args, *kernels)
    if has_tp:
      y_BTD = jax.lax.psum(y_BTD, "tp")
    if has_ep and is_cut_over_ep:
      return jax.lax.psum_scatter(y_BTD, "ep", scatter_dimension=0, tiled=True)
    return jax.lax.psum(y_BTD, "ep") if has_ep else y_BTD

  mapped = jax.shard_map(
    local,
    in_specs=(tokens, tokens, tokens, gate, up, down),
    out_specs=tokens,
    check_vma=False,
  )
  return mapped(x_BTD, weights_BTX, index_BTX, *kernels)


# Without fsdp: a device multiplies by whole rows of its experts' matrices.
_KERNEL_AXES = (("expert", None, "mlp"), ("expert", None, "mlp"), ("expert", "mlp", None))


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
      layers.Kernel(cfg, (E, D, F), in_axes, num_lead=1, name="gate")(),
      layers.Kernel(cfg, (E, D, F), in_axes, num_lead=1, name="up")(),
      layers.Kernel(cfg, (E, F, D), ("expert", "mlp", "embed"), num_lead=1, name="down")(),
    )
    probs_BTE, weights_BTX, index_BTX = route(x_BTD, router, moe.experts_per_token)
    loss = balance_loss(probs_BTE, index_BTX, is_token_BT, moe)
    kernels = tuple(kernel.astype(x_BTD.dtype) for kernel in kernels)
    use_ragged_dot = jax.default_backend() != "cpu"

    def run(x, weights, index, *kernels):
      flat = (jnp.reshape(a, (-1, a.shape[-1])) for a in (x, weights, index))
      y = experts(*flat, *kernels, cfg, use_ragged_dot=use_ragged_dot)
      return jnp.reshape(y, x.shape)

    if _is_sharded():
      return experts_on_mesh(x_BTD, weights_BTX, index_BTX, kernels, run), loss
    return run(x_BTD, weights_BTX, index_BTX, *kernels), loss
