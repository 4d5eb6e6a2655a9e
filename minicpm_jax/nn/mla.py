"""MiniCPM3's multi-head latent attention (models.md 5).

Without a cache keys and values are expanded per head. The cache holds the normalised latent and
the rotated shared rope key (R_kv + rope channels a token); then kv_b is absorbed into the query
and the output, which makes it attention with one key head of that width.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minicpm_jax.config import ModelConfig
from minicpm_jax.core import mesh
from minicpm_jax.nn import attention, kv, layers, rope


class MLA(nn.Module):
  """Latent attention; the two latent norms use `mla.latent_norm_eps` (1e-6), not `norm_eps`."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    tables: rope.RopeTables,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    kv_segment_ids_BS: Int[Array, "B S"] | None = None,
    cache: kv.LayerCache | None = None,
    mask_BTS: Bool[Array, "B T S"] | None = None,
  ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None]:
    cfg, mla = self.cfg, self.cfg.mla
    D, N, H = cfg.model_dim, cfg.num_heads, cfg.head_dim
    nope, rope_dim, V = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
    R_q, R = mla.q_lora_rank, mla.kv_lora_rank

    latent_q = layers.Linear(cfg, (D, R_q), ("embed", "lora"), name="q_a")(x_BTD)
    latent_q = layers.RMSNorm(cfg, mla.latent_norm_eps, "lora", name="q_a_norm")(latent_q)
    q_axes = ("lora", "heads", "head_dim")
    q_BTNH = layers.Linear(cfg, (R_q, N, H), q_axes, name="q_b")(latent_q)
    latent_kv = layers.Linear(cfg, (D, R + rope_dim), ("embed", "lora"), name="kv_a")(x_BTD)
    latent_BTR, rope_key = jnp.split(latent_kv, (R,), axis=-1)
    latent_BTR = layers.RMSNorm(cfg, mla.latent_norm_eps, "lora", name="kv_a_norm")(latent_BTR)
    kv_b = layers.Kernel(cfg, (R, N, nope + V), q_axes, name="kv_b")()
    kv_b = kv_b.astype(x_BTD.dtype)

    q_nope, q_rope = jnp.split(q_BTNH, (nope,), axis=-1)
    q_rope = rope.apply_rope(q_rope, tables)
    rope_key = rope.apply_rope(rope_key[:, :, None, :], tables)  # one head, shared by all

    if cache is None:
      kv_BSNX = jnp.einsum("BSR,RNX->BSNX", latent_BTR, kv_b)
      k_nope, v_BSNV = jnp.split(kv_BSNX, (nope,), axis=-1)
      rope_keys = jnp.broadcast_to(rope_key, (*k_nope.shape[:3], rope_dim))
      q_BTNH = jnp.concatenate((q_nope, q_rope), axis=-1)
      k_BSNH = jnp.concatenate((k_nope, rope_keys), axis=-1)
      out_BTNV = attention.attend(cfg, q_BTNH, k_BSNH, v_BSNV, segment_ids_BT, kv_segment_ids_BS)
    else:
      q_offset = cache.length
      new_k = jnp.concatenate((latent_BTR[:, :, None, :], rope_key), axis=-1)
      cache, k_BS1X, _ = kv.write(cache, new_k, new_k[..., :0])
      q_latent = jnp.einsum("BTNH,RNH->BTNR", q_nope, kv_b[..., :nope])
      q_BTNX = jnp.concatenate((q_latent, q_rope), axis=-1)
      ids = (segment_ids_BT, kv_segment_ids_BS)
      out_BTNR = attention.attend(cfg, q_BTNX, k_BS1X, k_BS1X[..., :R], *ids, q_offset, mask_BTS)
      out_BTNV = jnp.einsum("BTNR,RNV->BTNV", out_BTNR, kv_b[..., nope:])
    out_BTNV = mesh.constrain(out_BTNV, "act_batch", "act_seq", "act_heads", None)
    o_axes = ("heads", "head_dim", "embed")
    return layers.Linear(cfg, (N, V, D), o_axes, num_in=2, name="o")(out_BTNV), cache
