"""Dense causal attention: the one call into `pallas_kernels.flash`, and the GQA block.

Sparse attention (InfLLM v2) is not built yet: a config that would need it at this length raises
`SparseAttentionNotBuilt`; below `dense_len` the same weights run dense, as released.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import mesh
from minicpm_jax.nn import kv, layers, rope
from pallas_kernels.flash import api as flash


class SparseAttentionNotBuilt(NotImplementedError):
  """The config asks for InfLLM v2 attention at this length; only dense attention exists."""


def check_dense(cfg: ModelConfig, key_length: int) -> None:
  """Raises where `cfg.sparse` wants sparse attention over `key_length` keys (models.md 2.2)."""
  if cfg.sparse is None:
    return
  dense_len = cfg.sparse.dense_len
  if dense_len == -1 or key_length >= dense_len:
    raise SparseAttentionNotBuilt(
      f"model.sparse: found dense_len {dense_len} and {key_length} keys (sequence length or cache "
      "capacity), expected fewer keys than dense_len: sparse attention is not built yet. "
      "Set model.sparse to None for dense attention at every length (same weights)."
    )


def attend(
  cfg: ModelConfig,
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKV: Float[Array, "B S K V"],
  segment_ids_BT: Int[Array, "B T"] | None,
  kv_segment_ids_BS: Int[Array, "B S"] | None,
  q_offset: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N V"]:
  """softmax(q k^T / sqrt(cfg.head_dim)) v, causal by slot and inside segments.

  Keys are whole along the sequence here; queries may be cut over the context axis.
  """
  q_BTNH = mesh.constrain(q_BTNH, "act_batch", "act_seq", "act_heads", None)
  k_BSKH = mesh.constrain(k_BSKH, "act_batch", None, "act_kv_heads", None)
  v_BSKV = mesh.constrain(v_BSKV, "act_batch", None, "act_kv_heads", None)
  out_BTNV = flash.flash_attention(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    scale=cfg.head_dim**-0.5,
    q_offset=q_offset,
    q_segment_ids_BT=segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
    implementation=cfg.attention,
  )
  return mesh.constrain(out_BTNV, "act_batch", "act_seq", "act_heads", None)


class Attention(nn.Module):
  """Grouped-query attention with RoPE (models.md 3.2); cache in, cache out."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    tables: rope.RopeTables,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    kv_segment_ids_BS: Int[Array, "B S"] | None = None,
    cache: kv.LayerCache | None = None,
  ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None]:
    cfg = self.cfg
    D, N, K, H = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    kv_axes = ("embed", "kv_heads", "head_dim")
    q_BTNH = layers.Linear(cfg, (D, N, H), ("embed", "heads", "head_dim"), name="q")(x_BTD)
    k_BSKH = layers.Linear(cfg, (D, K, H), kv_axes, name="k")(x_BTD)
    v_BSKH = layers.Linear(cfg, (D, K, H), kv_axes, name="v")(x_BTD)
    q_BTNH, k_BSKH = rope.apply_rope(q_BTNH, tables), rope.apply_rope(k_BSKH, tables)
    q_offset = 0
    if cache is not None:
      q_offset = cache.length
      cache, k_BSKH, v_BSKH = kv.write(cache, k_BSKH, v_BSKH)
    out_BTNH = attend(cfg, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, kv_segment_ids_BS, q_offset)
    o_axes = ("heads", "head_dim", "embed")
    return layers.Linear(cfg, (N, H, D), o_axes, num_in=2, name="o")(out_BTNH), cache
